"""The rollouts, tokens and seconds that a run has spent so far: the costs by which policies are compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.runs.files import GENERATED_FILE


@dataclass
class Generated:
    """Totals of what a run has spent on training so far; rollouts and tokens over all processes.

    Attributes:
        rollouts: completions, including those that were not trained on.
        tokens: their tokens, without those of prompts, tools and environments.
        seconds: wall-clock time of the training steps, without the optimizer, evaluation and checkpoints.
    """

    rollouts: int = 0
    tokens: int = 0
    seconds: float = field(default=0.0, compare=False)

    def add(self, lengths: IntArray) -> None:
        """Count completions of these lengths (R,)."""
        self.rollouts += int(lengths.size)
        self.tokens += int(lengths.sum())

    def save(self, checkpoint: Path) -> None:
        """Write the numbers into a checkpoint."""
        (checkpoint / GENERATED_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> Generated:
        """Return the numbers of a checkpoint; zeros for one of the stock trainer."""
        path = checkpoint / GENERATED_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()
