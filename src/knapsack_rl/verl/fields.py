"""Fields of verl's batches."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict

COUNT_FIELD = "__rollout_n__"
"""Field from which verl's agent-loop workers read the number of rollouts of a prompt."""

ID_FIELD = "knapsack_prompt_id"
"""Field that travels with a prompt through verl and identifies it when its rewards are read."""


def plain(prompts: TensorDict, name: str) -> list[Any]:
    """Return a column of verl's batch as a plain list."""
    return [getattr(value, "data", value) if not isinstance(value, dict) else value for value in list(prompts[name])]
