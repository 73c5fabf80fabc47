"""The tracker against plain lists of outcomes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import named_case
from knapsack_rl.estimation.tracker import COLUMNS, RECENT, Tracker
from knapsack_rl.ids import check_prompt_ids, numbered, stable_order
from strategies import no_deadline, visits

prompt_ids = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=6))


def newest_outcomes(tracker: Tracker, prompt_id) -> list[bool]:
    """Outcomes kept in the bits, newest first."""
    records = tracker.lookup([prompt_id])
    kept = min(int(records.rollouts[0]), RECENT)
    assert int(records.recent[0]) >> kept == 0  # nothing beyond what was observed
    return [bool(int(records.recent[0]) >> age & 1) for age in range(kept)]


@st.composite
def runs(draw: st.DrawFn) -> list[list[tuple[object, bool, float]]]:
    """Batches of a run: rows (id, outcome, length) in the order of scoring, prompts in any mixture."""
    pool = draw(st.lists(prompt_ids, min_size=1, max_size=5, unique=True))
    row = st.tuples(st.sampled_from(pool), st.booleans(), st.integers(0, 5000).map(float))
    return draw(st.lists(st.lists(row, min_size=1, max_size=150), min_size=1, max_size=5))


def record(tracker: Tracker, batch, discount: float) -> None:
    """Record a batch; what an estimator would keep is a running sum of the prompt's rollouts and visits."""
    ids = list(dict.fromkeys(row[0] for row in batch))
    width = tracker.records().evidence.shape[1]
    rollouts = np.array([sum(row[0] == prompt_id for row in batch) for prompt_id in ids])
    tracker.record(
        ids,
        np.array([ids.index(row[0]) for row in batch]),
        np.array([row[1] for row in batch]),
        np.array([row[2] for row in batch]),
        discount=discount,
        evidence=tracker.lookup(ids).evidence + rollouts[:, None] + np.arange(width),
    )


@no_deadline
@given(runs(), st.sampled_from([1.0, 0.8, 0.5]))
def test_records_match_a_model_of_lists(run, discount: float) -> None:
    tracker = Tracker()
    model: dict[object, list[list[tuple[bool, float]]]] = {}
    for batch in run:
        record(tracker, batch, discount)
        for prompt_id in dict.fromkeys(row[0] for row in batch):
            model.setdefault(prompt_id, []).append([row[1:] for row in batch if row[0] == prompt_id])
    assert tracker.prompt_ids == list(model)
    assert len(tracker) == len(model)
    records = tracker.records()
    for row, (prompt_id, history) in enumerate(model.items()):
        outcomes = [outcome for visit in history for outcome, _ in visit]
        assert newest_outcomes(tracker, prompt_id) == outcomes[::-1][:RECENT]
        assert records.rollouts[row] == len(outcomes)
        assert records.visits[row] == len(history)
        newest = [outcome for outcome, _ in history[-1]]
        assert (records.newest_successes[row], records.newest_total[row]) == (sum(newest), len(newest))
        weights = [discount ** (len(history) - 1 - k) for k in range(len(history))]

        def discounted(of, history=history, weights=weights) -> float:
            return sum(w * sum(of(*entry) for entry in visit) for w, visit in zip(weights, history, strict=True))

        assert records.successes[row] == pytest.approx(discounted(lambda good, _: good), rel=1e-12)
        assert records.failures[row] == pytest.approx(discounted(lambda good, _: not good), rel=1e-12)
        assert records.length_count[row] == pytest.approx(discounted(lambda *_: 1), rel=1e-12)
        assert records.length_sum[row] == pytest.approx(discounted(lambda _, n: n), rel=1e-12)
        assert records.length_squares[row] == pytest.approx(discounted(lambda _, n: n * n), rel=1e-12)


@no_deadline
@given(visits(max_rollouts=140))
def test_recent_bits_of_one_prompt(history: list[list[bool]]) -> None:
    tracker, everything = Tracker(), []
    for outcomes in history:
        tracker.record(["a"], np.zeros(len(outcomes), dtype=np.int64), np.array(outcomes))
        everything += outcomes
        assert newest_outcomes(tracker, "a") == everything[::-1][:RECENT]


def test_recent_bits_at_the_width_of_the_word() -> None:
    for size in [1, 63, 64, 65, 128]:
        with named_case(size=size):
            tracker = Tracker()
            for good in (True, False, True):
                tracker.record(["a", "b"], np.repeat([0, 1], [size, 1]), np.full(size + 1, good))
            assert newest_outcomes(tracker, "a") == ([True] * size + [False] * size + [True] * size)[:RECENT]
            assert newest_outcomes(tracker, "b") == [True, False, True]


