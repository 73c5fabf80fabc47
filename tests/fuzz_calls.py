"""Fuzz targets: every public function and method, and the verifiers. A target draws arguments, calls, and checks."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import knapsack_rl as kr
from fuzz_input import ODD, altered, ids, number, numbers, text
from knapsack_rl import groups
from knapsack_rl import ids as prompt_ids
from knapsack_rl.allocation.value import VALUES, marginal_values
from knapsack_rl.estimation.lengths import predict_work
from knapsack_rl.metrics import LOST_CAUSES
from knapsack_rl.report import page
from knapsack_rl.tasks.verifier import gold_answer, judge, last_boxed, literal, text_of

Target = Callable[[random.Random, Path], None]
ESTIMATORS = ("beta", "window", "empirical-bayes", "bayes-filter")


def check_counts(counts: Any, prompts: int, budget: int) -> None:
    assert counts.shape == (prompts,), counts
    assert counts.dtype == np.int64, counts.dtype
    assert (counts >= 0).all(), counts
    assert counts.sum() == budget, (counts, budget)


def allocate(dice: random.Random, folder: Path) -> None:
    size, low, high = dice.randrange(1, 6), dice.randrange(3), dice.randrange(3, 12)
    rates, budget = numbers(dice, size), dice.randrange(low * size, high * size + 1)
    if dice.random() < 0.2:
        budget, low, high = number(dice), number(dice), number(dice)
    value = "knapsack" if dice.random() < 0.6 else dice.choice((*VALUES, "odd", None))
    if dice.random() < 0.3:
        costs = numbers(dice, len(rates))
        found = kr.allocate(rates, budget, low, high, costs=costs, value=value)
        assert costs is None or (np.asarray(costs) * found.counts).sum() <= budget * (1 + 1e-9)
    else:
        found = kr.allocate(rates, budget, low, high, fallback=dice.random() < 0.5, value=value)
        check_counts(found.counts, len(rates), budget)
    assert (found.counts >= low).all() and (found.counts <= high).all(), "a count beyond its bounds"
    assert len(found.expand()) == found.counts.sum()
    if found.certificate is not None:
        assert found.certificate.gap >= -1e-9
        assert found.certificate.optimal == (found.certificate.gap == 0.0)


def allocator(dice: random.Random, folder: Path) -> None:
    """A short life of an allocator; after an error the same object must still serve a sane batch."""
    unit = dice.choice(("rollouts", "rollouts", "tokens"))
    one = kr.KnapsackAllocator(
        dice.choice(ESTIMATORS), dice.choice((0, 1, 2, 3)), dice.choice((4, 16)), budget_unit=unit
    )
    for _ in range(3):
        with contextlib.suppress(ValueError):
            _one_step(one, dice)
        sane = one.allocate(["sane", 1], 9).counts
        check_counts(sane, 2, 9 if unit == "rollouts" else sane.sum())
        metrics = one.metrics()
        assert metrics["allocation_failures"] == 0, "the estimator failed"
    again = kr.KnapsackAllocator(one.estimator_name, one.min_rollouts, one.max_rollouts, budget_unit=unit)
    again.load_state_dict(one.state_dict())
    assert again.allocate(["sane", "b"], 8).counts.tolist() == one.allocate(["sane", "b"], 8).counts.tolist()


def session(dice: random.Random, folder: Path) -> None:
    """A run of random settings and outcomes: plans add up, whatever was observed; the state is that of another run."""
    unit = dice.choice(("rollouts", "tokens"))
    settings = kr.AllocationSettings(
        allocation=dice.choice(("knapsack", "paper", "uniform")) if unit == "rollouts" else "knapsack",
        estimator=dice.choice(ESTIMATORS),
        budget_unit=unit,
        min_rollouts=dice.choice((0, 1, 2)) if unit == "rollouts" else 2,
        max_rollouts=dice.choice((4, 16)),
        success_threshold=number(dice) if dice.random() < 0.2 else 0.0,
    )
    settings.check_allocation(dice.choice((2, 3)))
    assert kr.AllocationSettings.of(settings) == settings and isinstance(settings.estimator_options, dict)
    columns = kr.AllocationSettings(feature_columns=["level", text(dice)])
    with contextlib.suppress(ValueError):  # a name that is not there
        columns.check_columns(["level", *ids(dice, 2)])
    one = kr.Session(settings, folder=folder, log_allocations=dice.random() < 0.5, watch=dice.random() < 0.2)
    for step in range(3):
        batch, mean, multiple = [*ids(dice, dice.randrange(4)), "sane"], dice.choice((2, 3)), dice.choice((1, 4))
        plan = one.plan(prompt_ids.check_prompt_ids(batch), mean, multiple=multiple)
        uniform = unit == "rollouts" or step == 0
        check_counts(plan.counts, len(plan.ids), mean * len(batch) if uniform else plan.counts.sum())
        assert plan.rows_of(batch).sum() == plan.counts.sum()
        rows = plan.expand()
        outcomes = [dice.choice((0.0, 1.0, 0.5, math.nan, math.inf)) for _ in rows]
        lengths = [dice.randrange(9) for _ in rows] if dice.random() < 0.8 else None
        if dice.random() < 0.2:
            plan, rows = one.arrived([plan.ids[row] for row in rows])
        if dice.random() < 0.3:
            one.lose(dice.choice(LOST_CAUSES), plan, rows if dice.random() < 0.5 else None, lengths)
            assert not one.allocator.failures["reporting"]
        one.observe(plan, rows, outcomes, lengths, step)
        if unit == "rollouts" and settings.allocation == "knapsack" and settings.estimator == "bayes-filter":
            one.note_features(plan.ids, {"x": [dice.choice((1, 2, None)) for _ in plan.ids]})
            first = one.plan_first(batch, 4)
            rows = first.expand()
            whole = one.plan_rest(first, 4 * len(batch), rows, [dice.choice((0.0, 1.0, math.nan)) for _ in rows])
            check_counts(whole.counts, len(whole.ids), 4 * len(batch))
        nameless = one.plan_unidentified(step + 1, mean)
        known = len(one.allocator.tracker)
        one.observe(nameless, nameless.expand(), [dice.choice((0.0, 1.0, math.nan)) for _ in nameless.expand()])
        assert len(one.allocator.tracker) == known
        one.adopt(["sane"], np.array([3]))
        assert one.predicted_lengths(["sane"]) is not None
    one.warn_once("topic", "message")
    assert one.survive("nothing", lambda: 1) == 1
    assert not one.allocator.failures, one.allocator.failures
    one.save(folder)
    twin = kr.Session(settings)
    twin.restore(folder / "knapsack_allocator.npz")
    assert twin.plan(["sane", "b"], 2).counts.tolist() == one.plan(["sane", "b"], 2).counts.tolist()


def features(dice: random.Random, size: int) -> dict[str, list[Any]]:
    """Columns of anything, now and then of another length or name."""
    values = (None, math.nan, math.inf, 1, 2.5, True, "a", "b", 10**400, [1])
    columns = {dice.choice("xyz"): [dice.choice(values) for _ in range(size + (dice.random() < 0.1))] for _ in range(2)}
    return columns if dice.random() < 0.9 else {}


def _one_step(one: kr.KnapsackAllocator, dice: random.Random) -> None:
    batch, budget = ids(dice, dice.randrange(5)), number(dice)
    if one.estimator_name == "bayes-filter" and dice.random() < 0.3:
        with contextlib.suppress(ValueError):
            one.note_features(batch, features(dice, len(batch)))
    if dice.random() < 0.2:
        found = one.adopt(batch, [dice.randrange(9) for _ in batch] if dice.random() < 0.8 else numbers(dice, 3))
    else:
        found = one.allocate(batch, budget)
        check_counts(found.counts, len(batch), budget if one.budget_unit == "rollouts" else found.counts.sum())
    rollouts = [batch[i] for i in found.expand()]
    if dice.random() < 0.3:
        so_far = found.counts if dice.random() < 0.8 else numbers(dice, len(batch))
        one.use_value(dice.choice(("knapsack", "likelihood-0.5", "odd")))
        check_counts(one.top_up(batch, so_far, [dice.randrange(3) for _ in batch], 5).counts, len(batch), 5)
    lengths = None if dice.random() < 0.5 else numbers(dice, len(rollouts))
    if dice.random() < 0.3:
        distinct, position = prompt_ids.numbered(rollouts)
        groups = one.outcomes_of(position, numbers(dice, len(rollouts)), len(distinct), keep=False)
        expected = one.expected_outcomes(distinct, groups)
        assert ((expected > 0) & (expected < 1)).all()
    one.observe(rollouts, numbers(dice, len(rollouts)), lengths)
    one.belief(ids(dice, 3))
    assert np.isfinite(one.predicted_lengths(ids(dice, 3))).all()


def states(dice: random.Random, folder: Path) -> None:
    """A state in memory in which something is another; what loads must still serve."""
    estimator = dice.choice(ESTIMATORS)
    one = kr.KnapsackAllocator(estimator)
    one.observe(["a", "a", 7], [1.0, 0.0, 1.0], [3, 4, 5])
    state = altered(dice, one.state_dict())
    if not isinstance(state, dict):
        state = {"header": state}
    twin = kr.KnapsackAllocator(estimator)
    try:
        twin.load_state_dict(state)
    finally:
        check_counts(twin.allocate(["a", 7, "b"], 12).counts, 3, 12)


def values(dice: random.Random, folder: Path) -> None:
    function = dice.choice((kr.value, kr.nonzero_gradient_probability))
    if dice.random() < 0.3:
        kr.information_gain(numbers(dice, 3))
    function(numbers(dice, 3) if dice.random() < 0.5 else number(dice), numbers(dice, 3))


def marginals(dice: random.Random, folder: Path) -> None:
    rates = numbers(dice, 3)
    table = marginal_values(rates if isinstance(rates, list) else [rates], dice.randrange(20))
    assert np.isfinite(table).all()
    assert (table >= 0).all()


def ragged(dice: random.Random, folder: Path) -> None:
    size = dice.randrange(8)
    group, reward = ids(dice, size), numbers(dice, size)
    if dice.random() < 0.5:
        found = kr.group_advantages(np.array(group), reward, dice.choice(("group", "batch", "none", "odd")))
        assert np.isfinite(found).all()
    else:
        kr.group_statistics(np.array(group), reward).as_dict()
        groups.group_statistics(np.array(group), reward)


def conformance(dice: random.Random, folder: Path) -> None:
    wrong = numbers(dice, 3)
    engine = dice.choice((kr.group_advantages, lambda group, reward: reward, lambda group, reward: wrong))
    with contextlib.suppress(AssertionError):
        kr.check_engine(engine, mean_rollouts=dice.randrange(5), scale=dice.choice(("group", "batch", "none", "odd")))


def balancing(dice: random.Random, folder: Path) -> None:
    work = numbers(dice, dice.randrange(6))
    queue = kr.RolloutQueue(work, ids(dice, len(work)) if dice.random() < 0.5 else None)
    order = list(queue)
    assert sorted(order) == list(range(len(work)))
    assert len(queue) == 0
    if order:
        back = dice.choice((*order, number(dice)))
        queue.requeue(back)
        assert list(queue) == [back]


def predictions(dice: random.Random, folder: Path) -> None:
    count = [dice.choice((0, 1, 5)) for _ in range(dice.randrange(5))]
    mean = [dice.randrange(1, 50) for _ in count]
    columns = [count, [c * m for c, m in zip(count, mean, strict=True)]]
    columns.append([c * m**2 for c, m in zip(count, mean, strict=True)])
    if dice.random() < 0.5:
        columns[dice.randrange(3)] = numbers(dice, len(count))
    work = predict_work(*columns)
    assert np.isfinite(work).all() and (work >= 0).all()


def identities(dice: random.Random, folder: Path) -> None:
    found = prompt_ids.check_prompt_ids(dice.choice((ids(dice, 4), dice.choice(ODD))))
    assert all(isinstance(one, (str, int)) for one in found)
    prompt_ids.stable_order(found)
    for one in found:
        twin = prompt_ids.other_type(one)
        assert twin is None or (str(twin) == str(one) and type(twin) is not type(one))


def verifiers(dice: random.Random, folder: Path) -> None:
    written = text(dice)
    for verifier in ("math", "number", "exact"):
        assert not judge(written, "-8675309.125", verifier, lambda given, right: False)
        with contextlib.suppress(ValueError):
            found = literal(gold_answer(written, verifier))
            assert found is None or abs(found) < 10**2200
    last_boxed(written)
    text_of(dice.choice((written, *ODD, [{"content": written}])))


def escaping(dice: random.Random, folder: Path) -> None:
    shown = page.escape(text(dice))
    assert not set('<>"') & set(shown)
    if dice.random() < 0.05:
        whole = page.document(text(dice), [page.table([text(dice)], [[text(dice)]], caption=text(dice))])
        assert "<script" not in whole
