"""Replay: the buffer of rare successes, and the gradient of a success that is mixed in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from knapsack_rl.allocation.policies import Allocation
from knapsack_rl.groups import outcomes_by_position
from knapsack_rl.plan import Plan
from knapsack_rl.trl import KnapsackGRPOTrainer
from knapsack_rl.trl.replay import Success, SuccessBuffer, log_probs_now, mix_in
from knapsack_rl.trl.step import Step


def success(tokens, log_probs, reward=1.0, uses=0, prompt=(), **columns):
    columns = {"old_per_token_logps": log_probs} | columns
    return Success(
        np.asarray(tokens), np.asarray(prompt, np.int64), {n: np.asarray(c) for n, c in columns.items()}, reward, uses
    )


def test_a_visit_stores_uses_or_forgets_a_success():
    buffer, stored = SuccessBuffer(2), success([7, 1], [-1.0, -2.0])
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
        "a": success([7, 1], [-1.0, -2.0], 1.0, 2, [5, 6, 7], importance_sampling_ratio=[0.5], tool_mask=[1.0, 0.0]),
        4: success([3, 4, 1], [-0.5, -0.25, -3.0], 0.5, ref_per_token_logps=[-1.0, -2.0, -4.0]),
    }
    buffer.save(tmp_path / "replay.npz")
    again = SuccessBuffer(3)
    again.load(tmp_path / "replay.npz")
    assert list(again.entries) == ["a", 4]
    for prompt, entry in buffer.entries.items():
        found = again.entries[prompt]
        assert found.tokens.tolist() == entry.tokens.tolist()
        assert found.prompt.tolist() == entry.prompt.tolist()
        assert {n: c.tolist() for n, c in found.columns.items()} == {n: c.tolist() for n, c in entry.columns.items()}
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
    buffer.entries["first"] = success(stored, now - shift, prompt=[5, 12])
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
    assert kept.columns["old_per_token_logps"] == pytest.approx(
        expected.numpy(), abs=1e-6
    )  # TRL's are in single precision

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


class Keeping(KnapsackGRPOTrainer):
    """Keeps each batch as it is trained on."""

    def __init__(self, *args, **kwargs):
        self.kept = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.kept.append({name: value.clone() for name, value in output.items()})
        return output


REPLAYING = {
    "allocation": "uniform",
    "estimator": "window",
    "replay": 2,
    "num_generations": 8,
    "per_device_train_batch_size": 32,
}
"""Settings of runs that see all of four prompts at each step, and replay their successes twice."""


def paid_at_the_first_visit(low, high):
    """A reward that only ever pays at a prompt's first visit, for the first of its completions."""
    seen = set()

    def first_time(completions, prompts, **_):
        fresh = {prompt for prompt in prompts if prompt not in seen}
        marked = {prompt: next(k for k, p in enumerate(prompts) if p == prompt) for prompt in fresh}
        seen.update(fresh)
        return [high if marked.get(prompt) == k else low for k, prompt in enumerate(prompts)]

    return first_time


def test_training_with_replay_mixes_in_and_resumes(tmp_path):
    """Everything stored must come from the first visits."""
    trainer = tiny.trainer(
        KnapsackGRPOTrainer,
        tmp_path,
        paid_at_the_first_visit(0.0, 1.0),
        data=tiny.dataset(4),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        **REPLAYING,
    )
    trainer.train()
    mixed = [row["replay/mixed_in"] for row in trainer.state.log_history if "replay/mixed_in" in row]
    assert mixed == [0, 4, 4, 0]  # each stored success is used twice
    assert sum(trainer.allocator.tracker.records().successes) <= 4 + 1e-9  # what was replayed is not observed
    buffer = SuccessBuffer(2)
    buffer.load(tmp_path / "checkpoint-2" / "replay.npz")
    assert sorted(entry.uses for entry in buffer.entries.values()) == [1] * 4


