"""Advantages over the posterior mean in the TRL trainer."""

import copy
from typing import Any

import numpy as np
import pytest

import knapsack_rl as kr
import tiny
from knapsack_rl.ids import numbered
from test_trl import WatchedTrainer, ragged_trainer, trainer_of

POSTERIOR = {"advantage": "posterior-mean", "rewards": (tiny.has_digit_five,)}


def informed(**settings: Any) -> kr.KnapsackAllocator:
    """An allocator with a posterior that knows all prompts."""
    return tiny.informed_allocator(24, "bayes-filter", success=0.5, value="likelihood-0.5", **settings)


def wanted_of(allocator: kr.KnapsackAllocator, batch: dict[str, Any], **settings: Any) -> np.ndarray:
    """Advantages of a batch by an allocator that has not seen it, which then does."""
    ids, rewards = batch["prompt_id"], tiny.has_digit_five(batch["completions"])
    distinct, group_R = numbered(ids)
    groups = allocator.outcomes_of(group_R, np.array(rewards), len(distinct))
    expected = groups.by_outcome(allocator.expected_outcomes(distinct, groups))
    allocator.allocate(distinct, 4 * len(distinct))
    allocator.observe(ids, rewards, batch["lengths"])
    return kr.group_advantages(ids, rewards, advantage="posterior-mean", baseline=expected, **settings)


@pytest.mark.trl_range
@pytest.mark.parametrize("settings", [{}, {"weighting": "rollout"}, {"min_rollouts": 1}])
def test_advantages_go_by_what_was_known_before_the_step(settings: dict[str, Any], tmp_path: Any) -> None:
    least = settings.get("min_rollouts", 2)
    twin = informed(min_rollouts=least)
    trainer, batches = ragged_trainer(tmp_path, **POSTERIOR | settings, extra={"allocator": copy.deepcopy(twin)})
    trainer.train()
    assert len(batches) == 3
    alone = 0
    for seen, batch in zip(trainer.watched, batches, strict=True):
        wanted = wanted_of(twin, batch, weighting=settings.get("weighting", "auto"))
        np.testing.assert_allclose(seen["advantages"], wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(seen["logged"], wanted, rtol=0, atol=1e-6)
        assert np.abs(wanted).max() > 0.1
        sizes = {name: batch["prompt_id"].count(name) for name in batch["prompt_id"]}
        alone += sum(abs(wanted[row]) > 0 and sizes[name] == 1 for row, name in enumerate(batch["prompt_id"]))
    assert bool(alone) == (least == 1)


def test_without_a_history_the_rest_of_the_group_decides(tmp_path: Any, monkeypatch: Any) -> None:
    """Prompts that cannot be told apart have none; a failure to read it must not end the run."""

    def fails(*_: Any) -> None:
        raise ArithmeticError("broken")

    for case in ("no ids", "failure"):
        allocator = informed()
        settings: dict[str, Any] = POSTERIOR | {"extra": {"allocator": allocator}}
        if case == "no ids":
            settings["allocation"] = "uniform"
            settings["extra"] |= {"train_dataset": tiny.dataset(24, ids=False)}
        else:
            monkeypatch.setattr(allocator.estimator, "means_without_one", fails)
        trainer, batches = ragged_trainer(tmp_path / case, **settings)
        trainer.train()
        for seen, batch in zip(trainer.watched, batches, strict=True):
            five = [float("5" in completion) for completion in batch["completions"]]
            baseline = []
            for row, prompt in enumerate(batch["prompts"]):
                rest = [five[k] for k, other in enumerate(batch["prompts"]) if other == prompt and k != row]
                baseline.append((sum(rest) + 1) / (len(rest) + 2))
            settings = {"advantage": "posterior-mean", "baseline": baseline}
            wanted = kr.group_advantages(batch["prompts"], five, **settings)
            np.testing.assert_allclose(seen["advantages"], wanted, rtol=0, atol=1e-6)
        if case == "failure":
            assert trainer.allocator.failures["baseline"] == 3


def test_estimators_without_a_posterior_are_refused(tmp_path: Any) -> None:
    for settings in (
        {"estimator": "beta"},
        {"allocation": "paper"},
        {"extra": {"allocator": tiny.informed_allocator()}},
    ):
        with pytest.raises(ValueError, match=r"advantage='posterior-mean' needs .* got \w*Estimator"):
            trainer_of(WatchedTrainer, tmp_path, advantage="posterior-mean", **settings)
