"""Processes that train together, from what their launcher (torchrun, accelerate) tells them."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the run folder."""
    return int(os.environ.get("RANK", "0")) == 0
