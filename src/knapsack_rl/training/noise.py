"""Silence output of libraries that users of ``knapsack-rl train`` do not need, by the switches the libraries offer."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
import transformers

RENAMED = r"`(is_)?gradient_checkpointing` is deprecated"
"""TRL and transformers use the old name themselves; a user cannot change that."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide progress bars of transformers and datasets and the warnings of :data:`RENAMED` while the body runs.

    Errors and all other warnings are shown, those of huggingface_hub once instead of twice.
    """
    bars = transformers.utils.logging.is_progress_bar_enabled()
    mapping = not datasets.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    hub = logging.getLogger("huggingface_hub")
    propagated = hub.propagate
    hub.propagate = False  # it has its own handler
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
            yield
    finally:
        hub.propagate = propagated
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if mapping:
            datasets.enable_progress_bars()


MISSING = "There were missing keys in the checkpoint model loaded: "
"""Start of the warning of transformers that a checkpoint lacks weights."""


@contextmanager
def quiet_about_tied_weights(model: torch.nn.Module | None) -> Iterator[None]:
    """Suppress the warning that a checkpoint lacks weights which are aliases of saved ones, while the body runs.

    Tied weights are saved once, so nothing is missing. A warning that names any other weight is shown.
    """
    state = {} if model is None else model.state_dict()
    uses = Counter(weight.data_ptr() for weight in state.values())
    tied = {name for name, weight in state.items() if uses[weight.data_ptr()] > 1}

    def shown(record: logging.LogRecord) -> bool:
        start, _, names = record.getMessage().partition(MISSING)
        return bool(start or not names or set(re.findall(r"'([^']+)'", names)) - tied)

    trainer = logging.getLogger("transformers.trainer")
    trainer.addFilter(shown)
    try:
        yield
    finally:
        trainer.removeFilter(shown)
