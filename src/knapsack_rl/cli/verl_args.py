"""``knapsack-rl verl-args``."""

from __future__ import annotations

import argparse
import dataclasses

from knapsack_rl.cli.parser import add_command
from knapsack_rl.verl.launch import SETTINGS_KEY, SWITCHES, VerlSettings, check_config, overrides, parse_overrides

EXAMPLES = """examples:
  knapsack-rl verl-args                                   the overrides with the default settings
  knapsack-rl verl-args --max-rollouts 64 --outcome acc
  knapsack-rl verl-args data.train_batch_size=256 actor_rollout_ref.rollout.n=8   also checks your launch
"""

HELP = {
    "allocation": "'uniform' is stock verl with the same metrics",
    "estimator": "of success rates; 'window' is the paper's rule",
    "min_rollouts": "fewest rollouts of a prompt; 0 lets prompts be skipped",
    "max_rollouts": "most rollouts of a prompt",
    "prompt_id": "'index' (data_source and extra_info.index), 'hash' (of the prompt), or a key of extra_info",
    "outcome": "'reward', or a value that the reward function returns beside its score, such as acc",
    "success_threshold": "an outcome above it is a success",
    "log_allocations": "write allocations.jsonl into trainer.default_local_dir",
    "poll_interval": "seconds between checks for finished groups",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "verl-args",
        run,
        summary="print the overrides that switch Knapsack RL on in a launch of verl",
        description="Print the overrides to add to a launch of verl (0.9 or 0.10, v1 trainer), and check those that "
        "the launch already has. Works without verl.",
        examples=EXAMPLES,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of your launch to check")
    for field in dataclasses.fields(VerlSettings):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=HELP[field.name])
        else:
            parser.add_argument(
                flag, type=type(field.default), default=field.default, help=f"{HELP[field.name]} (default: %(default)s)"
            )
    parser.add_argument("--one-line", action="store_true", help="without line continuations")


def run(parsed: argparse.Namespace) -> int:
    """Check and print."""
    settings = VerlSettings(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(VerlSettings)})
    if parsed.overrides:
        given = parse_overrides(text for text in parsed.overrides if not _ours(text))
        check_config(given, settings, switched_on=False)
    lines = overrides(settings)
    print(" ".join(lines) if parsed.one_line else " \\\n".join(lines))
    return 0


def _ours(text: str) -> bool:
    key = text.lstrip("+").partition("=")[0]
    return key in SWITCHES or key.startswith(SETTINGS_KEY)
