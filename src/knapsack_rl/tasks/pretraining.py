"""Pre-training of the tiny base models: a Llama-style decoder over single characters, stopped at a spread of success.

It is trained on generated problems until it solves some prompts always, some never and most sometimes, which is where a
choice of rollout budgets can matter. The same seed and the same versions of the libraries give the same weights.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knapsack_rl.tasks.arithmetic import EOS_TOKEN, PAD_TOKEN
from knapsack_rl.tasks.generated import Problem, Sampler

TOKENS = (PAD_TOKEN, EOS_TOKEN, *"0123456789+=")
VOCABULARY = {token: index for index, token in enumerate(TOKENS)}
PAD_ID, EOS_ID = VOCABULARY[PAD_TOKEN], VOCABULARY[EOS_TOKEN]
SAMPLES = 8  # per prompt: the spectrum that a uniform budget of eight rollouts would see
IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True)
class Spectrum:
    """The spread of success over prompts.

    Attributes:
        unsolved: share of prompts without a success in ``SAMPLES`` samples.
        solved: share of prompts with successes only.
        mean: mean success rate of one sample at temperature 1.
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
        """Return whether the spectrum fits."""
        return (
            self.unsolved[0] <= spectrum.unsolved <= self.unsolved[1]
            and spectrum.solved >= self.solved
            and self.mean[0] <= spectrum.mean <= self.mean[1]
        )


def build_tokenizer(positions: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character; a character it does not know is an error.

    Args:
        positions: tokens of the longest text.
    """
    tokenizer = Tokenizer(WordLevel(VOCABULARY))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def build_model(width: int, layers: int, positions: int, completion: int) -> LlamaForCausalLM:
    """Return a randomly initialised decoder with tied embeddings, from torch's global generator.

    Args:
        width: hidden size, a multiple of 8.
        layers: decoder layers.
        positions: tokens of the longest text.
        completion: tokens of the longest answer, its end included.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            pad_token_id=PAD_ID,
            bos_token_id=None,
            eos_token_id=EOS_ID,
        )
    )
    model.generation_config = GenerationConfig(
        max_new_tokens=completion,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    return model


def answer_log_probs(model: Any, problems: Sequence[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every answer token given the tokens before it.

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


def success_rates(model: Any, problems: Sequence[Problem]) -> torch.Tensor:
    """Return the (problems,) exact success rates at temperature 1: only one sequence of tokens is right."""
    with torch.inference_mode():
        log_probs, _ = answer_log_probs(model, problems)
        return log_probs.sum(dim=1).exp()


def expected_spectrum(model: Any, problems: Sequence[Problem]) -> tuple[Spectrum, torch.Tensor]:
    """Return the spectrum expected of ``SAMPLES`` samples per prompt at temperature 1, without sampling.

    Only one sequence of tokens is right, so that its probability is the success rate p of the prompt: the
    shares without and with only successes are the means of ``(1 - p)^SAMPLES`` and ``p^SAMPLES``. That is
    quicker than sampling, and its freedom from noise makes the step at which training stops well defined.

    Returns:
        The spectrum, and the success rates of shape (problems,).
    """
    rates = success_rates(model, problems)
    return Spectrum(
        unsolved=((1 - rates) ** SAMPLES).mean().item(),
        solved=(rates**SAMPLES).mean().item(),
        mean=rates.mean().item(),
    ), rates


@dataclass(frozen=True)
class Schedule:
    """Settings of pre-training.

    Attributes:
        seed: of the batches.
        batch: problems per step.
        lr: learning rate after the warm-up.
        warmup: steps of linear warm-up.
        ema: decay of the moving average of the weights.
        max_steps: give up after this many.
        eval_every: steps between evaluations.
    """

    seed: int = 0
    batch: int = 128
    lr: float = 3e-3
    warmup: int = 50
    ema: float = 0.96
    max_steps: int = 3000
    eval_every: int = 5


def train_until(
    target: Target,
    model: LlamaForCausalLM,
    schedule: Schedule,
    sampler: Sampler,
    prompts: Sequence[Problem],
    say: Callable[[str], None],
) -> tuple[LlamaForCausalLM, int] | None:
    """Train until the training prompts' spectrum meets the target.

    A moving average of the weights is evaluated and returned: the weights themselves jump back and forth across
    the target from one evaluation to the next, while the average crosses it smoothly.

    Args:
        target: the spectrum to stop at.
        model: the model at its initialisation; changed in place.
        schedule: settings of the training.
        sampler: problems to train on.
        prompts: problems whose spectrum must meet the target.
        say: called with a line of text after each evaluation.

    Returns:
        The averaged model and the number of steps taken, or None if ``schedule.max_steps`` was not enough.
    """
    rng = random.Random(schedule.seed)  # noqa: S311 - reproducible data, not a secret
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.perf_counter()
    say(f"{'step':>5} {'loss':>7} {'unsolved':>8} {'solved':>7} {'mean':>6} {'seconds':>8}")
    for step in range(1, schedule.max_steps + 1):
        optimizer.param_groups[0]["lr"] = schedule.lr * min(1.0, step / schedule.warmup)
        log_probs, mask = answer_log_probs(model, sampler.sample(schedule.batch, rng))
        loss = -log_probs.sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(current, 1 - schedule.ema)
        if step % schedule.eval_every == 0:
            spectrum, _ = expected_spectrum(average, prompts)
            say(
                f"{step:5d} {loss.item():7.4f} {spectrum.unsolved:8.3f} {spectrum.solved:7.3f}"
                f" {spectrum.mean:6.3f} {time.perf_counter() - started:8.1f}"
            )
            if target.met_by(spectrum):
                return average, step
    return None
