"""``knapsack-rl train``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from knapsack_rl.cli.parser import add_command
from knapsack_rl.cli.settings_flags import SETTINGS_USAGE, add_flags, settings_of
from knapsack_rl.runs.files import CONFIG_FILE, find_start, read_config
from knapsack_rl.training.lock import refuse_if_owned
from knapsack_rl.training.processes import is_main_process
from knapsack_rl.training.settings import settings_from

EXAMPLES = """examples:
  knapsack-rl train                                       the shipped model on arithmetic, about ten minutes
  knapsack-rl train --allocation uniform --advantage group-std    stock GRPO
  knapsack-rl train --model my-model/ --dataset qa.jsonl --prompt-column question
  knapsack-rl train --dataset countdown --model my-model/ --lora-rank 16
  knapsack-rl train --model smollm2-135m --dataset sums   a real model without a hub
  knapsack-rl train --model Qwen/Qwen2.5-1.5B-Instruct --dataset gsm8k --rollouts-per-pass 16 --vllm colocate
  knapsack-rl train --model my-model/ --dataset reasoning-gym:chain_sum?max_terms=3
  knapsack-rl train --resume runs/knapsack-n4-seed0       continue after an interruption
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "train",
        run,
        usage="%(prog)s [--output FOLDER | --resume FOLDER] [--quiet] " + SETTINGS_USAGE,
        summary="train a language model and write a report",
        description="Train a causal language model with GRPO on verifiable prompts. Without arguments: the shipped "
        "model on generated arithmetic, its rollouts allocated by the knapsack. On several accelerators use torchrun "
        "--nproc_per_node 8 -m knapsack_rl train ..., or accelerate launch with a file of configs/.",
        examples=EXAMPLES,
        extras="trl,plots",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="run folder (default: runs/ALLOCATION-nN-seedS)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="continue the run in this folder")
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    add_flags(parser)


def run(parsed: argparse.Namespace, make_trainer: Callable[..., Any] | None = None) -> int:
    """Train; exit status 0 when finished, 130 when interrupted.

    Args:
        parsed: the command line.
        make_trainer: makes the trainer, see :func:`knapsack_rl.training.run.train`; experiments put theirs here.
    """
    if parsed.resume:
        settings = settings_from(read_config(parsed.resume / CONFIG_FILE), str(parsed.resume / CONFIG_FILE))
        folder = parsed.resume
        changed = [name for name, given in vars(parsed).items() if name.startswith("setting_") and given is not None]
        if changed or parsed.config or parsed.output:
            raise ValueError("--resume uses the settings of the run; give no other settings, --config or --output")
    else:
        settings = settings_of(parsed)
        folder = parsed.output or Path("runs") / settings.label
    if parsed.print_config:
        sys.stdout.write(settings.to_yaml())
        return 0
    if is_main_process():
        # The imports below take many seconds; common mistakes are reported before them.
        from knapsack_rl.training.checks import check_inputs

        check_inputs(settings)
        refuse_if_owned(folder)
        find_start(folder, resume=bool(parsed.resume))

    from knapsack_rl.cli.display import make_display
    from knapsack_rl.training.noise import quiet_libraries
    from knapsack_rl.training.run import train

    started = time.monotonic()
    silent = parsed.quiet or not is_main_process()
    with quiet_libraries():
        special: dict[str, Any] = {} if make_trainer is None else {"make_trainer": make_trainer}
        outcome = train(settings, folder, make_display(quiet=silent), resume=bool(parsed.resume), **special)
    if not is_main_process():
        return 0 if outcome.finished else 130
    minutes = (time.monotonic() - started) / 60
    if not outcome.finished:
        print(f"interrupted after step {outcome.steps}; continue with: knapsack-rl train --resume {folder}")
        return 130
    print(f"trained {outcome.steps} steps in {minutes:.1f} min; run folder: {folder}")
    if outcome.report:
        print(f"report: {outcome.report}")
    return 0
