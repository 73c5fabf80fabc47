"""The command line: argument parsing and printing only."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from knapsack_rl import __version__
from knapsack_rl.cli import allocate, compare, completion, replay, report, train, verl_args
from knapsack_rl.cli.parser import CommandParser

COMMANDS = (train, compare, report, allocate, replay, verl_args, completion)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``knapsack-rl`` with all its commands."""
    parser = CommandParser(
        prog="knapsack-rl",
        description="Train language models with reinforcement learning, each step's rollouts allocated by a knapsack.",
        epilog="knapsack-rl COMMAND --help shows the options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"knapsack-rl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0 success, 1 a failed run, 2 bad input or a missing extra, 130 interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Read by OpenMP when torch is imported, later. A torch thread that waits for another would otherwise keep its core
    # busy; where other processes need the cores, a step of a small model then takes many times as long. GNU's OpenMP
    # takes the second in place of the first: the waits of a step are mostly shorter than these rounds, so that on idle
    # cores little is lost to falling asleep.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if not arguments:
        sys.stderr.write(parser.format_help())
        return 2
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        hint = ""
        if isinstance(error, ImportError) and "pip install" not in str(error):
            hint = f'. This command needs: pip install "knapsack-rl[{parsed.extras}]"'
        sys.stderr.write(f"knapsack-rl: {error}{hint}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("knapsack-rl: interrupted\n")
        return 130