def test_unseen_prompts_are_all_zero() -> None:
    tracker = Tracker()
    for column in COLUMNS:
        assert getattr(tracker.lookup(["x", 3]), column).tolist() == [0, 0]
    tracker.record(["a"], np.array([0, 0]), np.array([True, False]))
    assert tracker.rows(["x", "a", 0]).tolist() == [-1, 0, -1]
    found = tracker.lookup(["x", "a", "x"])
    assert found.rollouts.tolist() == [0, 2, 0]
    assert found.successes.tolist() == [0.0, 1.0, 0.0]
    assert len(tracker) == 1  # a lookup is not an observation


def test_lookup_is_a_copy() -> None:
    tracker = Tracker()
    tracker.record(["a"], np.array([0]), np.array([True]))
    tracker.lookup(["a"]).successes[:] = 99.0
    assert tracker.records().successes.tolist() == [1.0]


def test_prompts_not_in_the_batch_keep_their_counts() -> None:
    tracker = Tracker()
    tracker.record(["a", "b"], np.array([0, 1]), np.array([True, True]), discount=0.5)
    tracker.record(["b"], np.array([0]), np.array([False]), discount=0.5)
    assert tracker.lookup(["a", "b"]).successes.tolist() == [1.0, 0.5]
    assert tracker.lookup(["a", "b"]).failures.tolist() == [0.0, 1.0]


def test_lengths_may_be_unknown() -> None:
    tracker = Tracker()
    tracker.record(["a"], np.array([0, 0]), np.array([True, False]), np.array([10.0, 30.0]))
    tracker.record(["a"], np.array([0]), np.array([True]), discount=0.5)
    records = tracker.records()
    assert (records.length_count[0], records.length_sum[0], records.length_squares[0]) == (2.0, 40.0, 1000.0)


def test_the_tracker_grows() -> None:
    tracker = Tracker()
    for start in range(0, 3000, 7):
        ids = list(range(start, start + 7))
        tracker.record(ids, np.repeat(np.arange(7), 2), np.tile([True, False], 7))
    assert len(tracker) == 3003
    assert len(tracker.records()) == 3003
    assert (tracker.records().rollouts == 2).all()
    assert tracker.rows([0, 1500, 3002, 3003]).tolist() == [0, 1500, 3002, -1]


# --- evidence and age ---


@no_deadline
@given(runs(), st.integers(0, 3))
def test_evidence_is_kept_per_prompt(run, width: int) -> None:
    tracker = Tracker(evidence_size=width)
    for batch in run:
        record(tracker, batch, 0.8)
    records = tracker.records()
    assert records.evidence.shape == (len(tracker), width)
    assert records.evidence.dtype == np.float32
    expected = records.rollouts[:, None] + records.visits[:, None] * np.arange(width)
    np.testing.assert_array_equal(records.evidence, expected)
    turned = tracker.prompt_ids[::-1]
    np.testing.assert_array_equal(tracker.lookup(turned).evidence, expected[::-1])
    assert tracker.lookup(["no such prompt"]).evidence.tolist() == [[0.0] * width]


def visit_all(tracker: Tracker, ids) -> None:
    """One rollout for every prompt."""
    tracker.record(list(ids), np.arange(len(ids)), np.ones(len(ids), bool))


@no_deadline
@given(runs())
def test_age_counts_batches_until_the_next_one(run) -> None:
    tracker = Tracker()
    batches = [list(dict.fromkeys(row[0] for row in batch)) for batch in run]
    for batch in run:
        record(tracker, batch, 0.8)
    newest = {prompt_id: step for step, ids in enumerate(batches) for prompt_id in ids}
    for prompt_id, step in newest.items():
        assert tracker.lookup([prompt_id]).age[0] == pytest.approx((len(run) - step) / tracker.epoch, rel=1e-12)
    np.testing.assert_array_equal(tracker.records().age, tracker.lookup(tracker.prompt_ids).age)
    assert tracker.lookup(["no such prompt"]).age.tolist() == [0.0]


