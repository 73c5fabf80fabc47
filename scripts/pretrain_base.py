"""Pre-train the tiny base model that ships with the package.

The model is a Llama-style decoder over single characters. It is trained on generated arithmetic until it
solves some prompts always, some never and most sometimes, which is where a choice of rollout budgets can
matter, and is then saved in Hugging Face format. The run takes two to three minutes on one thread, and the
same seed and the same versions of the libraries give the same weights.

Usage:
    python scripts/pretrain_base.py --out runs/base_model

Exit status: 0 if a checkpoint was written, 1 if no evaluated step met the target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knapsack_rl.tasks.arithmetic import MAX_COMPLETION_TOKENS, base_model_path, make_splits
from knapsack_rl.tasks.generated import Problem
from knapsack_rl.tasks.pretraining import (
    EOS_ID,
    PAD_ID,
    SAMPLES,
    Schedule,
    Spectrum,
    Target,
    build_model,
    build_tokenizer,
    expected_spectrum,
    train_until,
)
from knapsack_rl.tasks.verifier import is_correct

MAX_POSITIONS = 32  # the longest prompt has 10 characters and the longest completion 6 tokens


def successes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    samples: int,
    greedy: bool = False,
    batch_size: int = 64,
) -> torch.Tensor:
    """Generate completions and verify them, as a reinforcement learning run does.

    Returns:
        Boolean tensor of shape (problems, samples): which completions are right.
    """
    rows: list[bool] = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        inputs = tokenizer([p.prompt for p in batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=GenerationConfig(
                    do_sample=not greedy,
                    top_k=0 if not greedy else None,
                    num_return_sequences=samples,
                    max_new_tokens=MAX_COMPLETION_TOKENS,
                    pad_token_id=PAD_ID,
                    eos_token_id=EOS_ID,
                ),
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rows += [is_correct(text, batch[i // samples].answer, "exact") for i, text in enumerate(texts)]
    return torch.tensor(rows).view(len(problems), samples)


def by_stratum(problems: Sequence[Problem], rates: torch.Tensor) -> dict[str, float]:
    """Mean success rate by digits of the larger operand."""
    groups: dict[str, list[float]] = {}
    for problem, rate in zip(problems, rates.tolist(), strict=True):
        groups.setdefault(f"{problem.digits} digits", []).append(rate)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(groups.items())}


def digest(problems: Sequence[Problem]) -> str:
    """SHA-256 of the prompts in order, one a line."""
    return hashlib.sha256("\n".join(problem.prompt for problem in problems).encode()).hexdigest()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Pre-train the tiny arithmetic base model until its success rates are spread widely.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=base_model_path(), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the batches")
    parser.add_argument("--width", type=int, default=96, help="hidden size; a multiple of 8")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--batch", type=int, default=128, help="problems per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate after the warm-up")
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--ema", type=float, default=0.96, help="decay of the moving average of the weights")
    parser.add_argument("--max-steps", type=int, default=3000, help="give up after this many steps")
    parser.add_argument("--eval-every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--unsolved", type=float, nargs=2, default=(0.28, 0.42), help="range of the unsolved share")
    parser.add_argument("--solved", type=float, default=0.105, help="least share of solved prompts")
    parser.add_argument("--mean", type=float, nargs=2, default=(0.30, 0.45), help="range of the mean rate")
    args = parser.parse_args(argv)
    if args.width % 8 or args.width < 8:
        parser.error(f"--width must be a positive multiple of 8, got {args.width}")
    for name in ("layers", "batch", "max_steps", "eval_every", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not (math.isfinite(args.lr) and args.lr > 0):
        parser.error(f"--lr must be positive, got {args.lr}")
    if not 0 <= args.ema < 1:
        parser.error(f"--ema must be at least 0 and below 1, got {args.ema}")
    return args


def report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, steps: int
) -> dict[str, Any]:
    """Measure the finished model by sampling and collect what is needed to reproduce it."""
    splits = make_splits()
    expected, rates = expected_spectrum(model, splits.train)
    torch.manual_seed(args.seed)
    counts = successes(model, tokenizer, splits.train, samples=SAMPLES).sum(dim=1)
    sampled = Spectrum(
        unsolved=(counts == 0).float().mean().item(),
        solved=(counts == SAMPLES).float().mean().item(),
        mean=counts.float().mean().item() / SAMPLES,
    )
    greedy = successes(model, tokenizer, splits.held_out, samples=1, greedy=True)
    held_out, _ = expected_spectrum(model, splits.held_out)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    return {
        "settings": settings,
        "steps": steps,
        "problems_seen": steps * args.batch,
        "parameters": model.num_parameters(),
        "train_prompts": {
            "count": len(splits.train),
            "sha256": digest(splits.train),
            "samples_per_prompt": SAMPLES,
            "spectrum_sampled": asdict(sampled),
            "spectrum_expected": asdict(expected),
            "mean_by_stratum": by_stratum(splits.train, rates),
        },
        "held_out_prompts": {
            "count": len(splits.held_out),
            "sha256": digest(splits.held_out),
            "greedy_accuracy": greedy.float().mean().item(),
            "expected_accuracy_at_temperature_1": held_out.mean,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, save; returns the exit status."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(MAX_POSITIONS)
    model = build_model(args.width, args.layers, MAX_POSITIONS, MAX_COMPLETION_TOKENS)
    print(f"{model.num_parameters():,} parameters")
    target = Target(unsolved=tuple(args.unsolved), solved=args.solved, mean=tuple(args.mean))
    schedule = Schedule(args.seed, args.batch, args.lr, args.warmup, args.ema, args.max_steps, args.eval_every)
    splits = make_splits()
    outcome = train_until(target, model, schedule, splits.pretrain, splits.train, lambda text: print(text, flush=True))
    if outcome is None:
        print(
            f"No evaluation within {args.max_steps} steps met {target}; nothing was written."
            " Widen the target, evaluate more often (--eval-every) or train longer (--max-steps).",
            file=sys.stderr,
        )
        return 1
    model, steps = outcome
    training = report(model, tokenizer, args, steps)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(training, indent=2))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
