import functools
import importlib.util
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

import knapsack_rl.trl
import tiny
from cases import message_of
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.estimation.named import ESTIMATORS, BetaEstimator
from knapsack_rl.groups import group_outcomes, outcomes_by_position
from knapsack_rl.state import read_state
from knapsack_rl.trl import (
    ALLOCATION_LOG,
    STATE_FILE,
    KnapsackGRPOConfig,
    KnapsackGRPOTrainer,
)
from knapsack_rl.trl.advantages import ragged_advantages
from knapsack_rl.trl.identity import prompt_key
from knapsack_rl.trl.internals import one_completion_per_row
from oracles import assert_same_state

TOLERANCE = 3e-7
UPDATES = {"generation_seconds", "scoring_seconds", "update_seconds", "rows_skipped"}


class WatchedTrainer(KnapsackGRPOTrainer):
    """Keeps what each generation batch returned and logged."""

    def __init__(self, *args, **kwargs):
        self.watched = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.watched.append(
                {
                    "advantages": output["advantages"].tolist(),
                    "logged": list(self._logs["advantages"])[-len(inputs) :],
                    "zero_std": self._metrics["train"]["frac_reward_zero_std"][-1],
                    "completions": self.processing_class.batch_decode(
                        output["completion_ids"], skip_special_tokens=True
                    ),
                    "prompts": self.processing_class.batch_decode(output["prompt_ids"], skip_special_tokens=True),
                }
            )
        return output


def trainer_of(kind, folder, *, rewards=(tiny.digit_sum,), data=None, **settings):
    """A trainer with a shaped reward and more prompts than it meets in a run."""
    return tiny.trainer(kind, folder, *rewards, data=tiny.dataset(96) if data is None else data, **settings)


def ragged_trainer(folder, *, rewards=(tiny.digit_sum,), prompts=24, extra=None, **changes):
    """A trainer whose every batch is ragged, and the record of what its first reward function saw."""
    batches = []
    recorded = [tiny.recording(rewards[0], batches), *rewards[1:]]
    settings = {"per_device_train_batch_size": 32} | changes
    trainer = trainer_of(
        WatchedTrainer,
        folder,
        rewards=recorded,
        data=tiny.dataset(prompts),
        extra={"allocator": tiny.informed_allocator(prompts)} | (extra or {}),
        **settings,
    )
    return trainer, batches


def allocation_log(folder):
    return [json.loads(line) for line in (Path(folder) / ALLOCATION_LOG).read_text().splitlines()]


def metric(trainer, name):
    """The logged values of one metric, over the steps that have it."""
    return [row[name] for row in trainer.state.log_history if name in row]


# -- uniform allocation is the stock trainer --------------------------------------------------------------------------

TWO_REWARDS = {"rewards": (tiny.digit_sum, tiny.length_reward), "reward_weights": [0.3, 1.7]}
GDPO_ONLY = {"multi_objective_aggregation": "normalize_then_sum"}
GDPO = TWO_REWARDS | GDPO_ONLY
# Several updates from one generation, in parts: where the losses differ.
OFF_POLICY = {
    "num_iterations": 2,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 8,
}

