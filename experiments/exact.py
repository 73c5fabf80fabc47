"""Success rates without sampling, where only one sequence of tokens is right."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.tasks.registry import ONE_COMPLETION
from knapsack_rl.training.settings import TrainSettings

BATCH = 1024


def success_rates(settings: TrainSettings, model: Path | None) -> tuple[tuple[str, ...], FloatArray]:
    """Exact success rates of the training prompts at temperature 1: the probability of the right tokens and the end.

    Args:
        settings: of the run; its data set must accept one sequence of tokens per prompt, as the generated ones do.
        model: folder of the trained model, None for the model that the run starts from.

    Returns:
        (P,) ids and (P,) rates in [0, 1], in the order of the data set.

    Raises:
        ValueError: the data set is not a generated one, or the temperature is not 1.
    """
    from knapsack_rl.training.data import load_task
    from knapsack_rl.training.models import model_name

    if settings.dataset not in ONE_COMPLETION or settings.temperature != 1.0:
        raise ValueError(
            f"exact success rates need one of the data sets {', '.join(ONE_COMPLETION)} and temperature 1, got "
            f"{settings.dataset!r} and {settings.temperature}"
        )
    rows = load_task(settings).train
    ids = tuple(row["prompt_id"] for row in rows)
    texts = tuple((row["prompt"], row["answer"]) for row in rows)
    # The start is the same for all runs; a trained model is looked at once.
    rates = _rates(texts, model) if model else _start_rates(texts, Path(model_name(settings.model)))
    return ids, rates


@lru_cache(maxsize=4)
def _start_rates(texts: tuple[tuple[str, str], ...], model: Path) -> FloatArray:
    return _rates(texts, model)


def _rates(texts: tuple[tuple[str, str], ...], folder: Path) -> FloatArray:
    import torch
    from transformers import AutoModelForCausalLM

    from knapsack_rl.tasks import Problem
    from knapsack_rl.tasks.pretraining import success_rates as rates_of

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    problems = [Problem(prompt, answer, prompt, 0) for prompt, answer in texts]
    parts = [rates_of(model, problems[at : at + BATCH]) for at in range(0, len(problems), BATCH)]
    return torch.cat(parts).double().numpy()