@pytest.mark.parametrize(("prompts", "size"), [(12, 12), (12, 3), (60, 5), (7, 1)])
@pytest.mark.parametrize("retired", [0, 500])
def test_an_epoch_is_the_usual_time_between_visits(prompts: int, size: int, retired: int) -> None:
    """Prompts that never come back do not count, and an age is one where every prompt comes once an epoch."""
    tracker = Tracker()
    for first in range(0, retired, size):
        visit_all(tracker, [f"retired {k}" for k in range(first, min(first + size, retired))])
    for _ in range(12):
        for first in range(0, prompts, size):
            visit_all(tracker, range(first, min(first + size, prompts)))
    assert tracker.epoch == pytest.approx(-(-prompts // size))
    assert tracker.lookup([0]).age[0] == pytest.approx(1.0)
    assert tracker.lookup([prompts - 1]).age[0] == pytest.approx(1.0 / tracker.epoch)


def test_the_length_of_an_epoch_follows_a_change_of_the_data() -> None:
    tracker = Tracker()
    assert tracker.epoch == 1.0
    for size, epochs in ((1, 10), (40, 6), (4, 60)):
        for _ in range(epochs):
            for prompt in range(size):
                visit_all(tracker, [prompt])
        assert tracker.epoch == pytest.approx(size, rel=0.1)


def test_the_state_keeps_the_time_and_the_skips() -> None:
    tracker = Tracker()
    for ids in (["a", "b"], ["c"], ["a"], ["a", "c"]):
        visit_all(tracker, ids)
    tracker.skip(["b", "never seen"])
    tracker.skip(["b", "c"])
    twin = restored(tracker)
    for one in (tracker, twin):
        assert one.lookup(["a", "b", "c", "never seen"]).skips.tolist() == [0, 2, 1, 0]
        assert len(one) == 3
        visit_all(one, ["b"])
        assert one.lookup(["a", "b", "c"]).skips.tolist() == [0, 0, 1]
    assert (twin.clock, twin.epoch) == (tracker.clock, tracker.epoch)
    np.testing.assert_array_equal(twin.records().age, tracker.records().age)


# --- identity (mistake 6) ---


def test_seven_and_seven_are_different_prompts() -> None:
    tracker = Tracker()
    tracker.record([7, "7"], np.array([0, 0, 1]), np.array([True, True, False]))
    assert tracker.lookup([7, "7"]).successes.tolist() == [2.0, 0.0]
    tracker = restored(tracker)
    assert tracker.lookup([7, "7"]).successes.tolist() == [2.0, 0.0]
    assert tracker.prompt_ids == [7, "7"]
    first, second = stable_order([7, "7"])
    assert first != second


@given(st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["0", "1", "a"])), max_size=20))
@no_deadline
def test_rows_are_numbered_in_the_order_of_first_appearance(ids) -> None:
    distinct, place_R = numbered(ids)
    assert len(set(distinct)) == len(distinct)
    assert place_R.dtype == np.int64 and place_R.shape == (len(ids),)
    assert [distinct[place] for place in place_R] == ids
    first_rows = [place_R.tolist().index(k) for k in range(len(distinct))]
    assert first_rows == sorted(first_rows)


def test_numpy_ids_become_plain() -> None:
    for ids in [
        np.array([3, 4], dtype=np.int32),
        np.array(["a", "b"]),
        [np.int64(3), np.str_("x")],
        (3, "x"),
        iter([3, "x"]),
        np.array([3, "x"], dtype=object),
        np.array([np.uint8(3), np.str_("x")], dtype=object),
    ]:
        with named_case(ids=ids):
            found = check_prompt_ids(ids)
            assert len(found) == 2
            assert {type(prompt_id) for prompt_id in found} <= {int, str}
            assert found[0] in (3, "a")


def test_other_ids_are_refused() -> None:
    for bad in [None, 1.0, np.float64(2.0), True, np.bool_(False), float("nan"), b"bytes", ("a",), ["a"], {"id": 1}]:
        with named_case(bad=bad), pytest.raises(ValueError, match=r"prompt_ids\[1\] is .*a string or a whole number"):
            check_prompt_ids(["fine", bad])


def test_arrays_of_other_ids_are_refused() -> None:
    for bad in (np.array([1.0, 2.0]), np.array([True]), np.array([["a", "b"]])):
        with pytest.raises(ValueError, match=r"prompt_ids\[0\]"):
            check_prompt_ids(bad)


def test_one_string_is_not_a_batch_of_letters() -> None:
    with pytest.raises(ValueError, match="prompt_ids"):
        check_prompt_ids("abc")


def test_the_last_tie_break_is_the_same_in_every_process() -> None:
    ids = ["a", 7, "7", "é", -3]
    code = f"from knapsack_rl.ids import stable_order; print(stable_order({ids!r}).tolist())"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{stable_order(ids).tolist()}\n"}


# --- state ---


def restored(tracker: Tracker) -> Tracker:
    twin = Tracker(tracker.records().evidence.shape[1])
    twin.load_state_dict(tracker.state_dict())
    return twin