SAME_AS_STOCK = {
    "default": {},
    "grpo": OFF_POLICY | {"loss_type": "grpo"},
    "dr_grpo": OFF_POLICY | {"loss_type": "dr_grpo"},
    "dapo": OFF_POLICY | {"loss_type": "dapo"},
    "bnpo": OFF_POLICY | {"loss_type": "bnpo"},
    "cispo": OFF_POLICY | {"loss_type": "cispo"},
    "sapo": OFF_POLICY | {"loss_type": "sapo"},
    "luspo": OFF_POLICY | {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": OFF_POLICY | {"loss_type": "vespo"},
    "dr_grpo, scale none": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo, scale batch": {"loss_type": "dapo", "scale_rewards": "batch"},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "generate every step": {
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
    },
    "generate every 2 steps": {
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
    },
    "generate every 8 steps": {
        "steps_per_generation": 8,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 4,
    },
    "gdpo": GDPO,
    "none rewards": {"rewards": (tiny.sometimes_none,)},
    "two weighted rewards": TWO_REWARDS,
    "two rewards, one with none": {"rewards": (tiny.sometimes_none, tiny.length_reward)},
    "worker prefetch": {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
    "kl": {"beta": 0.1, "model_init_kwargs": {"dtype": "float32"}},
    "iterable dataset": {"iterable": True},
    "no id column": {"ids": False},
}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """The tiny model on disk: a reference model is loaded from a path."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run_case(tmp_path_factory, saved_model):
    @functools.cache
    def run(case, cls, **allocation):
        settings = dict(SAME_AS_STOCK[case])
        data = tiny.dataset(96, ids=settings.pop("ids", True))
        if settings.pop("iterable", False):
            data = data.to_iterable_dataset()
        extra = {"model": saved_model} if settings.get("beta") else {}
        trainer = trainer_of(cls, tmp_path_factory.mktemp("run"), data=data, extra=extra, **settings, **allocation)
        start = tiny.fingerprint(trainer.model)
        trainer.train()
        sizes = set(metric(trainer, "knapsack/budget_min") + metric(trainer, "knapsack/budget_max"))
        return start, tiny.fingerprint(trainer.model), sizes

    return run


@pytest.mark.trl_range
def test_equal_groups_train_bit_for_bit_as_the_stock_trainer(run_case):
    for case, allocation in product(SAME_AS_STOCK, ("uniform", "knapsack")):
        stock_start, stock_end, _ = run_case(case, GRPOTrainer)
        every = {} if allocation == "uniform" else tiny.AS_STOCK
        start, end, group_sizes = run_case(case, KnapsackGRPOTrainer, allocation=allocation, **every)
        assert start == stock_start, (case, allocation)
        assert end == stock_end, (case, allocation)
        assert end != start, (case, allocation, "nothing was learned, so equality shows nothing")
        # In the first epoch every prompt is equally unknown, so the knapsack itself divides evenly.
        assert group_sizes == {4.0}, (case, allocation)


def test_identity_cases_train_differently_from_one_another(run_case):
    ends = {case: run_case(case, GRPOTrainer)[1] for case in SAME_AS_STOCK}
    alike = {"worker prefetch", "no id column"}  # the default, read in another way
    assert {ends[case] for case in alike} == {ends["default"]}
    assert len({ends[case] for case in ends if case not in alike}) == len(ends) - len(alike)


def test_ragged_groups_train_differently_from_the_stock_trainer(tmp_path):
    ragged, _ = ragged_trainer(tmp_path)
    stock = trainer_of(GRPOTrainer, tmp_path, data=tiny.dataset(24), per_device_train_batch_size=32)
    ragged.train()
    stock.train()
    assert tiny.fingerprint(ragged.model) != tiny.fingerprint(stock.model)
    assert ragged.state.global_step == stock.state.global_step == 3


# -- ragged advantages ------------------------------------------------------------------------------------------------

RAGGED = {
    "group": {},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "weights": TWO_REWARDS,
    "none rewards": {"rewards": (tiny.sometimes_none,)},
    "none in one of two": {"rewards": (tiny.sometimes_none, tiny.length_reward), "reward_weights": [2.0, 0.1]},
    "gdpo": GDPO,
    "gdpo, none rewards": GDPO | {"rewards": (tiny.sometimes_none, tiny.length_reward)},
    "prompt weighting": {"weighting": "prompt"},
    "prompt weighting, batch": {"weighting": "prompt", "scale_rewards": "batch"},
    "prompt weighting, gdpo": GDPO | {"weighting": "prompt"},
    "over the mean": {"advantage": "group-mean", "rewards": (tiny.has_digit_five,)},
    "over the mean, none rewards": {"advantage": "group-mean", "rewards": (tiny.sometimes_none,)},
    "over the mean, per rollout": {
        "advantage": "group-mean",
        "weighting": "rollout",
        "rewards": (tiny.has_digit_five,),
    },
    "group-std": {"advantage": "group-std"},
    "several steps a generation": {
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 16,
    },
    "two iterations": {"num_iterations": 2, "max_steps": 6},
}


def reference_of(batch, settings):
    functions = settings.get("rewards", (tiny.digit_sum,))
    rewards = [function(completions=batch["completions"]) for function in functions]
    over_mean = settings.get("advantage") == "group-mean"
    return tiny.reference_advantages(
        batch["prompts"],
        rewards,
        weights=settings.get("reward_weights"),
        scale=settings.get("scale_rewards", "group"),
        gdpo="multi_objective_aggregation" in settings,
        weighting=settings.get("weighting", "prompt" if over_mean else "rollout"),
        over_mean=over_mean,
    )


@pytest.mark.trl_range
def test_every_ragged_advantage_equals_the_reference(tmp_path):
    for case, settings in RAGGED.items():
        trainer, batches = ragged_trainer(tmp_path / case, **settings)
        trainer.train()
        assert len(trainer.watched) == len(batches) == 3, case
        for seen, batch in zip(trainer.watched, batches, strict=True):
            counts = Counter(batch["prompts"])
            assert max(counts.values()) - min(counts.values()) >= 3, (case, "the batch is not ragged")
            assert seen["prompts"] == batch["prompts"], case
            assert seen["completions"] == batch["completions"], case
            expected = reference_of(batch, settings)
            assert max(map(abs, expected)) > 0.1, case
            np.testing.assert_allclose(seen["advantages"], expected, rtol=0, atol=TOLERANCE, err_msg=case)
            np.testing.assert_allclose(seen["logged"], expected, rtol=0, atol=TOLERANCE, err_msg=case)


def test_advantages_over_the_mean_are_those_of_outcomes_whatever_the_rewards(tmp_path):
    """Rewards of -3 and 5 with a bonus for length: the learned rule, or a threshold, gives the outcomes."""

    def scaled(completions, **_):
        return [8 * float("5" in completion) - 3 for completion in completions]

    for case, settings in {
        "learned": {"rewards": (scaled,)},
        "with a bonus": {"rewards": (scaled, tiny.length_reward), "outcome_reward": "scaled"},
        "threshold": {"rewards": (scaled,), "success_threshold": 1.5},
        "uniform": {"rewards": (scaled,), "allocation": "uniform"},
        "uniform without ids": {"rewards": (scaled,), "allocation": "uniform", "ids": False},
    }.items():
        extra = {"train_dataset": tiny.dataset(24, ids=False)} if not settings.pop("ids", True) else {}
        if "success_threshold" in settings or settings.get("allocation"):
            extra["allocator"] = tiny.informed_allocator(success=settings.pop("success_threshold", 1.5))
        trainer, batches = ragged_trainer(tmp_path / case, advantage="group-mean", extra=extra, **settings)
        trainer.train()
        for seen, batch in zip(trainer.watched, batches, strict=True):
            five = [float("5" in completion) for completion in batch["completions"]]
            expected = tiny.reference_advantages(batch["prompts"], [five], weighting="prompt", over_mean=True)
            assert max(map(abs, expected)) > 0.1, case
            np.testing.assert_allclose(seen["advantages"], expected, rtol=0, atol=1e-6, err_msg=case)
            np.testing.assert_allclose(seen["logged"], expected, rtol=0, atol=1e-6, err_msg=case)
            kinds = {}
            for prompt, outcome in zip(batch["prompts"], five, strict=True):
                kinds.setdefault(prompt, set()).add(outcome)
            alike = np.mean([len(kinds[prompt]) == 1 for prompt in batch["prompts"]])
            assert seen["zero_std"] == pytest.approx(alike), case


def test_group_std_and_equal_groups_train_as_the_stock_trainer(tmp_path):
    stock = trainer_of(GRPOTrainer, tmp_path / "stock")
    stock.train()
    for allocation in ("uniform", "knapsack"):
        every = {} if allocation == "uniform" else tiny.AS_STOCK
        settings = {"allocation": allocation, "advantage": "group-std"} | every
        named = trainer_of(KnapsackGRPOTrainer, tmp_path / allocation, **settings)
        named.train()
        assert tiny.fingerprint(named.model) == tiny.fingerprint(stock.model), allocation


def test_a_step_with_advantages_over_the_mean_has_the_gradient_of_its_definition(tmp_path):
    """Plain torch: the mean over prompts with a success of (mean score of successes) - (mean score of all rollouts)."""
    seen = []

    def noted(prompts, completions, completion_ids, **_):
        rewards = tiny.has_digit_five(completions)
        seen.append((prompts, completion_ids, rewards))
        return rewards

    rate = 0.5
    trainer = trainer_of(
        KnapsackGRPOTrainer,
        tmp_path,
        rewards=(noted,),
        data=tiny.dataset(24),
        extra={"allocator": tiny.informed_allocator(24)},
        advantage="group-mean",
        **{"optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0, "weight_decay": 0.0},
        **{"loss_type": "grpo", "max_steps": 1, "per_device_train_batch_size": 32},
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    [(prompts, completions, rewards)] = seen
    assert len(set(Counter(prompts).values())) > 1, "the batch is not ragged"

    model, encode = tiny.model().double(), tiny.tokenizer()
    model.load_state_dict({name: before.get(name, weight) for name, weight in model.state_dict().items()})

    def score(prompt, completion):
        """Mean log-probability of the tokens of a completion, which has the gradient of TRL's loss at a ratio of 1."""
        given = encode(prompt)["input_ids"]
        logits = model(torch.tensor([given + completion])).logits[0, len(given) - 1 : -1]
        return torch.log_softmax(logits, dim=-1)[torch.arange(len(completion)), completion].mean()

    objective, groups = torch.zeros((), dtype=torch.float64), 0
    for prompt in set(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        scores = {row: score(prompt, completions[row]) for row in rows}
        good = [row for row in rows if rewards[row]]
        if good:
            groups += len(good) < len(rows)
            objective = objective + sum(scores[row] for row in good) / len(good) - sum(scores.values()) / len(rows)
    assert groups >= 2
    (objective / len(set(prompts))).backward()
    for name, weight in trainer.model.named_parameters():
        moved = (weight.detach() - before[name]).double() / rate
        wanted = model.get_parameter(name).grad
        assert wanted.abs().max() > 0, name
        assert (moved - wanted).abs().max() <= 2e-4 * max(float(wanted.abs().max()), 1e-3), name


def test_share_of_groups_without_spread_is_that_of_the_ragged_groups(tmp_path):
    for scale in ("group", "none"):
        trainer, batches = ragged_trainer(tmp_path / scale, rewards=(tiny.has_digit_five,), scale_rewards=scale)
        trainer.train()
        shares = []
        for seen, batch in zip(trainer.watched, batches, strict=True):
            kinds = {}
            for prompt, reward in zip(batch["prompts"], batch["rewards"], strict=True):
                kinds.setdefault(prompt, set()).add(reward)
            shares.append(np.mean([len(kinds[prompt]) == 1 for prompt in batch["prompts"]]))
            assert seen["zero_std"] == pytest.approx(shares[-1]), scale
        assert len(set(shares)) > 1, scale
        assert metric(trainer, "frac_reward_zero_std") == pytest.approx(shares), scale


def test_the_share_without_spread_keeps_the_meaning_of_the_stock_trainer(tmp_path):
    # Reward 1 for everything but one completion: most groups have no spread, the batch has some.
    def rarely_different(completions, **_):
        return [0.0] + [1.0] * (len(completions) - 1)

    rewards = {"rewards": (rarely_different, tiny.length_reward), "reward_weights": [1.0, 0.0]}
    for case, settings in {"batch": {"scale_rewards": "batch"}, "gdpo": GDPO}.items():
        trainer, _ = ragged_trainer(tmp_path / case, **(settings | rewards))
        trainer.train()
        assert metric(trainer, "frac_reward_zero_std") == [0.0] * 3, case


def test_ragged_advantages_of_random_batches_equal_the_reference():
    for scale, weighting in product(("group", "batch", "none", "gdpo"), ("rollout", "prompt")):
        generator = np.random.default_rng(7)
        for _ in range(20):
            size = int(generator.integers(2, 40))
            groups = np.unique(generator.integers(0, 6, size), return_inverse=True)[1]
            matrix = generator.integers(0, 4, (size, 2)) / 4.0
            matrix[generator.random((size, 2)) < 0.15] = np.nan
            matrix[0] = [0.25, 0.5]
            matrix[1] = [0.5, np.nan]
            weights = np.array([0.5, 2.0])
            total = np.where(np.isnan(matrix).all(axis=1), np.nan, np.nansum(matrix * weights, axis=1))
            found = ragged_advantages(
                outcomes_by_position(groups, total, groups.max() + 1),
                matrix,
                weights,
                scale="group" if scale == "gdpo" else scale,
                aggregation="normalize_then_sum" if scale == "gdpo" else "sum_then_normalize",
                weighting=weighting,
            )
            expected = tiny.reference_advantages(
                groups.tolist(),
                [[None if np.isnan(r) else r for r in column] for column in matrix.T.tolist()],
                weights=weights.tolist(),
                scale="group" if scale == "gdpo" else scale,
                gdpo=scale == "gdpo",
                weighting=weighting,
            )
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12, err_msg=f"{scale} {weighting}")


def test_ragged_advantages_refuse_an_unknown_aggregation():
    one = np.ones(1)
    with pytest.raises(ValueError, match="sum_to_nothing"):
        ragged_advantages(
            group_outcomes(np.zeros(1, np.int64), one),
            one[:, None],
            one,
            scale="group",
            aggregation="sum_to_nothing",
            weighting="rollout",
        )


@pytest.mark.trl_range
def test_rows_belong_to_the_prompts_that_the_allocation_names(tmp_path):
    trainer, batches = ragged_trainer(tmp_path, log_allocations=True, max_steps=5)
    prompt_of = {row["prompt_id"]: row["prompt"] for row in tiny.dataset()}
    trainer.train()
    log = allocation_log(tmp_path)
    assert len(log) == len(batches) == 5
    for record, batch in zip(log, batches, strict=True):
        assert Counter(batch["prompt_id"]) == dict(zip(record["prompt_ids"], record["counts"], strict=True))
        assert len(set(record["counts"])) > 1
        assert len(batch["prompts"]) == sum(record["counts"]) == 32
        assert min(record["counts"]) >= 2
        assert [prompt_of[prompt_id] for prompt_id in batch["prompt_id"]] == batch["prompts"]
        assert batch["answer"] == [f"answer of {prompt}" for prompt in batch["prompts"]]
    # An epoch of 24 prompts is 3 steps: each prompt came exactly once.
    assert sorted(prompt_id for record in log[:3] for prompt_id in record["prompt_ids"]) == sorted(prompt_of)


def test_a_reward_function_may_write_to_its_rows(tmp_path):
    seen = []

    def marks(completions, notes, **_):
        seen.extend(list(note) for note in notes)
        for note in notes:
            note.append("scored")
        return tiny.digit_sum(completions)

    data = tiny.dataset().add_column("notes", [[f"note {k}"] for k in range(24)])
    trainer = trainer_of(
        KnapsackGRPOTrainer,
        tmp_path,
        rewards=(marks,),
        data=data,
        per_device_train_batch_size=32,
        extra={"allocator": tiny.informed_allocator()},
    )
    trainer.train()
    assert metric(trainer, "knapsack/budget_max")[0] > 4
    assert all(len(note) == 1 for note in seen)


# -- observation ------------------------------------------------------------------------------------------------------


def outcomes_by_prompt(batches, outcome):
    """Per prompt id, one (successes, rollouts, tokens) for each batch that held it."""
    visits = {}
    for batch in batches:
        here = {}
        for prompt_id, good, length in zip(batch["prompt_id"], outcome(batch), batch["lengths"], strict=True):
            if good is not None:
                old = here.get(prompt_id, (0, 0, 0))
                here[prompt_id] = (old[0] + int(good), old[1] + 1, old[2] + length)
        for prompt_id, visit in here.items():
            visits.setdefault(prompt_id, []).append(visit)
    return visits


def assert_tracked(trainer, visits, case=None):
    tracker = trainer.allocator.tracker
    assert sorted(tracker.prompt_ids) == sorted(visits), case
    records = tracker.lookup(list(visits))
    for row, (prompt_id, history) in enumerate(visits.items()):
        where = (case, prompt_id)
        assert records.visits[row] == len(history), where
        assert records.successes[row] == sum(visit[0] for visit in history), where
        assert records.rollouts[row] == sum(visit[1] for visit in history), where
        assert records.failures[row] == records.rollouts[row] - records.successes[row], where
        assert (records.newest_successes[row], records.newest_total[row]) == history[-1][:2], where
        assert records.length_count[row] == records.rollouts[row], where
        assert records.length_sum[row] == sum(visit[2] for visit in history), where


def observed(folder, *, rewards=(tiny.has_digit_five,), extra=None, **changes):
    """Train over several epochs of six prompts with an undiscounted tracker."""
    batches = []
    functions = [tiny.recording(rewards[0], batches), *rewards[1:]]
    settings = {"per_device_train_batch_size": 8, "max_steps": 8} | changes
    allocator = KnapsackAllocator(BetaEstimator(discount=1.0), success=settings.get("success_threshold", 0.0))
    trainer = trainer_of(
        KnapsackGRPOTrainer,
        folder,
        rewards=functions,
        data=tiny.dataset(6),
        extra={"allocator": allocator} | (extra or {}),
        **settings,
    )
    trainer.train()
    return trainer, batches


@pytest.mark.trl_range
def test_the_tracker_holds_each_reward_once(tmp_path):
    quarter = {"per_device_train_batch_size": 4}
    cases = [
        ({}, 8),
        ({"num_iterations": 2}, 4),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2} | quarter, 8),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2} | quarter, 4),
        ({"steps_per_generation": 2, "num_iterations": 2} | quarter, 2),
        ({"allocation": "uniform"}, 8),
    ]
    for case, (settings, generations) in enumerate(cases):
        trainer, batches = observed(tmp_path / str(case), **settings)
        assert len(batches) == generations, settings
        assert_tracked(trainer, outcomes_by_prompt(batches, lambda batch: batch["rewards"]), settings)