def test_a_replayed_success_is_an_outcome_among_outcomes_with_advantages_over_the_mean(tmp_path):
    """Rewards of -3 and 5: one stored success beside seven failures has the advantage (1 - 1/8) / (1/8)."""
    trainer = tiny.trainer(
        Keeping,
        tmp_path,
        paid_at_the_first_visit(-3.0, 5.0),
        data=tiny.dataset(4),
        advantage="group-mean",
        max_steps=4,
        **REPLAYING,
    )
    trainer.train()
    advantages = [sorted(batch["advantages"].tolist()) for batch in trainer.kept]
    one_in_eight = [-1.0] * 28 + [7.0] * 4
    assert advantages[:3] == [pytest.approx(one_in_eight)] * 3  # sampled, then replayed twice
    assert advantages[3] == [0.0] * 32  # nothing is left to replay


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


# -- what belongs to a success moves with it --------------------------------------------------------------------------

PROMPT = [4, 5, 12]


def batch_of(completions, *, padding=0, **columns):
    """TRL's batch for completions of one prompt, padded as TRL pads."""
    width = max(map(len, completions))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
    prompt = torch.tensor([[0] * padding + PROMPT] * len(completions))
    tools = columns.get("tool_mask", torch.ones_like(mask))
    return {
        "prompt_ids": prompt,
        "prompt_mask": (prompt != 0).long(),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.zeros(len(completions), dtype=torch.float64),
        "num_items_in_batch": (mask * tools).sum(),
    } | columns


def visit(trainer, buffer, output, rewards, prompts=("only",), group_R=None):
    """One step of the given prompts, all of them rarely solved; returns training rewards and figures."""
    rewards = np.array(rewards)
    group_R = np.zeros(rewards.size, np.int64) if group_R is None else np.array(group_R)
    allocation = Allocation(np.bincount(group_R), 0.0, success_rates=np.full(len(prompts), 0.02))
    step = Step(Plan(list(prompts), allocation), group_R, ragged=False)
    return mix_in(buffer, trainer, step, outcomes_by_position(group_R, rewards, len(prompts)), rewards, output)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_with_kl_tools_and_a_correction_for_vllm(tmp_path, level):
    """All that TRL's batch holds of a success comes from its own batch, and the loss equals one in plain torch."""
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, tiny.has_digit_five, loss_type="dapo", epsilon=EPSILON_LOW,
                   epsilon_high=EPSILON_HIGH, use_bias_correction_kl=False)  # fmt: skip
    trainer.model.double()
    reference = tiny.model(seed=1).double()
    rng = np.random.default_rng(5)
    prompt, ones = torch.tensor([PROMPT]), torch.ones(1, 3, dtype=torch.long)

    def numbers(model, completion):
        with torch.no_grad():
            return reference_log_probs(model, prompt, ones, torch.tensor([completion]))[0].tolist()

    def row_of(completion, tools):
        near = numbers(trainer.model, completion)
        return {
            "completion": completion,
            "old_per_token_logps": [x + y for x, y in zip(near, rng.normal(0, 0.2, len(near)), strict=True)],
            "ref_per_token_logps": numbers(reference, completion),
            "sampling_per_token_logps": [x - 0.1 for x in near],
            "importance_sampling_ratio": rng.uniform(0.5, 1.5, len(near) if level == "token" else 1).tolist(),
            "tool_mask": tools,
        }

    def batch(rows, padding):
        width = max(len(row["completion"]) for row in rows)
        fill = {"importance_sampling_ratio": 1.0, "tool_mask": 1}
        columns = {
            name: torch.tensor(
                [row[name] + [fill.get(name, 0.0)] * (width - len(row[name])) * (len(row[name]) > 1) for row in rows],
                dtype=torch.long if name == "tool_mask" else torch.float64,
            )
            for name in rows[0]
            if name != "completion"
        }
        return batch_of([row["completion"] for row in rows], padding=padding, **columns)

    solved = row_of([9, 7, 8, 2, 1], [1, 0, 0, 1, 1])
    others = [row_of([3, 4, 1], [1, 1, 1]), row_of([6, 6], [1, 0]), row_of([2, 1], [1, 1])]
    buffer = SuccessBuffer(5)
    visit(trainer, buffer, batch([others[0], solved], 1), [0.0, 1.0])
    output = batch(others, 0)
    total, figures = visit(trainer, buffer, output, [0.0, 0.0, 0.0])
    assert figures == {"replay/stored": 1.0, "replay/mixed_in": 1.0}
    assert total.tolist() == [1.0, 0.0, 0.0]
    rows = [solved, *others[1:]]
    assert output["num_items_in_batch"] == sum(sum(row["tool_mask"]) for row in rows)
    for k, row in enumerate(rows):
        for name in set(row) - {"completion"}:
            assert output[name][k, : len(row[name])].tolist() == pytest.approx(row[name]), (k, name)

    advantages = tiny.reference_advantages([0, 0, 0], [total.tolist()])
    output["advantages"] = torch.tensor(advantages, dtype=torch.float64)
    trainer.beta, trainer.use_vllm, trainer.vllm_importance_sampling_correction = 0.3, True, True
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, output).backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for row, advantage in zip(rows, advantages, strict=True):
        now = reference_log_probs(trainer.model, prompt, ones, torch.tensor([row["completion"]]))[0]
        for token, mine in enumerate(row["tool_mask"]):
            if not mine:
                continue
            ratio = torch.exp(now[token] - row["old_per_token_logps"][token])
            clipped = torch.clamp(ratio, 1 - EPSILON_LOW, 1 + EPSILON_HIGH)
            correction = row["importance_sampling_ratio"][token if level == "token" else 0]
            away = row["ref_per_token_logps"][token] - now[token]
            loss = loss - torch.minimum(ratio * advantage, clipped * advantage) * correction
            loss = loss + 0.3 * (torch.exp(away) - away - 1)
            tokens += 1
    (loss / tokens).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in trainer.model.parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest), name


