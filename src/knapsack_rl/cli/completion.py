"""``knapsack-rl completion``."""

from __future__ import annotations

import argparse
import sys

SHELLS = ("bash", "zsh", "fish")

EXAMPLES = """examples:
  knapsack-rl completion bash    print it; for good: ... > ~/.local/share/bash-completion/completions/knapsack-rl
  knapsack-rl completion zsh     print it; for good: ... > a folder of $fpath, as _knapsack-rl
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and flags in your shell",
        description="Print a completion script. To try it in bash: source <(knapsack-rl completion bash)",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the script of the whole command line."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError(f'{error}. Shell completion needs: pip install "knapsack-rl[completion]"') from error
    from knapsack_rl.cli import build_parser

    sys.stdout.write(shtab.complete(build_parser(), shell=parsed.shell).rstrip() + "\n")
    return 0
