"""The TRL trainer that generates in rounds, see :mod:`experiments.rounds`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from experiments.rounds import Rounds, play
from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.groups import GroupOutcomes
from knapsack_rl.ids import PromptId, numbered
from knapsack_rl.plan import Plan
from knapsack_rl.trl.identity import Identity, prompt_key
from knapsack_rl.trl.step import Scored, Step
from knapsack_rl.trl.trainer import KnapsackGRPOTrainer
from knapsack_rl.trl.two_rounds import join

ROUNDS_FILE = "rounds.json"


class RoundsGRPOTrainer(KnapsackGRPOTrainer):
    """The trainer with a rule in place of the allocation; the allocator watches.

    Args:
        *args: as ``KnapsackGRPOTrainer``.
        rounds: the rule.
        **kwargs: as ``KnapsackGRPOTrainer``.

    Raises:
        ValueError: the run has several processes, or several updates share a generation: the number of rows varies.
    """

    def __init__(self, *args: Any, rounds: Rounds, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        arguments: Any = self.args
        if self.accelerator.num_processes > 1 or arguments.steps_per_generation > 1:
            raise ValueError(
                "generation in rounds needs one process and steps_per_generation=1, got "
                f"{self.accelerator.num_processes} processes and {arguments.steps_per_generation}"
            )
        self.rounds = rounds
        column = self._setting("prompt_id_column")
        rows: Any = self.train_dataset
        self._row_of = {prompt_key(row, column): row for row in rows}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._training:
            return super()._generate_and_score_completions(inputs)
        started, generating = time.perf_counter(), 0.0
        column = self._setting("prompt_id_column")
        blocks = Identity(column).blocks(inputs, self._mean)
        drawn = [prompt_key(inputs[block.start], column) for block in blocks]
        parts: list[dict[str, Any]] = []
        scores: list[Scored] = []

        def generate(ids: list[PromptId], group_R: IntArray, groups: int) -> GroupOutcomes:
            nonlocal generating
            before = time.perf_counter()
            output, scored = self._one_round([dict(self._row_of[prompt]) for prompt in ids])
            generating += time.perf_counter() - before
            parts.append(output)
            scores.append(scored)
            return self.allocator.outcomes_of(group_R, self._outcome(scored), groups)

        ids = play(self.rounds, drawn, generate)
        merged = join(parts, self._tokenizer.pad_token_id)
        self._scored = Scored.joined(scores)
        prompts, group_R = numbered(ids)
        allocation = self.session.adopt(prompts, np.bincount(group_R))
        outcomes = self.allocator.outcomes_of(group_R, self._outcome(self._scored), len(prompts))
        seconds = time.perf_counter() - started - generating
        self._finish_step(Step(Plan(prompts, allocation, seconds), group_R, ragged=True), merged)
        return select(merged, self.rounds.keep(prompts, group_R, outcomes.success_R.astype(np.int64)))

    def _one_round(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], Scored]:
        """Generate and score one completion per row; TRL sees groups of one, its advantages are replaced later."""
        size, self.num_generations = self.num_generations, 1
        try:
            output = GRPOTrainer._generate_and_score_completions(self, rows)
        finally:
            self.num_generations = size
        return output, self._take_scored(len(rows))

    def save_progress(self, checkpoint: Path) -> None:
        """Write the rule's state beside the numbers of the trainer."""
        (checkpoint / ROUNDS_FILE).write_text(json.dumps(self.rounds.state_dict()), encoding="utf-8")
        super().save_progress(checkpoint)

    def restore_progress(self, checkpoint: Path) -> None:
        """Restore the rule too.

        Raises:
            FileNotFoundError: the checkpoint is not one of this trainer.
        """
        super().restore_progress(checkpoint)
        self.rounds.load_state_dict(json.loads((checkpoint / ROUNDS_FILE).read_text(encoding="utf-8")))


def select(batch: dict[str, Any], rows: IntArray) -> dict[str, Any]:
    """The given rows of a batch, with the number of tokens that the loss divides by."""
    index = torch.as_tensor(rows, device=batch["completion_ids"].device)
    kept = {name: value if name == "num_items_in_batch" else value[index] for name, value in batch.items()}
    total = kept["completion_mask"].sum()
    kept["num_items_in_batch"] = total.to(batch["num_items_in_batch"].dtype)
    return kept
