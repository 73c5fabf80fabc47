"""The argument parser of the command line: errors with the usage of the command and the flag probably meant."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from knapsack_rl.settings import kind_of

ALLOCATION_FLAGS = ("estimator", "estimator_settings", "value", "min_rollouts", "max_rollouts")
"""Settings of allocation that are flags of the commands that read logs."""


class CommandParser(argparse.ArgumentParser):
    """Rejects unknown flags itself; the stock parser leaves those of a command to the main parser."""

    def parse_known_args(  # type: ignore[override] # the base method is overloaded
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; exit with an error if an argument is unknown."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return parsed, unknown

    def _meant(self, unknown: Iterable[str]) -> str:
        """Return a hint at the flags that resemble those given."""
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        typed = (word.partition("=")[0] for word in unknown if word.startswith("--"))
        close = [found for word in typed for found in difflib.get_close_matches(word, known, n=1)]
        return f" (did you mean {', '.join(close)}?)" if close else f" ({self.prog} --help lists what there is)"


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
    extras: str = "all",
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: the commands of the main parser.
        name: of the command.
        run: runs the command; returns the exit status.
        summary: its line in the list of commands.
        description: the text above its options.
        examples: the text below its options.
        extras: extras of the package that it needs, named if an import fails.
        usage: in place of a usage that lists every flag.
    """
    parser = commands.add_parser(
        name,
        usage=usage,
        help=summary,
        description=textwrap.fill(description, 100),  # the formatter keeps the lines of the examples
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, extras=extras)
    return parser


def add_settings(
    parser: argparse._ActionsContainer, settings: type, names: Collection[str], *, prefix: str = ""
) -> None:
    """Add a flag for each of these fields of a settings class, with its help, choices and default.

    Args:
        parser: a parser or a group of one.
        settings: a dataclass whose fields :func:`knapsack_rl.settings.option` made.
        names: of its fields.
        prefix: in front of the name under which a flag is parsed; such a flag is None unless it is given.
    """
    for field in dataclasses.fields(settings):
        if field.name not in names:
            continue
        flag, text, choices = "--" + field.name.replace("_", "-"), field.metadata["help"], field.metadata["choices"]
        default, kind = None if prefix else field.default, kind_of(field)
        if kind is bool:
            parser.add_argument(flag, dest=prefix + field.name, action="store_true", help=text)
            continue
        parser.add_argument(
            flag,
            dest=prefix + field.name,
            type=kind,
            default=default,
            choices=choices,
            metavar=None if choices else kind.__name__.upper(),
            help=f"{text} (default: {field.default})" if field.default not in ("", None) else text,
        )
