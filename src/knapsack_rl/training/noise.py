"""What libraries print that a user of ``knapsack-rl train`` need not see, turned off by their own switches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
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