def test_evaluation_during_training_is_not_observed(tmp_path):
    data = tiny.dataset(4).map(lambda row: row | {"answer": "evaluation"})
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    trainer, batches = observed(tmp_path, extra={"eval_dataset": data}, **evaluation)
    trained = [batch for batch in batches if "evaluation" not in batch["answer"]]
    assert len(batches) > len(trained) == 8
    assert_tracked(trainer, outcomes_by_prompt(trained, lambda batch: batch["rewards"]))


def test_the_outcome_is_the_named_reward_unweighted(tmp_path):
    trainer, batches = observed(
        tmp_path,
        rewards=(tiny.length_reward, tiny.has_digit_five),
        outcome_reward="has_digit_five",
        reward_weights=[1.0, 0.0],
    )
    successes = outcomes_by_prompt(batches, lambda batch: tiny.has_digit_five(batch["completions"]))
    assert_tracked(trainer, successes)
    by_length = outcomes_by_prompt(batches, lambda batch: [reward > 0 for reward in batch["rewards"]])
    assert successes != by_length
    assert metric(trainer, "knapsack/outcome_per_prompt") != metric(trainer, "knapsack/reward_per_prompt")


def test_the_outcome_is_by_default_the_reward_that_tells_prompts_apart(tmp_path, caplog):
    def always(completions, **_):
        return [1.0] * len(completions)

    allocator = KnapsackAllocator(BetaEstimator(discount=1.0))
    trainer, batches = observed(
        tmp_path,
        rewards=(always, tiny.has_digit_five),
        extra={"allocator": allocator},
        reward_weights=[3.0, 0.5],
        log_allocations=True,
    )
    assert_tracked(trainer, outcomes_by_prompt(batches, lambda batch: tiny.has_digit_five(batch["completions"])))
    assert next(record for record in caplog.records if "counts as a success" in record.message).message.startswith(
        "allocation counts as a success: has_digit_five above 0.25 (from 0 to 0.5); "
    )
    row = json.loads((tmp_path / ALLOCATION_LOG).read_text().splitlines()[-1])
    assert row["success"] == {"reward": "has_digit_five", "above": 0.25, "low": 0.0, "high": 0.5}


