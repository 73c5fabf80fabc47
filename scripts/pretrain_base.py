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
import copy
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knapsack_rl.tasks.arithmetic import (
    EOS_TOKEN,
    MAX_COMPLETION_TOKENS,
    PAD_TOKEN,
    Problem,
    base_model_path,
    is_correct,
    make_splits,
)

TOKENS = (PAD_TOKEN, EOS_TOKEN, *"0123456789+=")
VOCABULARY = {token: index for index, token in enumerate(TOKENS)}
PAD_ID, EOS_ID = VOCABULARY[PAD_TOKEN], VOCABULARY[EOS_TOKEN]
MAX_POSITIONS = 32  # the longest prompt has 10 characters and the longest completion 6 tokens
SAMPLES = 8  # per prompt: the spectrum is what a uniform budget of eight rollouts would see
IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True)
class Spectrum:
    """How success is spread over prompts.

    Attributes:
        unsolved: Share of prompts without a success in ``SAMPLES`` samples.
        solved: Share of prompts with successes only.
        mean: Mean success rate of one sample at temperature 1.
    """

    unsolved: float
    solved: float
    mean: float


@dataclass(frozen=True)
class Target:
    """The spectrum at which training stops: at least the shares, and the mean and ``unsolved`` in a range."""

    unsolved: tuple[float, float]
    solved: float
    mean: tuple[float, float]

    def met_by(self, spectrum: Spectrum) -> bool:
        """Whether the spectrum fits."""
        return (
            self.unsolved[0] <= spectrum.unsolved <= self.unsolved[1]
            and spectrum.solved >= self.solved
            and self.mean[0] <= spectrum.mean <= self.mean[1]
        )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character; a character it does not know is an error."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(width: int, layers: int) -> LlamaForCausalLM:
    """A randomly initialised decoder with tied embeddings, from torch's global generator."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=PAD_ID,
            bos_token_id=None,
            eos_token_id=EOS_ID,
        )
    )
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_COMPLETION_TOKENS,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    return model


def answer_log_probs(model: LlamaForCausalLM, problems: Sequence[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every answer token given what precedes it.

    Returns:
        Two float tensors of shape (problems, tokens): log-probabilities, zero outside the answer, and the
        mask, one on the answer's digits and its end-of-sequence token.
    """
    ids = [[VOCABULARY[token] for token in (*p.prompt, *p.answer, EOS_TOKEN)] for p in problems]
    length = max(map(len, ids))
    # Padding on the right: with causal attention it cannot influence the tokens before it.
    tokens = torch.full((len(ids), length), PAD_ID)
    labels = torch.full((len(ids), length), IGNORED)
    for row, (problem, row_ids) in enumerate(zip(problems, ids, strict=True)):
        tokens[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, len(problem.prompt) : len(row_ids)] = tokens[row, len(problem.prompt) : len(row_ids)]
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return -losses, (labels[:, 1:] != IGNORED).float()


def expected_spectrum(model: LlamaForCausalLM, problems: Sequence[Problem]) -> tuple[Spectrum, torch.Tensor]:
    """The spectrum expected of ``SAMPLES`` samples per prompt at temperature 1, without sampling.

    Only one sequence of tokens is right, so that its probability is the success rate p of the prompt: the
    shares without and with only successes are the means of ``(1 - p)^SAMPLES`` and ``p^SAMPLES``. That is
    quicker than sampling, and its freedom from noise makes the step at which training stops well defined.

    Returns:
        The spectrum, and the success rates of shape (problems,).
    """
    with torch.inference_mode():
        log_probs, _ = answer_log_probs(model, problems)
        rates = log_probs.sum(dim=1).exp()
    return Spectrum(
        unsolved=((1 - rates) ** SAMPLES).mean().item(),
        solved=(rates**SAMPLES).mean().item(),
        mean=rates.mean().item(),
    ), rates


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
        rows += [is_correct(text, batch[i // samples].answer) for i, text in enumerate(texts)]
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


def train_until(
    target: Target,
    model: LlamaForCausalLM,
    args: argparse.Namespace,
) -> tuple[LlamaForCausalLM, int] | None:
    """Train until the training prompts' spectrum meets the target.

    What is evaluated and returned is a moving average of the weights: the weights themselves jump back and
    forth across the target from one evaluation to the next, while the average crosses it smoothly.

    Args:
        target: Where to stop.
        model: The model at its initialisation; changed in place.
        args: The command line.

    Returns:
        The averaged model and the number of steps taken, or None if ``args.max_steps`` were not enough.
    """
    splits = make_splits()
    rng = random.Random(args.seed)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.perf_counter()
    print(f"{'step':>5} {'loss':>7} {'unsolved':>8} {'solved':>7} {'mean':>6} {'seconds':>8}")
    for step in range(1, args.max_steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / args.warmup)
        log_probs, mask = answer_log_probs(model, splits.pretrain.sample(args.batch, rng))
        loss = -log_probs.sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(current, 1 - args.ema)
        if step % args.eval_every == 0:
            spectrum, _ = expected_spectrum(average, splits.train)
            print(
                f"{step:5d} {loss.item():7.4f} {spectrum.unsolved:8.3f} {spectrum.solved:7.3f}"
                f" {spectrum.mean:6.3f} {time.perf_counter() - started:8.1f}",
                flush=True,
            )
            if target.met_by(spectrum):
                return average, step
    return None


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
    tokenizer = build_tokenizer()
    model = build_model(args.width, args.layers)
    print(f"{model.num_parameters():,} parameters")
    target = Target(unsolved=tuple(args.unsolved), solved=args.solved, mean=tuple(args.mean))
    outcome = train_until(target, model, args)
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
