"""Flags for the fields of :class:`TrainSettings`, shared by the commands that train."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path

from knapsack_rl.cli.parser import add_settings
from knapsack_rl.training.settings import TrainSettings, read_yaml, settings_from

SETTINGS_USAGE = "[--config FILE] [--print-config] [--SETTING VALUE ...]"
"""Replaces a usage that lists every flag, which would hide the error below it."""


def add_flags(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Add ``--config`` and one flag per setting; without a flag, the file or the default applies."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings; flags override it")
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML and exit")
    group = parser.add_argument_group("settings (also keys of the YAML file)")
    names = {field.name for field in dataclasses.fields(TrainSettings)} - set(without)
    add_settings(group, TrainSettings, names, prefix="setting_")


def settings_of(parsed: argparse.Namespace) -> TrainSettings:
    """Return the settings of the YAML file and the flags.

    Raises:
        ValueError: a setting is unknown or not allowed.
    """
    values = read_yaml(parsed.config) if parsed.config else {}
    flags = {
        name.removeprefix("setting_"): given for name, given in vars(parsed).items() if name.startswith("setting_")
    }
    values |= {name: given for name, given in flags.items() if given is not None}
    return settings_from(values, str(parsed.config or "command line"))
