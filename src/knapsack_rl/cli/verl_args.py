"""``knapsack-rl verl-args``."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from knapsack_rl.cli.parser import add_command, add_settings
from knapsack_rl.verl.launch import (
    SETTINGS_KEY,
    SWITCHES,
    VerlSettings,
    check_config,
    overrides,
    parse_overrides,
    without_effect,
)

EXAMPLES = """examples:
  knapsack-rl verl-args                                   the overrides with the default settings
  knapsack-rl verl-args --max-rollouts 64 --outcome acc
  knapsack-rl verl-args data.train_batch_size=256 actor_rollout_ref.rollout.n=8   also checks your launch
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "verl-args",
        run,
        summary="print the overrides that switch Knapsack RL on in a launch of verl",
        description="Print the overrides to add to a launch of verl (0.9.1, v1 trainer), and check those that "
        "the launch already has. Works without verl.",
        examples=EXAMPLES,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of your launch to check")
    add_settings(parser, VerlSettings, [field.name for field in dataclasses.fields(VerlSettings)])
    parser.add_argument("--one-line", action="store_true", help="without line continuations")


def run(parsed: argparse.Namespace) -> int:
    """Check and print."""
    settings = VerlSettings(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(VerlSettings)})
    if parsed.overrides:
        given = parse_overrides(text for text in parsed.overrides if not _ours(text))
        check_config(given, settings, switched_on=False)
        for reason in without_effect(given, settings):
            print(f"knapsack-rl: {reason}", file=sys.stderr)
    lines = overrides(settings)
    print(" ".join(lines) if parsed.one_line else " \\\n".join(lines))
    return 0


def _ours(text: str) -> bool:
    key = text.lstrip("+").partition("=")[0]
    return key in SWITCHES or key.startswith(SETTINGS_KEY)
