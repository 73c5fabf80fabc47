"""The trainer that generates in rounds, and replay: rows, advantages, gradients, account of what was generated."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import tiny
from knapsack_rl.allocation.policies import Allocation
from knapsack_rl.training.rivals import Oversample, Sequential
from knapsack_rl.trl import KnapsackGRPOTrainer
from knapsack_rl.trl.batches import concatenate, select
from knapsack_rl.trl.replay import Success, SuccessBuffer, log_probs_now, mix_in
from knapsack_rl.trl.rounds import RoundsGRPOTrainer
from knapsack_rl.trl.step import Step

# -- Batches -----------------------------------------------------------------------------------------------------------


def test_outputs_of_several_rounds_are_joined_and_cut_down():
    first = {
        "prompt_ids": torch.tensor([[5, 6]]),
        "prompt_mask": torch.tensor([[1, 1]]),
        "completion_ids": torch.tensor([[7, 8, 9]]),
        "completion_mask": torch.tensor([[1, 1, 1]]),
        "advantages": torch.tensor([0.5]),
        "num_items_in_batch": torch.tensor(3),
    }
    second = {
        "prompt_ids": torch.tensor([[4], [3]]),
        "prompt_mask": torch.tensor([[1], [1]]),
        "completion_ids": torch.tensor([[7, 1], [8, 0]]),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "advantages": torch.tensor([0.1, 0.2]),
        "num_items_in_batch": torch.tensor(3),
    }
    merged = concatenate([first, second], pad_id=0)
    assert merged["prompt_ids"].tolist() == [[5, 6], [0, 4], [0, 3]]
    assert merged["prompt_mask"].tolist() == [[1, 1], [0, 1], [0, 1]]
    assert merged["completion_ids"].tolist() == [[7, 8, 9], [7, 1, 0], [8, 0, 0]]
    assert merged["num_items_in_batch"] == 6
    chosen = select(merged, np.array([2, 0]))
    assert chosen["completion_ids"].tolist() == [[8, 0, 0], [7, 8, 9]]
    assert chosen["advantages"].tolist() == pytest.approx([0.2, 0.5])
    assert chosen["num_items_in_batch"] == 4
    with pytest.raises(ValueError, match="cannot join 'pixel_values'"):
        concatenate([{"pixel_values": torch.zeros(1, 3, 2, 2)}], pad_id=0)


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


def test_a_step_in_rounds_trains_on_what_the_rule_keeps(tmp_path):
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


# -- Replay ------------------------------------------------------------------------------------------------------------


def test_what_the_buffer_does_with_a_visit():
    buffer, stored = SuccessBuffer(2), Success(np.array([7, 1]), np.array([-1.0, -2.0]), 1.0)
    assert buffer.review("a", 1, 8, 0.05) == "store"
    assert buffer.review("a", 1, 8, np.nan) == "store"  # nothing known: the visit's own rate
    assert buffer.review("a", 2, 8, np.nan) == ""
    assert buffer.review("a", 0, 8, 0.01) == ""  # nothing stored
    buffer.entries["a"] = stored
    assert buffer.review("a", 0, 0, 0.01) == ""  # nothing scored
    assert buffer.review("a", 0, 8, 0.01) == "use"
    assert buffer.use("a") is stored
    assert "a" in buffer.entries
    buffer.use("a")
    assert "a" not in buffer.entries  # used twice
    buffer.entries["a"] = stored
    assert buffer.review("a", 3, 8, 0.4) == ""
    assert "a" not in buffer.entries  # no longer rare
    with pytest.raises(ValueError, match="max_uses must be at least 1, got 0"):
        SuccessBuffer(0)


def test_the_buffer_survives_a_file(tmp_path):
    buffer = SuccessBuffer(3)
    buffer.save(tmp_path / "empty.npz")
    buffer.load(tmp_path / "empty.npz")
    assert buffer.entries == {}
    buffer.entries = {
        "a": Success(np.array([7, 1]), np.array([-1.0, -2.0]), 1.0, 2),
        4: Success(np.array([3, 4, 1]), np.array([-0.5, -0.25, -3.0]), 0.5),
    }
    buffer.save(tmp_path / "replay.npz")
    again = SuccessBuffer(3)
    again.load(tmp_path / "replay.npz")
    assert list(again.entries) == ["a", 4]
    for prompt, entry in buffer.entries.items():
        found = again.entries[prompt]
        assert found.tokens.tolist() == entry.tokens.tolist()
        assert found.log_probs.tolist() == entry.log_probs.tolist()
        assert (found.reward, found.uses) == (entry.reward, entry.uses)


EPSILON_LOW, EPSILON_HIGH = 0.2, 0.28


def test_the_gradient_of_a_replayed_success_is_that_of_the_clipped_importance_weighted_loss(tmp_path):
    """Against plain torch in float64: no code of TRL or of the trainer."""
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, tiny.has_digit_five, loss_type="dapo", epsilon=EPSILON_LOW,
                   epsilon_high=EPSILON_HIGH)  # fmt: skip
    trainer.model.double()
    prompt_ids = torch.tensor([[0, 5, 12], [0, 5, 12], [4, 5, 12], [4, 5, 12]])
    prompt_mask = (prompt_ids != 0).long()
    completion_ids = torch.tensor([[3, 4, 1, 0], [6, 1, 0, 0], [2, 2, 2, 1], [7, 7, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    output = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids.clone(),
        "completion_mask": mask.clone(),
        "advantages": torch.zeros(4, dtype=torch.float64),
        "num_items_in_batch": mask.sum(),
    }
    group_R, rewards = np.array([0, 0, 1, 1]), np.array([0.0, 0.0, 1.0, 0.0])
    buffer = SuccessBuffer(5)
    stored = torch.tensor([9, 7, 8, 2, 1])
    with torch.no_grad():
        now = reference_log_probs(trainer.model, prompt_ids[:1], prompt_mask[:1], stored[None])[0]
    # Ratios 1.5 (clipped), 1.1, 0.6 (below the range, yet not clipped: the advantage is positive), 1.28+, 1.
    shift = torch.log(torch.tensor([1.5, 1.1, 0.6, 1.27, 1.0], dtype=torch.float64))
    buffer.entries["first"] = Success(stored.numpy(), (now - shift).numpy(), 1.0)
    allocation = Allocation(np.array([2, 2]), 0.0, success_rates=np.array([0.02, 0.05]))
    total, figures = mix_in(
        buffer,
        trainer,
        Step(["first", "second"], allocation, group_R, ragged=False, seconds=0.0),
        rewards,
        rewards,
        output,
    )
    assert figures == {"replay/stored": 2.0, "replay/mixed_in": 1.0}
    assert total.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert rewards.tolist() == [0.0, 0.0, 1.0, 0.0]  # what was sampled is left as it is
    assert output["completion_ids"][0].tolist() == stored.tolist()
    assert output["num_items_in_batch"] == mask.sum() - 3 + 5
    # The success of the second prompt was stored with its log-probabilities of now.
    kept = buffer.entries["second"]
    assert kept.tokens.tolist() == [2, 2, 2, 1]
    with torch.no_grad():
        expected = reference_log_probs(trainer.model, prompt_ids[2:3], prompt_mask[2:3], completion_ids[2:3])[0]
    assert kept.log_probs == pytest.approx(expected.numpy(), abs=1e-6)  # TRL's are in single precision

    output["advantages"] = torch.tensor(
        tiny.reference_advantages(group_R.tolist(), [total.tolist()]), dtype=torch.float64
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, output).backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(4):
        size = int(output["completion_mask"][row].sum())
        ids = output["completion_ids"][row, :size]
        here = slice(row, row + 1)
        log_probs = reference_log_probs(trainer.model, prompt_ids[here], prompt_mask[here], ids[None])[0]
        old = (now - shift) if row == 0 else log_probs.detach()
        advantage = output["advantages"][row]
        for token in range(size):
            ratio = torch.exp(log_probs[token] - old[token])
            clipped = torch.clamp(ratio, 1 - EPSILON_LOW, 1 + EPSILON_HIGH)
            loss = loss - torch.minimum(ratio * advantage, clipped * advantage)
        tokens += size
    (loss / tokens).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in trainer.model.parameters())
    assert largest > 1e-3
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest), name


def reference_log_probs(model, prompt_ids, prompt_mask, completion):
    """(1, T) log-probabilities of the completion's tokens, by one unpadded forward pass."""
    prompt = prompt_ids[:, prompt_mask[0] == 1]
    logits = model(input_ids=torch.cat([prompt, completion], dim=1)).logits[:, prompt.shape[1] - 1 : -1].double()
    return torch.log_softmax(logits, dim=-1).gather(2, completion[:, :, None])[:, :, 0]


