"""``python -m experiments.train_rule RULE ...``: train as ``knapsack-rl train`` does, by a rule of the field.

The rule (see :mod:`experiments.rules`) decides what a step generates, in rounds; the allocator only watches. Arguments
after the rule are those of ``knapsack-rl train``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from experiments.rules import RULES
from knapsack_rl.cli import build_parser
from knapsack_rl.cli import train as command


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; exit status as ``knapsack-rl train``."""
    parser = argparse.ArgumentParser(prog="python -m experiments.train_rule", description=__doc__)
    parser.add_argument("rule", choices=tuple(RULES))
    chosen, rest = parser.parse_known_args(arguments)
    return command.run(build_parser().parse_args(["train", *rest]), make_trainer=partial(make_trainer, chosen.rule))


def make_trainer(rule: str, **settings: Any) -> Any:
    """A trainer whose steps generate by the rule.

    Args:
        rule: name of the rule.
        **settings: keyword arguments of the trainer.
    """
    from experiments.trl_rounds import RoundsGRPOTrainer

    args, ids = settings["args"], [row["prompt_id"] for row in settings["train_dataset"]]
    prompts = args.generation_batch_size // args.num_generations
    return RoundsGRPOTrainer(**settings, rounds=RULES[rule](ids, prompts, args.num_generations, args.seed))


if __name__ == "__main__":
    sys.exit(main())
