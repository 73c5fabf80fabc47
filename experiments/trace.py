"""The recorded run in ``data/``, and its split into two halves.

Content, source and licence: ``data/NOTICE`` and ``data/LICENSE``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from knapsack_rl.offline.environments import Trace

Split = Literal["development", "report", "all"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPLIT_SEED = 20260


def load_trace(split: Split = "all") -> Trace:
    """A GRPO run of a 1.5B model: 590 prompts, 46 to 57 visits each, 8 rollouts a visit.

    Args:
        split: ``"development"`` is the half on which anything may be chosen, ``"report"`` the other half, for figures
            that nothing was chosen on, ``"all"`` both.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    with (Path(__file__).parent / "data" / "qwen15b_grpo.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        visits, successes = arrays["visits"].astype(np.int64), arrays["successes"].astype(np.int64)
        rollouts = int(arrays["rollouts"])
    prompt = np.repeat(np.arange(visits.size), visits)
    trace = Trace(prompt, successes, np.full(prompt.size, rollouts))
    if split == "all":
        return trace
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(trace))
    half = len(trace) // 2
    return trace.take(np.sort(shuffled[:half] if split == "development" else shuffled[half:]))
