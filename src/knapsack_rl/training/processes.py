"""Processes that train together, as set by their launcher (torchrun, accelerate) in the environment."""

from __future__ import annotations

import os


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process writes the run folder."""
    return int(os.environ.get("RANK", "0")) == 0