def test_training_with_replay_mixes_in_and_resumes(tmp_path):
    """A reward that only ever pays at a prompt's first visit: everything stored must come from there."""
    seen = set()

    def first_time(completions, prompts, **_):
        fresh = {prompt for prompt in prompts if prompt not in seen}
        marked = {prompt: next(k for k, p in enumerate(prompts) if p == prompt) for prompt in fresh}
        seen.update(fresh)
        return [float(marked.get(prompt) == k) for k, prompt in enumerate(prompts)]

    trainer = tiny.trainer(
        KnapsackGRPOTrainer,
        tmp_path,
        first_time,
        data=tiny.dataset(4),
        allocation="uniform",
        estimator="window",
        replay=2,
        max_steps=4,
        num_generations=8,
        per_device_train_batch_size=32,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    mixed = [row["replay/mixed_in"] for row in trainer.state.log_history if "replay/mixed_in" in row]
    assert mixed == [0, 4, 4, 0]  # each stored success is used twice
    assert sum(trainer.allocator.tracker.records().successes) <= 4 + 1e-9  # what was replayed is not observed
    buffer = SuccessBuffer(2)
    buffer.load(tmp_path / "checkpoint-2" / "replay.npz")
    assert sorted(entry.uses for entry in buffer.entries.values()) == [1] * 4


def test_the_log_probabilities_of_now_agree_with_a_plain_forward_pass(tmp_path):
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, tiny.has_digit_five)
    batch = {
        "prompt_ids": torch.tensor([[0, 5], [4, 5]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[3, 1], [6, 7]]),
        "completion_mask": torch.ones(2, 2, dtype=torch.long),
    }
    found = log_probs_now(trainer, batch)
    assert not found.requires_grad
    for row in range(2):
        expected = reference_log_probs(
            trainer.model, batch["prompt_ids"][row : row + 1], batch["prompt_mask"][row : row + 1],
            batch["completion_ids"][row : row + 1],
        )  # fmt: skip
        assert torch.allclose(found[row].double(), expected[0], atol=1e-5)
