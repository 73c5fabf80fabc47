"""Features as codes: texts, numbers, missing values, bounds, refusals and states."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knapsack_rl.estimation.features import JOINT, MISSING, MOST_BINS, MOST_COLUMNS, MOST_VALUES, OTHER, Features
from strategies import no_deadline


def coded(*batches: dict[str, list], column: int = 0) -> list[list[int]]:
    """Codes of a column, batch by batch; every prompt comes once."""
    features, found, start = Features(), [], 0
    for batch in batches:
        ids = list(range(start, start := start + len(next(iter(batch.values())))))
        features.note(ids, batch)
        found.append(features.codes(ids)[:, column].tolist())
    return found


def test_texts_are_categories_in_order_of_appearance():
    assert coded({"topic": ["a", "b", "a"]}, {"topic": ["c", "a", None]}) == [[2, 3, 2], [4, 2, MISSING]]


def test_few_numbers_are_told_apart_and_later_ones_go_to_the_nearest():
    assert coded({"x": [1.5, 5, 3, 1.5]}, {"x": [1.9, 2.3, 100, -7]}) == [[2, 3, 4, 2], [2, 4, 3, 2]]


def test_levels_that_the_first_batch_lacks_have_a_code_too():
    assert coded({"level": [1, 5, 3.0]}, {"level": [4, 2, 1, 6, -3, 1000, 2000]}) == [[2, 3, 4], [5, 6, 2, 7, 8, 9, 9]]
    assert coded({"level": [1, 5, 18]}, {"level": [4, 2]}) == [[2, 3, 4], [3, 2]]  # not levels: the range is too large
    (huge,) = coded({"x": [2.0**60, 2.0**60]})
    assert huge == [2, 2]


def test_many_numbers_are_divided_into_bins_of_equal_share():
    numbers = np.random.default_rng(0).lognormal(size=1600)
    (codes,) = coded({"length": numbers})
    assert len(set(codes)) == MOST_BINS
    assert np.bincount(codes)[2:].tolist() == [100] * MOST_BINS
    order = np.array(codes)[np.argsort(numbers)]  # a bin holds neighbours
    assert (np.diff(order) != 0).sum() == MOST_BINS - 1


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.float32, lambda values: list(np.array(values))])
def test_numbers_may_come_in_arrays(kind):
    assert coded({"level": kind([1, 2, 1])}, {"level": [2, 1]}) == [[2, 3, 2], [3, 2]]


def test_booleans_are_categories():
    assert coded({"hard": [True, False, True]}, {"hard": np.array([False, True])}) == [[2, 3, 2], [3, 2]]


@pytest.mark.parametrize("missing", [None, math.nan, np.float32("nan")])
@pytest.mark.parametrize("value", ["a", 3.0])
def test_missing_values_share_a_code_and_do_not_decide_what_a_column_holds(missing, value):
    first, later = coded({"x": [missing, missing]}, {"x": [missing, value]})
    assert first == [MISSING, MISSING]
    assert later == [MISSING, 2]
    numbers = isinstance(value, float)
    batches = {"x": [missing]}, {"x": [value]}, {"x": ["text"]}
    if numbers:
        with pytest.raises(ValueError, match="feature 'x' holds numbers"):
            coded(*batches)
    else:
        assert coded(*batches)[2] == [3]


def test_infinite_numbers_are_the_ends():
    assert coded({"x": [1.0, 2.5, math.inf, -math.inf]}) == [[2, 3, 3, 2]]
    assert coded({"x": [math.inf, -math.inf]}, {"x": [3]}) == [[2, 2], [2]]


def test_values_without_a_code_left_share_one():
    features = Features()
    features.note(range(10_000), {"name": [f"text {k}" for k in range(10_000)]})
    codes = features.codes(range(10_000))[:, 0]
    assert codes.max() == MOST_VALUES - 1
    assert (codes[MOST_VALUES - 2 :] == OTHER).all()
    assert len(set(codes[: MOST_VALUES - 2].tolist())) == MOST_VALUES - 2


def test_several_columns_have_one_of_their_combinations():
    features = Features()
    features.note("wxyz", {"b": [1, 1, 2, 2], "a": ["p", "q", "p", "p"]})
    assert [column.name for column in features.columns] == ["a", "b", JOINT]
    assert features.names == ["a", "b"]
    assert features.codes("wxyz").tolist() == [[2, 2, 2], [3, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert features.codes(["w", "new"]).tolist()[1] == [-1, -1, -1]


def test_new_features_replace_old_ones():
    features = Features()
    features.note(["p"], {"x": ["old"]})
    features.note(["p"], {"x": ["new"]})
    assert features.codes(["p"]).tolist() == [[3]]
    assert len(features) == 1


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "1 to 16 named columns"),
        ({f"c{k}": [1, 2] for k in range(MOST_COLUMNS + 1)}, "1 to 16 named columns"),
        ({JOINT: [1, 2], "x": [1, 2]}, "none of them 'all columns together'"),
        ({"x": [1]}, r"one value per prompt \(2\), got 1"),
        ({"x": "ab"}, "must be a list of 2 values"),
        ({"x": 7}, "must be a list of 2 values"),
        ({"x": {1: 2, 3: 4}}, "must be a list of 2 values"),
        ({"x": [10**400, 1]}, "feature 'x' holds numbers"),
        ([[1, 2]], "must map names to columns"),
    ],
)
def test_what_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Features().note(["p", "q"], features)


def test_other_columns_later_are_refused():
    features = Features()
    features.note(["p"], {"x": [1], "y": [2]})
    for other in ({"x": [1]}, {"x": [1], "z": [2]}, {"x": [1], "y": [2], "z": [3]}):
        with pytest.raises(ValueError, match=r"columns of the first batch, \['x', 'y'\]"):
            features.note(["p"], other)


def test_a_refused_first_batch_decides_nothing():
    features = Features()
    with pytest.raises(ValueError, match="holds numbers"):
        features.note(["p"], {"x": [10**400]})
    assert not features.columns
    features.note(["p"], {"y": ["a"]})
    assert features.codes(["p"]).tolist() == [[2]]


VALUES = st.one_of(st.none(), st.text(max_size=3), st.integers(-3, 3), st.floats(), st.booleans())


@no_deadline
@given(st.lists(st.tuples(VALUES, st.sampled_from(["a", "b", None])), min_size=1, max_size=20), st.integers(1, 20))
def test_equal_values_have_equal_codes_and_a_restored_state_goes_on_alike(rows, cut):
    one, ids = Features(), list(range(len(rows)))

    def note(features, some):
        features.note(some, {"x": [rows[k][0] for k in some], "y": [rows[k][1] for k in some]})

    try:
        note(one, ids[:cut])
        other = Features()
        other.load_state_dict(one.state_dict())
        if ids[cut:]:
            note(one, ids[cut:])
            note(other, ids[cut:])
    except ValueError as error:
        assert "holds numbers" in str(error)  # a column of numbers got a text
        return
    codes = one.codes(ids)
    np.testing.assert_array_equal(codes, other.codes(ids))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(np.array_equal(array, other.state_dict()[name]) for name, array in one.state_dict().items())
    for row, code in zip(rows, codes.tolist(), strict=True):
        same = [other for other, c in zip(rows, codes.tolist(), strict=True) if c[2] == code[2]]
        assert all(c[:2] == code[:2] for c in codes[codes[:, 2] == code[2]].tolist())
        assert row in same or row[0] != row[0]
        assert (code[1] == MISSING) == (row[1] is None)
        if row[0] is None or row[0] != row[0]:
            assert code[0] == MISSING
    texts = {}
    for (value, _), (code, *_) in zip(rows, codes.tolist(), strict=True):
        if code != MISSING:
            assert texts.setdefault((type(value), value), code) == code


def damaged(**changes) -> dict:
    features = Features()
    features.note(["p", "q"], {"x": ["a", "b"], "y": [1.5, 2.5]})
    state = features.state_dict()
    found = json.loads(state["features"].tobytes())
    state["codes"] = changes.pop("codes", state["codes"])
    for name, value in changes.items():
        part = found if name in found else found["columns"][1]
        part[name] = value
    return state | {"features": np.frombuffer(json.dumps(found).encode(), np.uint8)}


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": np.full((2, 3), 9)},
        {"codes": np.full((2, 3), -1)},
        {"codes": np.full((2, 2), 2)},
        {"codes": np.full((2, 3), 2.0)},
        {"prompt_ids": ["p", "p"]},
        {"prompt_ids": ["p", 1.5]},
        {"prompt_ids": None},
        {"edges": [2.0, 1.0]},
        {"edges": ["a"]},
        {"edges": [math.inf]},
        {"values": [0, 0]},
        {"values": list(range(MOST_VALUES))},
        {"values": None},
        {"columns": {}},
        {"columns": [{"name": "x"}]},
    ],
)
def test_a_damaged_state_is_refused(changes):
    with pytest.raises(ValueError, match="saved features of prompts are damaged"):
        Features().load_state_dict(damaged(**changes))


def test_an_undamaged_state_is_not():
    features = Features()
    features.load_state_dict(damaged())
    assert features.codes(["q"]).tolist() == [[3, 3, 3]]
    with pytest.raises(ValueError, match="damaged"):
        features.load_state_dict({})
    with pytest.raises(ValueError, match="damaged"):
        features.load_state_dict(damaged() | {"features": np.frombuffer(b"{", np.uint8)})
