"""The allocator's state in verl's checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from knapsack_rl.runs.files import STATE_FILE
from knapsack_rl.verl import session
from knapsack_rl.verl.launch import pick

logger = logging.getLogger(__name__)

STEP_FOLDER = "global_step_"


class KnapsackCheckpoint(CheckpointCallback):
    """Writes ``knapsack_allocator.npz`` into each ``global_step_N``, after verl has written everything else.

    Set ``trainer.checkpoint_callback_class`` to it. To use another callback as well, derive it from this class and call
    ``super().on_save(...)``.
    """

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        """Save the state of the allocator."""
        run = session.current()
        run.survive("saving", lambda: run.save(Path(checkpoint_dir)))


def state_to_resume(config: Any) -> Path | None:
    """Return the state of the checkpoint that verl resumes from, or ``None`` for a fresh start.

    For a checkpoint without a state (the run was killed in between, or trained without the plug-in) it is the newest
    older one, or ``None``, with a warning.

    Args:
        config: verl's configuration.
    """
    mode = pick(config, "trainer.resume_mode", "auto")
    folder = None
    if mode == "auto":
        # As verl does, relative to where it runs.
        folder = find_latest_ckpt_path(str(Path(pick(config, "trainer.default_local_dir", "checkpoints")).absolute()))
    elif mode == "resume_path":
        folder = pick(config, "trainer.resume_from_path")
    if folder is None:
        return None
    checkpoint = Path(folder).absolute()
    state = checkpoint / STATE_FILE
    if state.exists():
        return state
    older = [path for path in checkpoint.parent.glob(f"{STEP_FOLDER}*/{STATE_FILE}") if _step(path) < _step(state)]
    newest = max(older, key=_step, default=None)
    logger.warning("%s has no %s; the allocator starts from %s", checkpoint, STATE_FILE, newest or "nothing known")
    return newest


def _step(state: Path) -> int:
    number = state.parent.name.removeprefix(STEP_FOLDER)
    return int(number) if number.isdigit() else -1