@no_deadline
@given(runs())
def test_a_restored_tracker_continues_identically(run) -> None:
    tracker = Tracker(evidence_size=3)
    for batch in run:
        twin = restored(tracker)
        record(tracker, batch, 0.8)
        record(twin, batch, 0.8)
        assert twin.prompt_ids == tracker.prompt_ids
        for column in (*COLUMNS, "evidence", "age"):
            one, other = getattr(tracker.records(), column), getattr(twin.records(), column)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@given(st.lists(prompt_ids, unique=True, max_size=8))
def test_ids_keep_their_type_and_text(ids) -> None:
    tracker = Tracker()
    if ids:
        tracker.record(ids, np.arange(len(ids)), np.ones(len(ids), dtype=bool))
    found = restored(tracker).prompt_ids
    assert found == ids
    assert [type(prompt_id) for prompt_id in found] == [type(prompt_id) for prompt_id in ids]


def test_a_state_is_plain_arrays_and_a_copy() -> None:
    tracker = Tracker()
    tracker.record(["a", 2], np.array([0, 1]), np.array([True, False]))
    state = tracker.state_dict()
    assert set(state) == {"prompt_ids", "evidence", "clock", "revisits", *COLUMNS}
    assert all(array.dtype.kind != "O" for array in state.values())
    state["rollouts"][:] = 9
    assert tracker.records().rollouts.tolist() == [1, 1]
    twin = Tracker()
    twin.load_state_dict(state)
    state["rollouts"][:] = 5
    assert twin.records().rollouts.tolist() == [9, 9]


def as_ids(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def test_a_damaged_state_is_refused_and_changes_nothing() -> None:
    for name, array, message in [
        ("prompt_ids", as_ids(["a", "a"]), "not distinct"),
        ("prompt_ids", as_ids(["a", None]), "not distinct|is None|is 1.5"),
        ("prompt_ids", as_ids(["a", 1.5]), "not distinct|is None|is 1.5"),
        ("prompt_ids", as_ids(["a"]), r"column .* has shape \(2,\)"),
        ("prompt_ids", as_ids([["a"], ["b"]]), "ids"),
        ("prompt_ids", as_ids(5), "ids"),
        ("prompt_ids", np.frombuffer(b"[", dtype=np.uint8), None),
        ("successes", np.zeros(3), r"column successes .*shape \(3,\).*expected \(2,\) of float64"),
        ("successes", np.zeros(2, dtype=np.float32), "column successes .*float32.*expected .*float64"),
        ("recent", np.zeros(2, dtype=np.int64), "column recent"),
        ("visits", None, r"lacks .*'visits'"),
        ("evidence", np.zeros((2, 3), np.float64), r"evidence .*float64, expected \(2, 3\) of float32"),
        ("evidence", np.zeros((2, 2), np.float32), r"evidence .*shape \(2, 2\).*expected \(2, 3\)"),
        ("evidence", np.zeros(2, np.float32), r"evidence .*shape \(2,\).*expected \(2, 3\)"),
        ("evidence", None, "lacks .*'evidence'"),
        ("last_visit", None, "lacks .*'last_visit'"),
        ("last_visit", np.zeros(2), "column last_visit .*float64.*expected .*int64"),
        ("last_visit", np.array([1, 2]), "last_visit or visits of 2 after its 1 batches"),
        ("visits", np.array([3, 1]), "visits <= rollouts must hold, row 0"),
        ("skips", None, "lacks .*'skips'"),
        ("skips", np.array([0, -1]), "column skips .*finite numbers >= 0"),
        ("clock", None, "lacks .*'clock'"),
        ("clock", np.array([-1]), "last_visit or visits of 1 after its -1 batches"),
        ("clock", np.array([1.0]), "column clock .*float64.*expected .*int64"),
        ("revisits", None, "lacks .*'revisits'"),
        ("revisits", np.zeros(3), r"column revisits .*shape \(3,\).*expected \(2,\)"),
        ("revisits", np.array([np.nan, 0.0]), "weight >= 0 .*got nan and 0.0"),
        ("revisits", np.array([1.0, 0.5]), "its logs of 1 to 1 batches, got 1.0 and 0.5"),
    ]:
        with named_case(name=name, array=array, message=message):
            tracker = Tracker(evidence_size=3)
            tracker.record(["a", 2], np.array([0, 1]), np.array([True, False]))
            state = tracker.state_dict()
            if array is None:
                del state[name]
            else:
                state[name] = array
            before = tracker.state_dict()
            with pytest.raises(ValueError, match=message):
                tracker.load_state_dict(state)
            for key, column in tracker.state_dict().items():
                np.testing.assert_array_equal(column, before[key])