def test_unscored_rollouts_are_counted_and_left_out(tmp_path):
    trainer, batches = observed(tmp_path, rewards=(tiny.sometimes_none,))
    unscored = sum(batch["rewards"].count(None) for batch in batches)
    assert unscored > 0
    assert metric(trainer, "knapsack/unscored_rollouts")[-1] == unscored
    assert_tracked(trainer, outcomes_by_prompt(batches, lambda batch: batch["rewards"]))


def test_success_is_an_outcome_above_the_threshold(tmp_path):
    batches = []
    trainer = trainer_of(
        KnapsackGRPOTrainer, tmp_path, rewards=(tiny.recording(tiny.length_reward, batches),), success_threshold=0.4
    )
    trainer.train()
    lengths = [len(completion) for batch in batches for completion in batch["completions"]]
    assert 0 < sum(length > 4 for length in lengths) < sum(length > 0 for length in lengths)
    found = trainer.allocator.tracker.records().newest_successes.sum()
    assert found == sum(length > 4 for length in lengths)


def test_prompt_weighted_reward_is_the_mean_over_prompts(tmp_path):
    trainer, batches = ragged_trainer(tmp_path)
    trainer.train()
    for k, batch in enumerate(batches):
        by_prompt = {}
        for prompt, reward in zip(batch["prompts"], batch["rewards"], strict=True):
            by_prompt.setdefault(prompt, []).append(reward)
        mean = np.mean([np.mean(rewards) for rewards in by_prompt.values()])
        assert metric(trainer, "knapsack/reward_per_prompt")[k] == pytest.approx(mean, abs=1e-6)
        assert metric(trainer, "reward")[k] == pytest.approx(np.mean(batch["rewards"]), abs=1e-6)


def test_an_infinite_reward_does_not_end_the_run(tmp_path, caplog):
    def infinite_at_times(completions, **_):
        return [
            math.inf if c.startswith("a") else -math.inf if c.startswith("b") else float("5" in c) for c in completions
        ]

    for ragged, scale in product((True, False), ("group", "batch", "none")):
        case, batches = (ragged, scale), []
        trainer = trainer_of(
            WatchedTrainer,
            tmp_path / f"{ragged} {scale}",
            rewards=(tiny.recording(infinite_at_times, batches),),
            data=tiny.dataset(24),
            per_device_train_batch_size=32,
            scale_rewards=scale,
            extra={"allocator": tiny.informed_allocator()} if ragged else None,
        )
        start = tiny.fingerprint(trainer.model)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="knapsack_rl.trl"):
            trainer.train()
        infinite = sum(math.isinf(reward) for batch in batches for reward in batch["rewards"])
        assert infinite > 0, case
        assert metric(trainer, "knapsack/unscored_rollouts")[-1] == infinite, case
        assert sum("infinite" in record.getMessage() for record in caplog.records) == 1, case
        assert (metric(trainer, "knapsack/budget_max")[0] > 4) == ragged, case
        assert all(np.abs(seen["advantages"]).max() < 100 for seen in trainer.watched), case
        assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters()), case
        assert tiny.fingerprint(trainer.model) != start, case


