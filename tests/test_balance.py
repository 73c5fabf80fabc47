"""Rollout balancer: predictions against independent formulas, placements against brute force."""

import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from cases import named_case
from knapsack_rl.balance import RolloutQueue
from knapsack_rl.estimation.lengths import predict_work

no_deadline = settings(deadline=None)  # the machine may be busy
whole_work = st.lists(st.integers(0, 1000), max_size=60)
real_work = hnp.arrays(np.float64, st.integers(0, 60), elements=st.floats(0, 1e6, allow_subnormal=False))
worker_counts = st.integers(1, 9)


def moments(lengths: Sequence[Sequence[float]]) -> tuple[list[int], list[float], list[float]]:
    """Counts, sums and sums of squares of per-prompt lengths."""
    return (
        [len(group) for group in lengths],
        [float(sum(group)) for group in lengths],
        [float(sum(x * x for x in group)) for group in lengths],
    )


def optimum(work: Sequence[int], workers: int) -> int:
    """The smallest makespan over every assignment."""
    best = sum(work)
    for assignment in itertools.product(range(workers), repeat=len(work)):
        loads = [0] * workers
        for item, worker in zip(work, assignment, strict=True):
            loads[worker] += item
        best = min(best, max(loads))
    return best


def load_benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "bench_balance.py"
    spec = importlib.util.spec_from_file_location("bench_balance", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- predict_work ------------------------------------------------------------------------------------------


def anova_by_hand(lengths: Sequence[Sequence[float]]) -> list[float]:
    """The same estimator from the raw lengths, by textbook sums of squares about the mean."""
    groups = [list(group) for group in lengths if group]
    everything = [x for group in groups for x in group]
    n_all, k = len(everything), len(groups)
    grand = statistics.fmean(everything)
    means = [statistics.fmean(group) for group in groups]
    within = sum((x - m) ** 2 for group, m in zip(groups, means, strict=True) for x in group) / (n_all - k)
    between_ms = sum(len(g) * (m - grand) ** 2 for g, m in zip(groups, means, strict=True)) / (k - 1)
    n0 = (n_all - sum(len(g) ** 2 for g in groups) / n_all) / (k - 1)
    between = (between_ms - within) / n0
    if between <= 0:
        return [grand] * len(lengths)
    # Generalised least squares: the inverse variance of each group's mean is its weight.
    weights = [1 / (between + within / len(g)) for g in groups]
    mu = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    return [
        mu if not group else mu + len(group) / (len(group) + within / between) * (statistics.fmean(group) - mu)
        for group in lengths
    ]


@no_deadline
@given(
    st.lists(st.lists(st.integers(1, 4096), max_size=12), min_size=2, max_size=12).filter(
        lambda groups: (
            sum(bool(g) for g in groups) >= 2 and any(len(set(g)) > 1 for g in groups)  # variances exist
        )
    )
)
def test_predictions_equal_the_textbook_estimator(lengths: list[list[int]]) -> None:
    expected = anova_by_hand(lengths)
    np.testing.assert_allclose(predict_work(*moments(lengths)), expected, rtol=1e-6)


def test_prediction_of_a_case_worked_by_hand() -> None:
    # Means 2 and 6, within (1+1+1+1)/2 = 2, between mean square 16, n0 = 2, between (16 - 2)/2 = 7,
    # factor 2 / (2 + 2/7) = 7/8, population mean 4.
    np.testing.assert_allclose(predict_work([2, 2, 0], [4, 12, 0], [10, 74, 0]), [2.25, 5.75, 4.0])


@pytest.mark.parametrize("seed", range(5))
def test_shrunken_predictions_beat_raw_means_and_the_population_mean(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = 400
    typical = 800 * rng.lognormal(0, 0.4, prompts)
    noise = 0.8
    expected = typical * np.exp(noise**2 / 2)  # mean of the lognormal
    count = rng.integers(1, 13, prompts)
    lengths = [t * rng.lognormal(0, noise, n) for t, n in zip(typical, count, strict=True)]
    total = np.array([group.sum() for group in lengths])
    total_squared = np.array([(group**2).sum() for group in lengths])

    def error(prediction: NDArray[np.float64]) -> float:
        return float(np.mean((prediction - expected) ** 2))

    shrunken = error(predict_work(count, total, total_squared))
    assert shrunken < 0.8 * error(total / count)
    assert shrunken < 0.8 * error(np.full(prompts, total.sum() / count.sum()))


@no_deadline
@given(st.data())
def test_predictions_are_finite_and_within_the_range_of_the_means(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 8))
    count = data.draw(hnp.arrays(np.float64, size, elements=st.floats(0, 2.0**53)))
    mean = data.draw(hnp.arrays(np.float64, size, elements=st.floats(0, 1e100)))
    spread = data.draw(hnp.arrays(np.float64, size, elements=st.floats(0, 1e3)))
    mean[mean < 1e-100] = 0.0  # its square would underflow
    predicted = predict_work(count, count * mean, count * mean**2 * (1 + spread))
    assert predicted.shape == (size,) and predicted.dtype == np.float64
    assert np.isfinite(predicted).all()
    if (count >= 1e-9).any():
        observed = mean[count >= 1e-9]
        assert (predicted >= observed.min() * (1 - 1e-9)).all()
        assert (predicted <= observed.max() * (1 + 1e-9)).all()
    else:
        assert (predicted == 1).all()


@no_deadline
@given(st.lists(st.lists(st.integers(0, 4096), max_size=6), max_size=8), st.sampled_from([1e-3, 7.0, 1e6]), st.data())
def test_predictions_follow_the_unit_and_the_order_of_prompts(
    lengths: list[list[int]], unit: float, data: st.DataObject
) -> None:
    count, total, total_squared = map(np.array, moments(lengths))
    predicted = predict_work(count, total, total_squared)
    if count.any():
        scaled = predict_work(count, unit * total, unit**2 * total_squared)
        np.testing.assert_allclose(scaled, unit * predicted, rtol=1e-6)
    order = np.array(data.draw(st.permutations(range(len(lengths)))), dtype=np.int64)
    permuted = predict_work(count[order], total[order], total_squared[order])
    np.testing.assert_allclose(permuted, predicted[order], rtol=1e-6)


def test_degenerate_observations() -> None:
    for lengths, expected in [
        ([], []),
        ([[], [], []], [1, 1, 1]),  # nothing observed
        ([[0, 0], [0]], [0, 0]),  # observed, and empty
        ([[10, 30], [], []], [20, 20, 20]),  # one seen prompt
        ([[10], [30], []], [15, 25, 20]),  # one rollout each: half way
        ([[10, 10], [30, 30], []], [10, 30, 20]),  # no noise
        ([[7, 7, 7], [7], []], [7, 7, 7]),  # no variance at all
        ([[10, 30], [12, 28, 20], []], [20, 20, 20]),  # nothing between prompts
    ]:
        with named_case(lengths=lengths, expected=expected):
            np.testing.assert_allclose(predict_work(*moments(lengths)), expected, rtol=1e-12)


def test_a_prompt_whose_count_was_discounted_away_counts_as_unseen() -> None:
    predicted = predict_work([2, 2, 1e-12], [4, 12, 1e-6], [10, 74, 1.0])
    np.testing.assert_allclose(predicted, [2.25, 5.75, 4.0])


def test_sums_may_be_discounted_until_they_vanish() -> None:
    count, total, total_squared = np.array([2.0]), np.array([4000.0]), np.array([9e6])
    for _ in range(1200):
        predicted = predict_work(count, total, total_squared)
        assert predicted[0] == pytest.approx(2000.0) or predicted[0] == 1.0
        count, total, total_squared = 0.5 * count, 0.5 * total, 0.5 * total_squared
    assert count[0] == total[0] == total_squared[0] == 0.0
    assert predict_work(count, total, total_squared)[0] == 1.0


def test_predict_work_rejects() -> None:
    for arguments, message in [
        (([1, 2], [1], [1]), r"shapes \(2,\), \(1,\) and \(1,\); allowed: one shape"),
        (([[1]], [1], [1]), r"count has shape \(1, 1\); allowed: one dimension"),
        (([-1], [1], [1]), r"count\[0\] is -1.0; allowed: numbers from 0 to 9.0072e\+15"),
        (([1e17], [1], [1]), r"count\[0\] is 1e\+17; allowed"),
        (([1], [np.nan], [1]), r"total\[0\] is nan; allowed"),
        (([1], [1], [np.inf]), r"total_squared\[0\] is inf; allowed"),
        (([2, 2], [4, 9], [10, 1]), r"prompt 1 has count 2, total 9, total_squared 1; allowed"),
        (([0], [3], [9]), r"prompt 0 has count 0, total 3, total_squared 9; allowed"),
        (([0], [0], [9]), r"prompt 0 has count 0, total 0, total_squared 9; allowed"),
    ]:
        with named_case(arguments=arguments, message=message), pytest.raises(ValueError, match=message):
            predict_work(*arguments)


# --- static placement, in the benchmark ---------------------------------------------------------------------


@no_deadline
@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_a_static_placement_is_within_grahams_bound_of_the_optimum(work: list[int], workers: int) -> None:
    benchmark, best = load_benchmark(), optimum(work, workers)
    placed = benchmark.longest_first(np.array(work), workers)
    makespan = max(sum(w for w, worker in zip(work, placed, strict=True) if worker == k) for k in range(workers))
    assert benchmark.lower_bound(np.array(work), workers) <= best * (1 + 1e-12)
    assert best <= makespan <= (4 / 3 - 1 / (3 * workers)) * best * (1 + 1e-12)


def test_lower_bound_uses_the_pair_that_must_share_a_worker() -> None:
    bound = load_benchmark().lower_bound
    assert bound(np.array([6, 6, 6]), 2) == 12  # the mean load is 9, the longest item 6
    assert bound(np.array([6, 6]), 2) == 6  # as many items as workers: nobody has to share
    assert bound(np.array([9, 1]), 4) == 9


# --- RolloutQueue ------------------------------------------------------------------------------------------


@no_deadline
@given(whole_work)
def test_queue_hands_out_each_item_once_longest_first(work: list[int]) -> None:
    queue = RolloutQueue(work)
    assert len(queue) == len(work)
    assert list(queue) == sorted(range(len(work)), key=lambda item: (-work[item], item))
    assert len(queue) == 0
    assert next(queue, None) is None


def test_the_order_is_never_shuffled() -> None:
    """Public balancers computed an order and then shuffled it, without a seed."""
    work = np.random.default_rng(0).lognormal(6, 1, 500)
    expected = np.argsort(-work, kind="stable").tolist()
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what must not be used
        states = random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002
        assert list(RolloutQueue(work, ids=[item // 5 for item in range(500)])) == expected
        assert states == (random.getstate(), repr(np.random.get_state(legacy=False)))  # noqa: NPY002


def test_equal_predictions_go_out_prompt_by_prompt() -> None:
    queue = RolloutQueue([5, 5, 5, 9, 5, 5], ids=["b", "a", "b", "c", "a", "b"])
    assert list(queue) == [3, 0, 2, 5, 1, 4]


@no_deadline
@given(whole_work.filter(bool), st.data())
def test_requeued_items_take_their_place_by_predicted_length(work: list[int], data: st.DataObject) -> None:
    queue = RolloutQueue(work)
    taken = [next(queue) for _ in range(data.draw(st.integers(1, len(work))))]
    failed = data.draw(st.lists(st.sampled_from(taken), unique=True))
    for item in failed:
        queue.requeue(item)
    waiting = set(range(len(work))) - set(taken) | set(failed)
    assert len(queue) == len(waiting)
    assert list(queue) == sorted(waiting, key=lambda item: (-work[item], item))


def test_requeue_rejects_items_that_are_not_out() -> None:
    queue = RolloutQueue([1.0, 2.0])
    for index in (0, 1, 2, -1):
        with pytest.raises(ValueError, match=f"item {index} is not handed out; allowed: .* of 0 to 1; requeue"):
            queue.requeue(index)
    assert next(queue) == 1
    queue.requeue(1)
    with pytest.raises(ValueError, match="item 1 is not handed out"):
        queue.requeue(1)
    assert list(queue) == [1, 0]


def test_queue_rejects_bad_work_and_ids() -> None:
    with pytest.raises(ValueError, match=r"work\[0\] is -1.0; allowed"):
        RolloutQueue([-1])
    with pytest.raises(ValueError, match="ids has 1 entries for 2 items; allowed: one per item; repeat"):
        RolloutQueue([1, 2], ids=["a"])


def test_threads_share_a_queue_without_losing_or_repeating_an_item() -> None:
    items = 4000
    queue = RolloutQueue(np.random.default_rng(0).lognormal(0, 1, items))
    done: list[list[int]] = [[] for _ in range(8)]
    failed_once: list[set[int]] = [set() for _ in range(8)]
    start = threading.Barrier(8)

    def work(worker: int) -> None:
        start.wait()
        for item in queue:
            if item % 10 == worker and item not in failed_once[worker]:
                failed_once[worker].add(item)
                queue.requeue(item)
            else:
                done[worker].append(item)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # provoke interleavings
    try:
        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(itertools.chain.from_iterable(done)) == list(range(items))
    assert any(failed_once)


# --- the module and its benefit ---------------------------------------------------------------------------


def test_the_benchmark_meets_its_target() -> None:
    rows = {row["way"]: row for row in load_benchmark().run(range(3))}
    longest_first = rows["pull, longest predicted first"]
    assert 1 <= longest_first["min"] <= longest_first["mean"] <= longest_first["max"] <= 1.05
    for way in ("shuffle, equal shares", "static, groups by N_i", "pull, random order"):
        assert longest_first["mean"] < rows[way]["mean"]
    assert rows["static, predicted lengths"]["mean"] < rows["static, groups by N_i"]["mean"]


def test_the_benchmark_reports_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "balance.json"
    assert load_benchmark().main(["--seeds", "1", "--json", str(report)]) == 0
    assert "pull, longest predicted first" in capsys.readouterr().out
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["target_met"] is True and len(content["rows"]) == 6


def test_importing_the_balancer_imports_no_heavy_package() -> None:
    code = "import sys, knapsack_rl.balance; print(sorted({'torch', 'scipy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
