"""``knapsack-rl completion``."""

from __future__ import annotations

import argparse
import sys

from knapsack_rl.cli.parser import add_command

SHELLS = ("bash", "zsh", "fish")

EXAMPLES = """examples:
  knapsack-rl completion bash    install: ... > ~/.local/share/bash-completion/completions/knapsack-rl
  knapsack-rl completion zsh     install: ... > a folder of $fpath, as _knapsack-rl
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "completion",
        run,
        summary="print a script that completes commands and flags in your shell",
        description="Print a completion script. To try it in bash: source <(knapsack-rl completion bash)",
        examples=EXAMPLES,
        extras="completion",
    )
    parser.add_argument("shell", choices=SHELLS)


def run(parsed: argparse.Namespace) -> int:
    """Print the completion script."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError(f'{error}. Shell completion needs: pip install "knapsack-rl[completion]"') from error
    from knapsack_rl.cli import build_parser

    sys.stdout.write(shtab.complete(build_parser(), shell=parsed.shell).rstrip() + "\n")
    return 0