def test_a_batch_without_any_reward_does_not_end_the_run(tmp_path):
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, rewards=(lambda completions, **_: [None] * len(completions),))
    start = tiny.fingerprint(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 3
    assert metric(trainer, "knapsack/unscored_rollouts")[-1] == 48
    assert len(trainer.allocator.tracker) == 0
    assert tiny.fingerprint(trainer.model) == start


def test_lengths_count_the_tokens_of_truncated_rollouts_too(tmp_path):
    trainer, batches = observed(tmp_path, mask_truncated_completions=True)
    assert any(length == 5 for batch in batches for length in batch["lengths"])
    assert_tracked(trainer, outcomes_by_prompt(batches, lambda batch: batch["rewards"]))


# -- evaluation, metrics, log -----------------------------------------------------------------------------------------


@pytest.mark.trl_range
def test_tokens_of_tools_are_not_counted_as_generated(tmp_path, monkeypatch):
    """An environment answers in the middle of each completion; half of the completions are truncated and so blanked."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    mine = Counter()

    def rollout(prompts, trainer):
        found = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "env_mask": []}
        for k, prompt in enumerate(prompts):
            turns = [1] * (1 + k % 3) + [0] * 20 + [1]
            mine[prompt] += sum(turns)
            found["prompt_ids"].append(trainer.processing_class(prompt)["input_ids"])
            found["completion_ids"].append([3] * (len(turns) - 1) + [k % 2])  # 1 ends it
            found["env_mask"].append(turns)
        return found

    trainer = tiny.trainer(
        KnapsackGRPOTrainer, tmp_path, extra={"rollout_func": rollout}, mask_truncated_completions=True
    )
    trainer.train()
    tracker = trainer.allocator.tracker
    records = tracker.lookup(tracker.prompt_ids)
    texts = dict(zip(tiny.dataset()["prompt_id"], tiny.dataset()["prompt"], strict=True))
    assert records.length_sum.tolist() == [mine[texts[prompt_id]] for prompt_id in tracker.prompt_ids]
    assert trainer.generated.tokens == mine.total()
    assert trainer.generated.rollouts == 48


def test_evaluation_leaves_the_allocator_alone(tmp_path):
    batches = []
    trainer = trainer_of(
        KnapsackGRPOTrainer,
        tmp_path,
        rewards=(tiny.recording(tiny.digit_sum, batches),),
        extra={"eval_dataset": tiny.dataset(6), "allocator": tiny.informed_allocator()},
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    before = tiny.informed_allocator()
    found = trainer.evaluate()
    assert_same_state(trainer.allocator.state_dict(), before.state_dict())
    assert trainer.allocator.metrics() == pytest.approx(before.metrics(), nan_ok=True)
    # Evaluation has its own group size and goes through the prompts evenly.
    assert Counter(prompt for batch in batches for prompt in batch["prompts"]) == dict.fromkeys(
        tiny.dataset(6)["prompt"], 2
    )
    assert found["eval_reward"] == pytest.approx(np.mean([r for b in batches for r in b["rewards"]]), abs=1e-6)
    assert not any("knapsack" in name for name in found)


@pytest.mark.trl_range
def test_metrics_of_each_step_are_in_the_log_history(tmp_path):
    trainer, batches = ragged_trainer(tmp_path, rewards=(tiny.has_digit_five,))
    trainer.train()
    steps = [row for row in trainer.state.log_history if "reward" in row]
    assert len(steps) == 3
    for k, (row, batch) in enumerate(zip(steps, batches, strict=True)):
        counts = Counter(batch["prompts"])
        mixed = [
            prompt
            for prompt in counts
            if len({r for p, r in zip(batch["prompts"], batch["rewards"], strict=True) if p == prompt}) > 1
        ]
        assert row["knapsack/budget"] == row["knapsack/rollouts"] == 32
        assert row["knapsack/prompts"] == len(counts) == 8
        assert row["knapsack/budget_min"] == min(counts.values())
        assert row["knapsack/budget_max"] == max(counts.values())
        assert row["knapsack/effective_gradient_ratio"] == pytest.approx(sum(counts[p] for p in mixed) / 32)
        assert row["knapsack/effective_prompt_ratio"] == pytest.approx(len(mixed) / 8)
        assert row["knapsack/prompts_seen"] == 24
        assert row["knapsack/allocation_seconds"] > 0
        assert row["step"] == k + 1
    assert not any(name.startswith("knapsack/") for name in trainer.state.log_history[-1])


CORE = {
    *("effective_gradient_ratio", "effective_prompt_ratio", "all_correct", "all_wrong", "outcome_per_prompt"),
    *("reward_per_prompt", "estimated_success_rate", "predicted_nonzero_gradient", "realised_nonzero_gradient"),
    *("budget_min", "budget_max", "allocation_seconds"),
}


def test_the_log_has_a_dozen_metrics_and_the_failures(tmp_path):
    def lines(folder, reward, **settings):
        trainer = trainer_of(
            KnapsackGRPOTrainer, tmp_path / folder, data=tiny.dataset(4), rewards=(reward,), **settings
        )
        trainer.train()
        return [
            {name.removeprefix("knapsack/"): number for name, number in row.items() if name.startswith("knapsack/")}
            for row in trainer.state.log_history
            if "loss" in row
        ]

    def solved(completions, **_):
        return [1.0] * len(completions)

    first, second, third = lines("solved", solved, log_metrics="core")
    assert set(first) == CORE | UPDATES
    assert len(CORE) == 12
    assert (
        set(second) == set(third) == CORE | UPDATES | {"solved_before", "lost"}
    )  # all four were solved at the last visit
    assert (third["solved_before"], third["lost"], third["rows_skipped"]) == (4.0, 0.0, 15 / 16)
    every = lines("all", solved)
    assert all(set(row) > CORE | {"budget_share/0", "prompts_seen", "allocation_failures"} for row in every)

    def broken(completions, **_):
        return [None if k == 2 else float(k % 2) for k in range(len(completions))]

    for row in lines("unscored", broken, log_metrics="core"):
        assert set(row) - {"solved_before", "lost"} == CORE | UPDATES | {"unscored_rollouts"}
    with pytest.raises(ValueError, match="log_metrics must be one of core, all, got 'some'"):
        lines("wrong", solved, log_metrics="some")


def test_metrics_are_absent_where_nothing_was_generated(tmp_path):
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, num_iterations=2, max_steps=4)
    trainer.train()
    has = ["knapsack/budget" in row for row in trainer.state.log_history if "loss" in row]
    assert has == [True, False, True, False]


def test_allocation_log(tmp_path):
    trainer, batches = ragged_trainer(
        tmp_path, rewards=(tiny.sometimes_none,), log_allocations=True, num_iterations=2, max_steps=6
    )
    before = tiny.informed_allocator()
    trainer.train()
    log = allocation_log(tmp_path)
    assert [record["step"] for record in log] == [1, 2, 3]
    for record, batch in zip(log, batches, strict=True):
        ids = record["prompt_ids"]
        rewards = {i: [r for j, r in zip(batch["prompt_id"], batch["rewards"], strict=True) if i == j] for i in ids}
        scored = {prompt_id: [r for r in given if r is not None] for prompt_id, given in rewards.items()}
        assert len(ids) == len(set(ids)) == 8
        assert record["counts"] == [len(rewards[prompt_id]) for prompt_id in ids]
        assert record["scored"] == [len(scored[prompt_id]) for prompt_id in ids]
        assert record["successes"] == [sum(scored[prompt_id]) for prompt_id in ids]
        assert record["effective"] == [len(set(scored[prompt_id])) > 1 for prompt_id in ids]
        # Each prompt comes once in these three batches, so the estimates are those of the start.
        np.testing.assert_allclose(record["estimate"], before.belief(ids).mean)
        np.testing.assert_allclose(
            record["predicted"], before.belief(ids).nonzero_gradient(np.array(record["counts"])), rtol=1e-9
        )
        assert record["seconds"] > 0
    assert any(sum(record["counts"]) > sum(record["scored"]) for record in log)


def test_the_allocation_log_numbers_the_generations(tmp_path):
    cases = [
        ({}, 3),
        ({"num_iterations": 2, "max_steps": 5}, 3),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 5}, 3),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 6),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2, "max_steps": 6}, 4),
    ]
    for case, (settings, generations) in enumerate(cases):
        folder, few = tmp_path / str(case), {"per_device_train_batch_size": 4}
        trainer_of(KnapsackGRPOTrainer, folder, log_allocations=True, **(few | settings)).train()
        assert [row["step"] for row in allocation_log(folder)] == list(range(1, generations + 1)), settings


def test_nothing_is_logged_unless_asked_for(tmp_path):
    trainer, _ = ragged_trainer(tmp_path)
    trainer.train()
    assert not (tmp_path / ALLOCATION_LOG).exists()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpointed(folder, *, informed, steps=6, **changes):
    # Prompts 4 at a time: 6 steps are the first epoch.
    return trainer_of(
        KnapsackGRPOTrainer,
        folder,
        data=tiny.dataset(24),
        max_steps=steps,
        log_allocations=True,
        save_strategy="steps",
        save_steps=3,
        extra={"allocator": tiny.informed_allocator() if informed else KnapsackAllocator(BetaEstimator(discount=1.0))},
        **changes,
    )


@pytest.mark.trl_range
def test_a_resumed_run_continues_as_the_uninterrupted_one(tmp_path):
    for resume_by_name in (True, False):
        folder = tmp_path / f"{resume_by_name}"
        whole = checkpointed(folder, informed=True)
        whole.train()
        first_log = allocation_log(folder)
        (folder / ALLOCATION_LOG).unlink()
        if not resume_by_name:
            shutil.rmtree(folder / "checkpoint-6")  # checkpoint-3 is the newest one then
        rest = checkpointed(folder, informed=False)
        rest.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume_by_name else True)
        second_log = allocation_log(folder)
        compared = ("step", "prompt_ids", "counts", "successes", "estimate", "predicted")
        assert [{key: record[key] for key in compared} for record in second_log] == [
            {key: record[key] for key in compared} for record in first_log[3:]
        ], resume_by_name
        assert any(max(record["counts"]) > 4 for record in second_log), resume_by_name
        assert rest.state.global_step == 6, resume_by_name
        assert_same_state(whole.allocator.state_dict(), rest.allocator.state_dict())
        assert tiny.fingerprint(whole.model) == tiny.fingerprint(rest.model), resume_by_name


def test_a_checkpoint_holds_the_state_of_its_step(tmp_path):
    trainer = checkpointed(tmp_path, informed=False)
    trainer.train()
    seen = []
    for step in (3, 6):
        header, arrays = read_state(tmp_path / f"checkpoint-{step}" / STATE_FILE)
        allocator = KnapsackAllocator(BetaEstimator(discount=1.0))
        allocator.load_state_dict({"header": header, "arrays": arrays})
        seen.append(len(allocator.tracker))
    assert seen == [12, 24]
    assert_same_state(allocator.state_dict(), trainer.allocator.state_dict())


def test_the_default_allocator_resumes(tmp_path):
    def make():
        return trainer_of(KnapsackGRPOTrainer, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)

    whole, rest = make(), make()
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(whole.allocator.state_dict(), rest.allocator.state_dict())
    assert len(rest.allocator.tracker) == 16


def test_resuming_a_stock_checkpoint_warns_and_works(tmp_path, caplog):
    stock = trainer_of(GRPOTrainer, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    stock.train()
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, max_steps=4, **tiny.AS_STOCK)
    with caplog.at_level(logging.WARNING, logger="knapsack_rl.trl"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum(STATE_FILE in record.getMessage() for record in caplog.records) == 1
    assert trainer.state.global_step == 4
    assert len(trainer.allocator.tracker) == 8  # the prompts of steps 3 and 4
    assert tiny.fingerprint(trainer.model) == tiny.fingerprint(stock.model)


def test_the_newest_checkpoint_wins_whichever_trainer_wrote_it(tmp_path, caplog):
    def make(kind, steps):
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2} | tiny.AS_STOCK
        return trainer_of(kind, tmp_path, data=tiny.dataset(24), **settings)

    first = make(KnapsackGRPOTrainer, 2)
    first.train()
    stock = make(GRPOTrainer, 4)
    stock.train(resume_from_checkpoint=True)
    trainer = make(KnapsackGRPOTrainer, 6)
    twin = make(GRPOTrainer, 6)
    prompts = []
    trainer.reward_funcs = [tiny.recording(tiny.digit_sum, prompts)]
    with caplog.at_level(logging.WARNING, logger="knapsack_rl.trl"):
        trainer.train(resume_from_checkpoint=True)
    twin.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert len(prompts) == 2  # steps 5 and 6
    assert tiny.fingerprint(trainer.model) == tiny.fingerprint(twin.model)  # nothing that stock training did is lost
    known = trainer.allocator.tracker.prompt_ids
    assert known[:8] == first.allocator.tracker.prompt_ids  # the older state is better than none
    assert set(known[8:]) == {name for batch in prompts for name in batch["prompt_id"]}
    (warning,) = [record.getMessage() for record in caplog.records if STATE_FILE in record.getMessage()]
    assert "checkpoint-4 has no knapsack_allocator.npz: the allocator continues from that of checkpoint-2" in warning


def test_a_second_training_starts_as_that_of_the_stock_trainer(tmp_path):
    """Six steps are an epoch: after a resume in the second one, another training begins with the first order again."""
    order = {}
    for kind in (GRPOTrainer, KnapsackGRPOTrainer):
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 7, "allocation": "uniform"}
        trainer_of(kind, tmp_path / kind.__name__, data=tiny.dataset(24), **settings).train()
        batches = []
        again = trainer_of(
            kind,
            tmp_path / kind.__name__,
            data=tiny.dataset(24),
            rewards=(tiny.recording(tiny.digit_sum, batches),),
            **settings,
        )
        again.train(resume_from_checkpoint=str(tmp_path / kind.__name__ / "checkpoint-7"))
        resumed = len(batches)
        again.train()
        assert (resumed, len(batches)) == (1, 9)
        assert again.state.global_step == 8
        order[kind] = [batch["prompts"] for batch in batches[resumed:]]
    assert order[KnapsackGRPOTrainer] == order[GRPOTrainer]
    assert order[GRPOTrainer][:2] != order[GRPOTrainer][6:]  # the epochs differ


def test_a_damaged_state_stops_the_resume(tmp_path):
    checkpointed(tmp_path, informed=True, steps=3).train()
    (tmp_path / "checkpoint-3" / STATE_FILE).write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a readable allocator state"):
        checkpointed(tmp_path, informed=True).train(resume_from_checkpoint=True)


def test_resuming_with_another_estimator_is_refused(tmp_path):
    trainer_of(KnapsackGRPOTrainer, tmp_path, save_strategy="steps", save_steps=3, estimator="window").train()
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, estimator="beta", max_steps=6)
    with pytest.raises(ValueError, match="estimator"):
        trainer.train(resume_from_checkpoint=True)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_a_configuration_that_cannot_work_is_refused_at_construction(tmp_path):
    cases = [
        ({"min_rollouts": 5}, "min_rollouts=5, num_generations=4"),
        ({"min_rollouts": -1}, "min_rollouts must be .*got -1"),
        ({"max_rollouts": 3}, "max_rollouts=3"),
        ({"allocation": "greedy"}, "allocation must be one of .*'greedy'"),
        ({"weighting": "token"}, "weighting must be one of .*'token'"),
        ({"advantage": "mean"}, "advantage must be one of group-std, group-mean, posterior-mean.*'mean'"),
        ({"advantage": "group-mean", "scale_rewards": "batch"}, "contradicts scale_rewards='batch'"),
        (GDPO_ONLY | {"advantage": "group-mean"}, "multi_objective_aggregation='sum_then_normalize'"),
        ({"estimator": "oracle"}, "estimator must be one of .*'oracle'"),
        ({"value": "fame"}, "value must be one of .*'fame'"),
        ({"value": "nonzero-gradient", "estimator": "window"}, "fallback=False"),
        ({"value": "experiments.values:fitted", "estimator": "beta"}, "closed forms"),
        ({"budget_unit": "tokens", "min_rollouts": 1}, "needs min_rollouts >= 2"),
        ({"budget_unit": "tokens", "allocation": "paper"}, "counts rollouts"),
        ({"estimator_settings": "smoothness=3"}, "has no setting smoothness"),
        ({"outcome_reward": "absent"}, "outcome_reward must name .*digit_sum.*'absent'"),
        ({"generation_kwargs": {"seed": 1}}, "seed"),
    ]
    for settings, message in cases:
        found = message_of(ValueError, trainer_of, KnapsackGRPOTrainer, tmp_path, **settings)
        assert re.search(message, found), (settings, found)


def test_the_value_of_the_configuration_is_maximised(tmp_path):
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, value="nonzero-gradient")
    assert trainer.allocator.value == "nonzero-gradient"


# -- budgets in tokens ------------------------------------------------------------------------------------------------


@pytest.mark.trl_range
def test_a_budget_in_tokens_pays_for_as_many_rollouts_as_it_is_expected_to(tmp_path):
    """Rollouts vary from step to step, advantages stay those of the groups, expected tokens stay within the budget."""
    in_parts = {"steps_per_generation": 2, "per_device_train_batch_size": 8, "num_iterations": 2, "max_steps": 40}
    for settings in ({"max_steps": 10}, in_parts):
        batches = []
        folder = tmp_path / str(len(settings))
        trainer = trainer_of(
            KnapsackGRPOTrainer,
            folder,
            rewards=[tiny.recording(tiny.has_digit_five, batches)],
            data=tiny.dataset(8),
            budget_unit="tokens",
            max_completion_length=8,
            log_allocations=True,
            **settings,
        )
        seen = []
        original = trainer._finish_step

        def finish(step, output, original=original, seen=seen, allocator=trainer.allocator):
            original(step, output)
            seen.append((step, output["advantages"].clone(), allocator.metrics()))

        trainer._finish_step = finish
        trainer.train()
        log = allocation_log(folder)
        sums = [sum(record["counts"]) for record in log]
        assert sums[0] == 16 and len(set(sums)) > 1  # uniform until lengths are known
        assert [len(batch["completions"]) for batch in batches] == sums
        assert all(total % settings.get("steps_per_generation", 1) == 0 for total in sums)
        before = {}
        for (step, advantages, metrics), batch, record in zip(seen, batches, log, strict=True):
            if step.ragged:
                expected = tiny.reference_advantages(batch["prompt_id"], [batch["rewards"]])
                np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-6)
            assert metrics["allocation_failures"] == 0
            if before and "expected_tokens" in metrics:
                assert min(record["counts"]) >= 2
            before = metrics
        assert trainer.generated.rollouts == sum(sums)


def test_a_budget_in_tokens_resumes_as_if_it_had_not_stopped(tmp_path):
    settings = {"budget_unit": "tokens", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(KnapsackGRPOTrainer, tmp_path / "whole", data=tiny.dataset(8), **settings)
    whole.train()
    rest = trainer_of(KnapsackGRPOTrainer, tmp_path / "whole", data=tiny.dataset(8), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_state(whole.allocator.state_dict(), rest.allocator.state_dict())
    assert tiny.fingerprint(whole.model) == tiny.fingerprint(rest.model)


def test_an_id_that_names_two_prompts_is_refused(tmp_path):
    rows = [{"prompt": "1+1=", "prompt_id": "same"}, {"prompt": "2+2=", "prompt_id": "same"}]
    with pytest.raises(ValueError, match=r"'same' names different prompts \(rows 0 and 1\)"):
        trainer_of(KnapsackGRPOTrainer, tmp_path, data=Dataset.from_list(rows * 4))
    with pytest.raises(ValueError, match=r"'number'.* 7 names different"):
        rows = [row | {"number": 7} for row in rows]
        trainer_of(KnapsackGRPOTrainer, tmp_path, data=Dataset.from_list(rows * 4), prompt_id_column="number")


def test_an_id_that_names_two_prompts_of_a_stream_is_refused(tmp_path):
    rows = [{"prompt": f"{k}+1=", "prompt_id": "same"} for k in range(8)]
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, data=Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(ValueError, match="'same'"):
        trainer.train()


def test_a_launch_with_other_processes_than_training_uses_is_refused(tmp_path, monkeypatch):
    arguments = KnapsackGRPOConfig(**tiny.arguments(tmp_path))  # the processes are counted here
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes but training runs on 1.*torchrun"):
        KnapsackGRPOTrainer(
            model=tiny.model(),
            reward_funcs=[tiny.digit_sum],
            args=arguments,
            train_dataset=tiny.dataset(),
            processing_class=tiny.tokenizer(),
        )


def test_a_plain_grpo_config_is_accepted(tmp_path):
    trainer = KnapsackGRPOTrainer(
        model=tiny.model(),
        reward_funcs=tiny.digit_sum,
        args=GRPOConfig(**tiny.arguments(tmp_path)),
        train_dataset=tiny.dataset(),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    assert trainer.allocator.estimator_name == "bayes-filter"
    assert (trainer.allocator.min_rollouts, trainer.allocator.max_rollouts) == (2, 128)
    assert metric(trainer, "knapsack/budget_max") == [4.0] * 3


def test_settings_reach_the_allocator(tmp_path):
    trainer = trainer_of(
        KnapsackGRPOTrainer, tmp_path, estimator="window", min_rollouts=3, max_rollouts=9, success_threshold=0.5
    )
    allocator = trainer.allocator
    assert (allocator.estimator_name, allocator.min_rollouts, allocator.max_rollouts) == ("window", 3, 9)
    assert allocator.success == 0.5


def test_every_estimator_trains_over_several_epochs(tmp_path):
    def never_for_some(prompts, completions, **_):
        return [
            float(prompt[0] in "012") * reward
            for prompt, reward in zip(prompts, tiny.has_digit_five(completions), strict=True)
        ]

    for estimator in ESTIMATORS:
        trainer = trainer_of(
            KnapsackGRPOTrainer,
            tmp_path / estimator,
            rewards=(never_for_some,),
            data=tiny.dataset(8),
            estimator=estimator,
            max_rollouts=10,
            max_steps=10,
        )
        trainer.train()
        assert metric(trainer, "knapsack/budget") == [16.0] * 10, estimator
        assert 4 < max(metric(trainer, "knapsack/budget_max")) <= 10, estimator
        assert min(metric(trainer, "knapsack/budget_min")) >= 2, estimator


# -- rows and ids -----------------------------------------------------------------------------------------------------


def training_batch(folder, rows, **changes):
    """Hand one batch of rows to the trainer as its data loader would."""
    batches = []
    trainer = trainer_of(WatchedTrainer, folder, rewards=(tiny.recording(tiny.digit_sum, batches),), **changes)
    trainer.model.train()
    trainer._generate_and_score_completions(rows)
    return trainer, batches


def test_a_broken_block_is_refused(tmp_path):
    rows = [dict(row) for row in tiny.dataset(4) for _ in range(4)]
    training_batch(tmp_path, rows)
    with pytest.raises(ValueError, match="one block of num_generations=4 rows holds different prompts"):
        training_batch(tmp_path, rows[1:] + rows[:1])


def test_a_block_with_two_ids_is_refused(tmp_path):
    rows = [{"prompt": "1+1=", "prompt_id": k // 2} for k in range(16)]
    with pytest.raises(ValueError, match="rows holds different prompts"):
        training_batch(tmp_path, rows)


def test_a_stream_that_breaks_groups_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "repeat_iterable_dataset", lambda dataset, **_: dataset)
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, data=tiny.dataset(96).to_iterable_dataset())
    with pytest.raises(ValueError, match="IterableDataset"):
        trainer.train()


def test_prompts_with_images_need_an_id(tmp_path):
    for column in ("image", "images"):
        rows = [{"prompt": "1+1=", column: None} for _ in range(16)]
        found = message_of(ValueError, training_batch, tmp_path, rows)
        assert "images need an id: add a column 'prompt_id'" in found, column
        assert prompt_key(rows[0] | {"prompt_id": "a"}, "prompt_id") == "a", column


def test_an_id_is_a_string_or_a_whole_number(tmp_path):
    for given in (True, 1.5, ["a"]):
        rows = [{"prompt": "1+1=", "prompt_id": given} for _ in range(16)]
        assert "must hold strings or whole numbers" in message_of(ValueError, training_batch, tmp_path, rows), given


def test_without_ids_prompts_are_identified_by_a_hash_of_their_rows(tmp_path):
    batches = []
    trainer = trainer_of(
        KnapsackGRPOTrainer,
        tmp_path,
        rewards=(tiny.recording(tiny.has_digit_five, batches),),
        data=tiny.dataset(6, ids=False),
        per_device_train_batch_size=8,
        max_steps=9,
    )
    trainer.train()
    rolled = Counter(prompt for batch in batches for prompt in batch["prompts"])
    keys = [prompt_key({"prompt": prompt, "answer": f"answer of {prompt}"}, "prompt_id") for prompt in rolled]
    assert len(set(keys)) == 6
    records = trainer.allocator.tracker.lookup(keys)
    assert records.rollouts.tolist() == list(rolled.values())
    assert records.visits.tolist() == [3] * 6
    assert max(metric(trainer, "knapsack/budget_max")) > 4


def test_the_hash_is_stable_and_covers_the_whole_prompt():
    messages = [{"role": "user", "content": "1+1="}]
    keys = {
        prompt_key({"prompt": prompt}, "id")
        for prompt in ("1+1=", "1+1= ", messages, [*messages, {"role": "assistant", "content": "2"}])
    }
    assert len(keys) == 4
    reordered = [{"content": "1+1=", "role": "user"}]
    assert prompt_key({"prompt": reordered}, "id") == prompt_key({"prompt": messages, "id": None}, "id")


def test_remove_unused_columns_falls_back_to_the_hash(tmp_path):
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, remove_unused_columns=True)
    trainer.train()
    assert len(trainer.allocator.tracker) == 12
    assert not any(str(prompt_id).startswith("p") for prompt_id in trainer.allocator.tracker.prompt_ids)


def test_a_prompt_that_is_twice_in_a_batch_forms_one_group(tmp_path, caplog):
    # Two prompts, each in two of the four blocks.
    rows = [dict(tiny.dataset(2)[k % 2]) for k in range(4) for _ in range(4)]
    known, unknown = KnapsackAllocator(), KnapsackAllocator()
    known.observe(["p0"] * 16 + ["p1"] * 16, [1.0] * 16 + [0.0, 1.0] * 8)
    for allocator in (known, unknown):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="knapsack_rl.trl"):
            trainer, [batch] = training_batch(tmp_path, rows, extra={"allocator": allocator})
        counts = Counter(batch["prompt_id"])
        assert sum(counts.values()) == 16
        assert (counts["p1"] > 8) == (allocator is known)
        assert "same prompt more than once" in caplog.text
        expected = tiny.reference_advantages(batch["prompt_id"], [batch["rewards"]])
        np.testing.assert_allclose(trainer.watched[0]["advantages"], expected, rtol=0, atol=TOLERANCE)


def test_a_dataset_with_duplicates_trains(tmp_path):
    data = Dataset.from_list([dict(tiny.dataset(3)[k % 3]) for k in range(24)])
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, data=data, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6
    assert metric(trainer, "knapsack/budget") == [16.0] * 6
    assert sorted(trainer.allocator.tracker.prompt_ids) == ["p0", "p1", "p2"]
    assert trainer.allocator.tracker.records().rollouts.sum() == 96


# -- engines and adapters ---------------------------------------------------------------------------------------------


class ServedVLLM:
    """Answers as vLLM's server mode does: every n-th prompt, n times. A completion repeats its prompt's tokens."""

    def __init__(self, **_):
        self.calls = []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler=None):
        self.calls.append(num_generations)
        asked = [prompt for prompt in prompts[::num_generations] for _ in range(num_generations)]
        completions = [[*prompt[:3], 1] for prompt in asked]
        return prompts, completions, [[[-1.0]] * 4 for _ in completions], None


@pytest.mark.trl_range
def test_vllm_is_asked_for_one_completion_per_row_in_training_only(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", ServedVLLM)
    batches = []
    trainer = trainer_of(
        KnapsackGRPOTrainer,
        tmp_path,
        rewards=(tiny.recording(tiny.digit_sum, batches),),
        data=tiny.dataset(24),
        use_vllm=True,
        vllm_mode="colocate",
        per_device_train_batch_size=32,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        extra={"allocator": tiny.informed_allocator(), "eval_dataset": tiny.dataset(4)},
    )
    trainer.train()
    assert trainer.vllm_generation.calls == [1, 1, 1]
    assert max(metric(trainer, "knapsack/budget_max")) > 4
    trainer.evaluate()
    assert trainer.vllm_generation.calls[3:] == [2, 2]
    assert len(batches) == 5
    for batch in batches:
        assert batch["completions"] == [prompt[:3] for prompt in batch["prompts"]]


def test_vllm_gets_every_other_argument_unchanged():
    calls, training = [], [True, True, False]

    def generate(prompts, images, num_generations, profiler=None):
        calls.append((prompts, images, num_generations, profiler))
        return "made"

    wrapped = one_completion_per_row(generate, lambda: training.pop(0))
    assert wrapped([[1]], None, 4, profiler="p") == "made"
    assert wrapped(prompts=[[2]], images=None, num_generations=4) == "made"
    assert wrapped([[3]], None, 4) == "made"
    assert calls == [([[1]], None, 1, "p"), ([[2]], None, 1, None), ([[3]], None, 4, None)]


def test_lora_adapters_train(tmp_path):
    trainer, _ = ragged_trainer(
        tmp_path, extra={"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert max(metric(trainer, "knapsack/budget_max")) > 4


def test_a_missing_extra_names_the_install_command(monkeypatch):
    spec = importlib.util.spec_from_file_location("knapsack_rl_trl_without_extra", knapsack_rl.trl.__file__)
    for module in ("torch", "accelerate", "datasets", "transformers", "trl"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            found = message_of(ImportError, spec.loader.exec_module, importlib.util.module_from_spec(spec))
        assert module in found and 'pip install "knapsack-rl[trl]"' in found


def test_the_package_works_without_the_extra():
    code = """
import sys
for name in ("torch", "trl", "transformers", "datasets", "accelerate"):
    sys.modules[name] = None
import knapsack_rl
print(knapsack_rl.KnapsackAllocator().allocate(["a", "b"], budget=8).counts.tolist())
try:
    import knapsack_rl.trl
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts, message = done.stdout.splitlines()
    assert counts == "[4, 4]"
    assert 'pip install "knapsack-rl[trl]"' in message


# -- internals --------------------------------------------------------------------------------------------------------


def test_a_release_of_trl_with_other_methods_is_refused(tmp_path, monkeypatch):
    others = {
        "_generate_and_score_completions": lambda self, inputs, mode: None,
        "_calculate_rewards": lambda self, inputs, prompts, completions: None,
        "_generate": lambda self, prompts, images: None,
    }
    for name, other in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(GRPOTrainer, name, other)
            found = message_of(RuntimeError, trainer_of, KnapsackGRPOTrainer, tmp_path)
            assert re.search(f"GRPOTrainer.{name} takes .*not supported", found), name
            patch.delattr(GRPOTrainer, name)
            assert f"{name} takes None" in message_of(RuntimeError, trainer_of, KnapsackGRPOTrainer, tmp_path), name


def test_rewards_that_bypass_the_trainer_are_refused(tmp_path):
    class Bypass(KnapsackGRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            return torch.zeros(len(prompts), 1)

    with pytest.raises(RuntimeError, match="without calling super"):
        trainer_of(Bypass, tmp_path).train()


def test_advantages_of_another_shape_are_refused(tmp_path, monkeypatch):
    stock = GRPOTrainer._generate_and_score_completions

    def in_two_columns(self, inputs):
        output = stock(self, inputs)
        return output | {"advantages": output["advantages"].view(-1, 1)}

    trainer, _ = ragged_trainer(tmp_path)
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", in_two_columns)
    with pytest.raises(RuntimeError, match="TRL computed advantages of shape"):
        trainer.train()


def test_rows_of_a_prompt_are_adjacent(tmp_path):
    trainer, batches = ragged_trainer(tmp_path)
    trainer.train()
    for batch in batches:
        changes = sum(one != two for one, two in pairwise(batch["prompts"]))
        assert changes == len(set(batch["prompts"])) - 1


# -- features ---------------------------------------------------------------------------------------------------------


def graded(prompts=24, **more):
    """Prompts with a grade of two values and a length."""
    data = tiny.dataset(prompts, **more)
    rows = [row | {"grade": f"g{k % 2}", "length": k % 5} for k, row in enumerate(data)]
    return Dataset.from_list(rows)


def with_features(folder, data=None, **settings):
    settings = {"feature_columns": ["grade", "length"]} | settings
    return trainer_of(KnapsackGRPOTrainer, folder, data=graded() if data is None else data, **settings)


@pytest.mark.parametrize("removed", [False, True])
def test_columns_of_the_data_are_the_features_of_their_prompts(tmp_path, removed):
    """Also where the trainer removes unused columns: the features of a plan are those of the rows of its prompts."""
    trainer = with_features(tmp_path, remove_unused_columns=removed, max_steps=8)
    trainer.train()
    shared = trainer.allocator.shared
    assert shared.features.names == ["grade", "length"]
    ids = trainer.allocator.tracker.prompt_ids
    assert len(ids) > 12
    codes = {name: shared.features.codes(ids)[:, k] for k, name in enumerate(shared.features.names)}
    rows = {row["prompt_id"]: row for row in graded()}
    if not removed:  # else prompts are known by a hash
        for name, code_of in codes.items():
            pairs = {(rows[prompt_id][name], code) for prompt_id, code in zip(ids, code_of.tolist(), strict=True)}
            assert len(pairs) == len(dict(pairs)) == len({code for _, code in pairs}), name  # one to one
            assert len(pairs) == {"grade": 2, "length": 5}[name]
    assert trainer.allocator.metrics()["allocation_failures"] == 0
    assert shared.clock > 4
    assert 0 < trainer.allocator.metrics()["features/grade"] < 1


def test_columns_are_features_in_two_rounds_too(tmp_path):
    trainer = with_features(tmp_path, rounds=2, max_steps=4)
    trainer.train()
    ids = trainer.allocator.tracker.prompt_ids
    assert ids
    assert (trainer.allocator.shared.features.codes(ids) > 1).all()  # each has a value in every column
    assert trainer.allocator.shared.clock == 4
    assert trainer.allocator.metrics()["allocation_failures"] == 0


def test_features_and_what_they_taught_resume(tmp_path):
    def make(**more):
        return with_features(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, **more)

    whole = make()
    whole.train()
    rest = make()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_state(whole.allocator.state_dict(), rest.allocator.state_dict())
    assert tiny.fingerprint(whole.model) == tiny.fingerprint(rest.model)


def test_other_features_after_a_resume_are_learned_anew(tmp_path, caplog):
    first = with_features(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    rest = with_features(tmp_path, feature_columns="grade", max_steps=4)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "what prompts share is learned anew" in caplog.text
    assert rest.allocator.shared.features.names == ["grade"]
    assert rest.allocator.metrics()["allocation_failures"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_columns": ["topic"]}, r"columns of the data set, .*'grade'.*got \['topic'\]"),
        ({"estimator": "beta"}, "need the estimator 'bayes-filter', got 'beta'"),
        ({"allocation": "paper"}, "need the estimator 'bayes-filter', got 'window'"),
        ({"prior": "nowhere"}, "nowhere"),
    ],
)
def test_features_that_cannot_work_are_refused_at_construction(tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        with_features(tmp_path, **settings)


def test_rates_of_an_earlier_run_are_a_feature(tmp_path):
    first = with_features(tmp_path / "first", feature_columns=[], max_steps=4, log_allocations=True)
    first.train()
    first.allocator.save(tmp_path / "state.npz")
    known = set(first.allocator.tracker.prompt_ids)
    for earlier in (tmp_path / "first", tmp_path / "first" / ALLOCATION_LOG, tmp_path / "state.npz"):
        second = with_features(tmp_path / "second", prior=str(earlier), max_steps=6)
        second.train()
        features = second.allocator.shared.features
        assert features.names == ["earlier rate", "grade", "length"]
        ids = second.allocator.tracker.prompt_ids
        missing = {
            prompt_id for prompt_id, code in zip(ids, features.codes(ids)[:, 0].tolist(), strict=True) if code == 0
        }
        assert missing == set(ids) - known
        assert known & set(ids)
        assert second.allocator.metrics()["allocation_failures"] == 0