def test_the_kl_term_of_a_replayed_success_is_its_own(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    trainer = tiny.trainer(
        Keeping,
        tmp_path / "run",
        paid_at_the_first_visit(0.0, 1.0),
        data=tiny.dataset(4),
        extra={"model": str(tmp_path / "model")},
        model_init_kwargs={"dtype": "float32"},
        beta=0.1,
        **REPLAYING,
    )
    trainer.train()
    assert [row["replay/mixed_in"] for row in trainer.state.log_history if "replay/mixed_in" in row] == [0, 4, 4]
    stock = tiny.model()
    stock.eval()
    for batch in trainer.kept:
        for row in range(32):
            here, size = slice(row, row + 1), int(batch["completion_mask"][row].sum())
            with torch.no_grad():
                expected = reference_log_probs(
                    stock, batch["prompt_ids"][here], batch["prompt_mask"][here], batch["completion_ids"][here, :size]
                )[0]
            assert torch.allclose(batch["ref_per_token_logps"][row, :size].double(), expected, atol=1e-4)


def test_a_batch_with_tensors_that_cannot_move_is_left_alone(tmp_path, caplog):
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path)
    buffer = SuccessBuffer(5)
    buffer.entries["only"] = success([9, 1], [-1.0, -2.0], prompt=PROMPT)
    for _ in range(2):
        output = batch_of([[3, 1], [4, 1]], pixel_values=torch.zeros(2, 3), num_images=[1, 1])
        before = {name: value.clone() if torch.is_tensor(value) else value for name, value in output.items()}
        total, figures = visit(trainer, buffer, output, [0.0, 0.0])
        assert total.tolist() == [0.0, 0.0]
        assert figures == {"replay/stored": 1.0, "replay/mixed_in": 0.0}
        assert output.keys() == before.keys()
        assert all(torch.equal(output[n], v) if torch.is_tensor(v) else output[n] == v for n, v in before.items())
    warnings = [record.message for record in caplog.records if "replay does nothing" in record.message]
    assert len(warnings) == 1
    assert "num_images, pixel_values" in warnings[0]


