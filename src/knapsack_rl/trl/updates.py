"""The part of the trainer between a scored generation and the optimizer: which rows are trained on, and timing."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather
from trl.trainer.grpo_trainer import GRPOTrainer

from knapsack_rl.trl.generated import Generated
from knapsack_rl.trl.skipping import Batch, Skipping, unknown_tensors

logger = logging.getLogger(__name__)

ALL_ROWS = "rows with advantage 0 are trained on as well: %s"


class Clock:
    """Adds up wall-clock seconds by part until they are taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the body to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)


class UpdateTrainer(GRPOTrainer):
    """``GRPOTrainer`` that can leave rows without a gradient out of its updates, and times the parts of a step.

    Attributes:
        skipping: how rows are left out, see :mod:`knapsack_rl.trl.skipping`; None trains on all rows, as TRL does.
        generated: what the run has cost so far; this class adds the seconds.
    """

    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.skipping: Skipping | None = None
        self.generated = Generated()
        self._regrouped: list[Batch] = []
        self._clock = Clock()
        super().__init__(*args, **kwargs)

    @property
    def _training(self) -> bool:
        return bool(self.model is not None and self.model.training)

    def _generate(self, prompts: Any) -> Any:
        with self._clock.part("generation"):
            return super()._generate(prompts)

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        with self._clock.part("scoring"):
            return super()._calculate_rewards(*args)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``GRPOTrainer.training_step``; adds the seconds of the parts of a step to the metrics."""
        with self._clock.part("step"):
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the update is complete
            seconds = self._clock.take()
            self.generated.seconds += seconds["step"]
            seconds["update"] = seconds.pop("step") - seconds.pop("batch")
            for name, number in seconds.items():
                self._metrics["train"][f"knapsack/{name}_seconds"].append(number)
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self._training:
            found: Batch = super()._prepare_inputs(generation_batch)
            return found
        with self._clock.part("batch"):
            batch: Batch = super()._prepare_inputs(generation_batch)
            if self.skipping is None:
                return batch
            if self._buffered_inputs is not self._regrouped:  # just generated
                self._regroup(self.skipping)
            return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def _regroup(self, skipping: Skipping) -> None:
        """Leave rows without a gradient out of the micro-batches of a generation."""
        batches: list[Batch] = self._buffered_inputs
        found, skipped = skipping.regroup(batches, self._most)
        if found is None:
            self.skipping = None
            names = ", ".join(unknown_tensors(batches[0])) or "images in another process"
            logger.warning(ALL_ROWS, f"TRL's batch has {names}, which may not have one entry per row")
            return
        self._buffered_inputs = self._regrouped = found
        self._metrics["train"]["knapsack/rows_skipped"].append(skipped)

    def _most(self, numbers: list[int]) -> list[int]:
        """Return the largest of each number over the processes."""
        everyone = gather(torch.tensor(numbers, device=self.accelerator.device))
        most: list[int] = everyone.reshape(-1, len(numbers)).amax(0).tolist()
        return most

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``GRPOTrainer.compute_loss``; the loss of an empty micro-batch is a constant."""
        if not inputs:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        return super().compute_loss(model, inputs, *args, **kwargs)
