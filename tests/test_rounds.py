"""The trainer that generates in rounds: rows, advantages, totals of generated rollouts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import tiny
from experiments.rules import Oversample, Sequential
from experiments.trl_rounds import RoundsGRPOTrainer, select

# -- Batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_cut_down_to_rows_and_their_tokens():
    batch = {
        "completion_ids": torch.tensor([[7, 8, 9], [7, 1, 0], [8, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
        "advantages": torch.tensor([0.5, 0.1, 0.2]),
        "num_items_in_batch": torch.tensor(6),
    }
    chosen = select(batch, np.array([2, 0]))
    assert chosen["completion_ids"].tolist() == [[8, 0, 0], [7, 8, 9]]
    assert chosen["advantages"].tolist() == pytest.approx([0.2, 0.5])
    assert chosen["num_items_in_batch"] == 4


# -- Rounds ------------------------------------------------------------------------------------------------------------


class Watched(RoundsGRPOTrainer):
    """Keeps what each step returned."""

    def __init__(self, *args, **kwargs):
        self.watched = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.watched.append({name: value.clone() for name, value in output.items()})
        return output


def test_a_step_in_rounds_trains_on_the_rollouts_that_the_rule_keeps(tmp_path):
    batches = []
    rule = Sequential(4, max_rounds=3)
    trainer = tiny.trainer(
        Watched, tmp_path, tiny.recording(tiny.has_digit_five, batches), extra={"rounds": rule}, max_steps=2
    )
    trainer.train()
    generated = sum(len(batch["rewards"]) for batch in batches)
    assert trainer.generated.rollouts == generated > 2 * 16
    assert trainer.generated.tokens == sum(sum(batch["lengths"]) for batch in batches)
    assert len(trainer.allocator.tracker) == 8  # all prompts of both steps
    decode = trainer.processing_class.batch_decode
    # The first step: all rounds up to the one that starts the second with four new prompts.
    first = set(batches[0]["prompts"])
    steps = [[], []]
    for batch in batches:
        steps[int(not set(batch["prompts"]) <= first)].append(batch)
    for rounds, output in zip(steps, trainer.watched, strict=True):
        rewards = {}
        for batch in rounds:
            for prompt, completion, reward in zip(
                batch["prompts"], batch["completions"], batch["rewards"], strict=True
            ):
                rewards.setdefault(prompt, []).append((completion, reward))
        everything = [(prompt, reward) for prompt, given in rewards.items() for _, reward in given]
        numbers = {prompt: place for place, prompt in enumerate(rewards)}
        expected = tiny.reference_advantages(
            [numbers[prompt] for prompt, _ in everything], [[reward for _, reward in everything]]
        )
        by_prompt = {}
        for (prompt, reward), advantage in zip(everything, expected, strict=True):
            by_prompt[prompt, reward] = advantage  # one value per prompt and reward
        prompts = decode(output["prompt_ids"], skip_special_tokens=True)
        completions = decode(output["completion_ids"], skip_special_tokens=True)
        assert Counter(prompts) == dict.fromkeys(rewards, 4)  # N rows of each group
        for prompt, completion, advantage in zip(prompts, completions, output["advantages"].tolist(), strict=True):
            reward = float("5" in completion)
            assert (completion, reward) in rewards[prompt]
            assert advantage == pytest.approx(by_prompt[prompt, reward], abs=1e-6)
        assert output["num_items_in_batch"] == output["completion_mask"].sum()


def test_a_run_in_rounds_resumes_as_if_it_had_not_stopped(tmp_path):
    def run(folder, steps, resume=None):
        rule = Oversample([f"p{k}" for k in range(24)], 4, 4, seed=5, max_rounds=3)
        trainer = tiny.trainer(RoundsGRPOTrainer, folder, tiny.has_digit_five, extra={"rounds": rule}, max_steps=steps,
                       lr_scheduler_type="constant", save_strategy="steps", save_steps=2)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight", 4)
    run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", 4, resume=str(tmp_path / "stopped" / "checkpoint-2"))
    assert resumed.generated == straight.generated
    assert resumed.rounds.state_dict() == straight.rounds.state_dict()
    assert tiny.fingerprint(resumed.model) == tiny.fingerprint(straight.model)


def test_rounds_refuse_several_updates_of_a_generation(tmp_path):
    with pytest.raises(ValueError, match="needs one process and steps_per_generation=1, got 1 processes and 2"):
        tiny.trainer(
            RoundsGRPOTrainer, tmp_path, tiny.has_digit_five, extra={"rounds": Sequential(4)}, steps_per_generation=2
        )