def test_a_success_only_replaces_a_row_like_its_own(tmp_path):
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path)
    own = success([9, 1], [-1.0, -2.0], prompt=PROMPT)
    others = {
        "an environment began otherwise": success([9, 1], [-1.0, -2.0], prompt=[4, 5, 11]),
        "stored without a KL term": own,
        "stored with a correction": success([9, 1], [-1.0, -2.0], prompt=PROMPT, importance_sampling_ratio=[1.0]),
    }
    for case, stored in others.items():
        buffer = SuccessBuffer(5)
        buffer.entries["only"] = stored
        columns = {"ref_per_token_logps": torch.zeros(2, 2)} if stored is own else {}
        _, figures = visit(trainer, buffer, batch_of([[3, 1], [4, 1]], **columns), [0.0, 0.0])
        assert (figures["replay/mixed_in"], stored.uses) == (0.0, 0), case
    buffer = SuccessBuffer(5)
    buffer.entries["only"] = own
    output = batch_of([[3, 1], [4, 1]])
    assert visit(trainer, buffer, output, [np.nan, 0.0])[0].tolist() == [1.0, 0.0]  # the scored failure remains
    assert output["completion_ids"].tolist() == [[9, 1], [4, 1]]
    for rewards in ([np.nan, np.nan], [0.0, np.nan], [0.0]):  # at most the one that it replaces has a reward
        output = batch_of([[3, 1], [4, 1]][: len(rewards)])
        assert visit(trainer, buffer, output, rewards)[1]["replay/mixed_in"] == (rewards == [0.0, np.nan]), rewards
    # A reward below that of the failures would have a negative advantage, which the loss does not clip.
    buffer.entries["only"] = success([9, 1], [-1.0, -2.0], -0.2, prompt=PROMPT)
    for rewards, used in (([-0.1, -0.1], 0.0), ([-0.1, -0.3], 1.0)):
        assert visit(trainer, buffer, batch_of([[3, 1], [4, 1]]), rewards)[1]["replay/mixed_in"] == used


def test_a_success_without_tokens_to_train_on_is_not_stored(tmp_path):
    """With ``mask_truncated_completions`` TRL blanks the rows of truncated completions."""
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path)
    output = batch_of([[3, 2], [9, 2], [7, 1], [8, 1]])
    output["completion_mask"][1] = 0
    buffer = SuccessBuffer(5)
    visit(trainer, buffer, output, [0.0, 1.0, 1.0, 0.0])
    assert buffer.entries["only"].tokens.tolist() == [7, 1]
    blank = SuccessBuffer(5)
    output["completion_mask"][:] = 0
    visit(trainer, blank, output, [0.0, 1.0, 1.0, 0.0])
    assert blank.entries == {}


def test_settings_that_replay_cannot_work_with_are_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    images = tiny.dataset(4).add_column("image", [None] * 4)
    cases = {
        "set sync_ref_model=False or replay=0": {
            "beta": 0.1,
            "sync_ref_model": True,
            "model_init_kwargs": {"dtype": "float32"},
            "extra": {"model": str(tmp_path / "model")},
        },
        "prompts of text, got the column 'image'; set replay=0": {"data": images},
        "needs one process and multi_objective_aggregation": {"multi_objective_aggregation": "normalize_then_sum"},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            tiny.trainer(KnapsackGRPOTrainer, tmp_path / "run", replay=2, **settings)


def test_replay_can_be_switched_on_at_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    tiny.trainer(KnapsackGRPOTrainer, tmp_path, **settings).train()
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, replay=2, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
