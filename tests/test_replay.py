"""Replay: the buffer of rare successes, and the gradient of a success that is mixed in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from knapsack_rl.allocation.policies import Allocation
from knapsack_rl.groups import outcomes_by_position
from knapsack_rl.session import Plan
from knapsack_rl.trl import KnapsackGRPOTrainer
from knapsack_rl.trl.replay import Success, SuccessBuffer, log_probs_now, mix_in
from knapsack_rl.trl.step import Step


def test_a_visit_stores_uses_or_forgets_a_success():
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
        Step(Plan(["first", "second"], allocation), group_R, ragged=False),
        outcomes_by_position(group_R, rewards, 2),
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


def test_current_log_probabilities_agree_with_a_plain_forward_pass(tmp_path):
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
