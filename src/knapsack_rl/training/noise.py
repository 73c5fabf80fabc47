"""What libraries print that a user of ``knapsack-rl train`` need not see, turned off by their own switches."""

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
"""TRL's and transformers' own code uses the old name; there is nothing that a user could change."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While the body runs: no progress bars of transformers and datasets, and not the warnings of :data:`RENAMED`.

    Errors, and all other warnings, come through; those of huggingface_hub once and not twice.
    """
    bars = transformers.utils.logging.is_progress_bar_enabled()
    mapping = not datasets.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    hub = logging.getLogger("huggingface_hub")
    propagated = hub.propagate
    hub.propagate = False  # it has a handler of its own
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
"""How transformers begins to tell that a checkpoint lacks weights."""


@contextmanager
def quiet_about_tied_weights(model: torch.nn.Module | None) -> Iterator[None]:
    """While the body runs: no warning that a checkpoint lacks weights that are others by another name.

    They are saved once, so nothing is missing; a warning that names any other weight comes through.
    """
    state = {} if model is None else model.state_dict()
    uses = Counter(weight.data_ptr() for weight in state.values())
    tied = {name for name, weight in state.items() if uses[weight.data_ptr()] > 1}

    def told(record: logging.LogRecord) -> bool:
        start, _, names = record.getMessage().partition(MISSING)
        return bool(start or not names or set(re.findall(r"'([^']+)'", names)) - tied)

    trainer = logging.getLogger("transformers.trainer")
    trainer.addFilter(told)
    try:
        yield
    finally:
        trainer.removeFilter(told)
