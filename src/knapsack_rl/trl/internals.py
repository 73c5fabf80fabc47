"""Checks and wrappers for the internals of TRL that the trainer relies on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from trl.trainer.grpo_trainer import GRPOTrainer


def check_internals() -> None:
    """Check that the private methods that the trainer overrides take the expected arguments.

    Raises:
        RuntimeError: this TRL release differs.
    """
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_prepare_inputs": ["self", "generation_batch"],
        "_generate": ["self", "prompts"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    }
    for name, parameters in expected.items():
        method = getattr(GRPOTrainer, name, None)
        found = list(inspect.signature(method).parameters) if method else None
        if found != parameters:
            raise RuntimeError(
                f"{GRPOTrainer.__module__}.{GRPOTrainer.__name__}.{name} takes {found}, expected {parameters}: this "
                'release of TRL is not supported; install "trl>=1.9,<2" and the newest knapsack-rl. Packages that '
                "replace the trainer of TRL, such as unsloth, are not supported either"
            )


def one_completion_per_row(generate: Callable[..., Any], training: Callable[[], bool]) -> Callable[..., Any]:
    """Return the ``generate`` of TRL's vLLM with n = 1 while training.

    In server mode TRL sends every G-th prompt with n = G, which ragged rows break.

    Args:
        generate: takes ``num_generations`` among its arguments.
        training: returns whether the rows are those of training.
    """

    @wraps(generate)
    def generate_rows(*args: Any, **kwargs: Any) -> Any:
        if training():
            bound = inspect.signature(generate).bind(*args, **kwargs)
            bound.arguments["num_generations"] = 1
            return generate(*bound.args, **bound.kwargs)
        return generate(*args, **kwargs)

    return generate_rows


def model_tokens(generated: Any) -> list[int]:
    """Return how many tokens of each completion the model generated: all but those of tools and environments.

    Args:
        generated: what ``GRPOTrainer._generate`` returned; its second and third part are the tokens of the completions,
            and 1 for those of the model and 0 for others, or None if all are the model's.

    Raises:
        RuntimeError: the parts do not fit together: this TRL release is not supported.
    """
    _, completions, mask, *_ = generated
    sizes = [len(tokens) for tokens in completions]
    if mask is None:
        return sizes
    if [len(row) for row in mask] != sizes:
        raise RuntimeError(f"expected a mask with {sizes} tokens from GRPOTrainer._generate, got {mask!r:.200}")
    return [int(sum(row)) for row in mask]
