import importlib.util
import pickle
import re
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.conformance import PROPERTIES, ConformanceError


def normalised(rewards, *, ddof=1, epsilon=1e-6):
    spread = rewards.std(ddof=ddof) if rewards.size > ddof else 0.0
    return (rewards - rewards.mean()) / (spread + epsilon)


def by_id(function):
    """An engine that finds groups by id and treats each with the function."""

    def advantages(groups, rewards):
        found = np.empty_like(rewards)
        for group in np.unique(groups):
            found[groups == group] = function(rewards[groups == group])
        return found

    return advantages


def leave_one_out(rewards):
    if rewards.size == 1:
        return np.zeros(1)
    return rewards - (rewards.sum() - rewards) / (rewards.size - 1)


RIGHT = {
    "this package": kr.group_advantages,
    "sample deviation": by_id(normalised),
    "population deviation": by_id(lambda rewards: normalised(rewards, ddof=0, epsilon=1e-4)),
    "no scale": by_id(lambda rewards: rewards - rewards.mean()),
    "leave one out": by_id(leave_one_out),
    "a list, in single precision": lambda g, r: by_id(normalised)(g, r).astype(np.float32).tolist(),
}


@pytest.mark.parametrize("engine", RIGHT.values(), ids=RIGHT)
def test_right_engines_pass(engine):
    for mean in (2, 3, 4, 8):
        kr.check_engine(engine, mean_rollouts=mean, seed=mean)


def reshaped(size, function=normalised):
    return lambda _, rewards: np.concatenate([function(row) for row in rewards.reshape(-1, size)])


def raw_when_alone(rewards):  # verl's GRPO
    return rewards if rewards.size == 1 else normalised(rewards)


def configured_deviation(rewards, size):  # sum of squares / (N - 1), N from the configuration
    deviation = rewards - rewards.mean()
    return deviation / (np.sqrt((deviation**2).sum() / (size - 1)) + 1e-6)


def contiguous(groups, rewards):
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1), groups.size]
    return np.concatenate([normalised(rewards[a:b]) for a, b in pairwise(edges)])


def first_of_each_label(groups, rewards):  # takes ids for positions
    sizes = np.bincount(groups)
    means = np.bincount(groups, rewards)[: len(np.unique(groups))] / sizes[: len(np.unique(groups))]
    return rewards - means[np.minimum(groups, means.size - 1)]


WRONG = {
    "reshape": (reshaped(4), {"centre", "own group"}),
    "reshape, unscaled": (reshaped(4, lambda rewards: rewards - rewards.mean()), {"centre", "own group"}),
    "one group": (lambda _, r: normalised(r), {"centre", "own group", "equal rewards"}),
    "raw rewards": (lambda _, r: r, {"centre", "equal rewards", "group of one"}),
    "raw when alone": (by_id(raw_when_alone), {"group of one"}),
    "contiguous": (contiguous, {"row order"}),
    "deviation of the configured size": (by_id(lambda r: configured_deviation(r, 4)), {"group size"}),
    "scaled by the configured size": (by_id(lambda r: normalised(r) * r.size / 4), {"group size"}),
    "share of the configured size": (by_id(lambda r: normalised(r) * 4 / r.size), {"group size"}),
    "turned round": (by_id(lambda rewards: -normalised(rewards)), {"sign"}),
    "nothing": (lambda _, r: np.zeros_like(r), {"sign"}),
    "too few": (lambda _, r: r[:-1], {"shape"}),
    "not finite": (lambda _, r: r * np.nan, {"shape"}),
    "raises": (lambda _, r: r.reshape(-1, 7), {"shape"}),
}


@pytest.mark.parametrize(("engine", "broken"), WRONG.values(), ids=WRONG)
def test_wrong_engines_fail_the_properties_that_they_break(engine, broken):
    with pytest.raises(ConformanceError) as caught:
        kr.check_engine(engine)
    reported = {name for name in PROPERTIES if f"  - {name}: " in str(caught.value)}
    assert broken <= reported
    if len(broken) == 1 and broken != {"shape"}:
        assert reported == broken


@pytest.mark.parametrize("mean", [2, 3, 4, 8])
def test_a_scale_by_the_configured_size_is_caught_whatever_it_is(mean):
    """Uniform groups of that size hide it: there the engine is right."""
    engine = by_id(lambda rewards: configured_deviation(rewards, mean))
    groups, rewards = np.repeat(np.arange(4), mean), np.random.default_rng(0).random(4 * mean)
    np.testing.assert_allclose(engine(groups, rewards), by_id(normalised)(groups, rewards))
    with pytest.raises(ConformanceError, match=r"group size: .*divided by the configured number of rollouts"):
        kr.check_engine(engine, mean_rollouts=mean)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_prompts_of_equal_weight_are_a_choice(scale):
    def engine(groups, rewards):
        return kr.group_advantages(groups, rewards, scale, "prompt")

    kr.check_engine(engine, scale=scale, weighting="prompt")
    with pytest.raises(ConformanceError, match=r"group size: .*weighting='prompt'"):
        kr.check_engine(engine, scale=scale)
    with pytest.raises(ConformanceError, match="group size"):
        kr.check_engine(kr.group_advantages, weighting="prompt")


def test_an_engine_that_divides_by_the_mean_is_tested_on_rewards_above_zero():
    for weighting in ("rollout", "prompt"):

        def engine(groups, rewards, weighting=weighting):
            return kr.group_advantages(groups, rewards, advantage="group-mean", weighting=weighting)

        kr.check_engine(engine, advantage="group-mean", weighting=weighting)
        with pytest.raises(ConformanceError, match="rewards >= 0, got"):
            kr.check_engine(engine, weighting=weighting)
    mixed = by_id(lambda rewards: (rewards - rewards.mean()) / max(rewards.mean(), 0.1))
    kr.check_engine(mixed, advantage="group-mean")
    with pytest.raises(ConformanceError, match="own group"):
        kr.check_engine(reshaped(4), advantage="group-mean")


def test_a_missing_rollout_is_tested_too():
    def stops(groups, rewards):
        if rewards.size % 4:
            raise IndexError("a whole number of groups, please")
        return kr.group_advantages(groups, rewards)

    with pytest.raises(ConformanceError, match="raised IndexError"):
        kr.check_engine(stops, mean_rollouts=4)


def test_sizes_ask_about_these_groups_only():
    sizes_seen = set()

    def raw_when_alone_by_id(groups, rewards):
        sizes_seen.add(tuple(sorted(np.unique(groups, return_counts=True)[1].tolist())))
        return by_id(raw_when_alone)(groups, rewards)

    kr.check_engine(raw_when_alone_by_id, sizes=[(2, 6, 4, 4), [3, 2]])
    assert sizes_seen == {(2, 4, 4, 6), (2, 3)}
    with pytest.raises(ConformanceError) as caught:
        kr.check_engine(raw_when_alone_by_id, sizes=[(1, 7)])
    assert [*caught.value.failures] == ["group of one"]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_labels_that_are_taken_for_positions_are_caught():
    with np.errstate(all="ignore"), pytest.raises(ConformanceError):
        kr.check_engine(first_of_each_label)


def test_a_reshape_passes_on_uniform_groups_only():
    """Such an engine is right on groups of one size, so the mistake is silent."""
    groups = np.repeat(np.arange(4), 4)
    rewards = np.random.default_rng(0).random(16)
    np.testing.assert_allclose(reshaped(4)(groups, rewards), by_id(normalised)(groups, rewards))


def test_batch_scale_lets_other_groups_change_the_scale_only():
    def engine(groups, rewards):
        return kr.group_advantages(groups, rewards, "batch")

    kr.check_engine(engine, scale="batch")
    with pytest.raises(ConformanceError, match="own group"):
        kr.check_engine(engine)
    with pytest.raises(ConformanceError, match="own group"):
        kr.check_engine(reshaped(4), scale="batch")


def test_a_property_can_be_allowed_to_fail():
    kr.check_engine(by_id(raw_when_alone), allow=("group of one",))
    with pytest.raises(ConformanceError, match="allocate 0 or at least 2 rollouts"):
        kr.check_engine(by_id(raw_when_alone))


def test_arguments_out_of_range_are_refused():
    for wrong in [
        {"mean_rollouts": 1},
        {"scale": "layer"},
        {"weighting": "token"},
        {"advantage": "mean"},
        {"allow": ("group of two",)},
        {"sizes": [(4, 0)]},
        {"sizes": [()]},
    ]:
        with named_case(wrong=wrong), pytest.raises(ValueError, match=r"must|known are"):
            kr.check_engine(kr.group_advantages, **wrong)


# -- the table of released engines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("torch")
    path = Path(__file__).parents[1] / "benchmarks" / "conformance.py"
    spec = importlib.util.spec_from_file_location("conformance_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cut(function, size):  # AReaL: slices of the configured size, the rest of the batch as it is
    def advantages(_, rewards):
        whole = rewards[: rewards.size // size * size]
        return np.concatenate([reshaped(size, function)(None, whole), rewards[whole.size :]])

    return advantages


def test_verdicts_of_the_table(script):
    one = "group of one"
    right = ["right"] * 4
    for engine, cells, violated in [
        (kr.group_advantages, right, []),
        (contiguous, right, []),  # engines deliver the rows of a group together
        (by_id(raw_when_alone), [*right[:3], "**wrong**"], [one]),
        (by_id(lambda r: configured_deviation(r, 4)), ["right", "**wrong**", "right", "right"], ["group size"]),
        (reshaped(4), ["right", "**wrong**", "error", "**wrong**"], None),
        (cut(normalised, 4), ["right", *["**wrong**"] * 3], None),
    ]:
        found, names = script.verdicts(engine)
        assert found == cells
        assert {"centre", "own group"} <= set(names) if violated is None else names == violated


def test_released_functions_are_cut_from_a_wheel(script, tmp_path):
    path = tmp_path / "engine-1.2.3-py3-none-any.whl"
    source = """
import not_installed

@not_installed.register
def half(x: not_installed.Type) -> float:
    return x / KNOWN

class Trainer(not_installed.Base):
    def step(self, x):
        reward = half(x)
        advantages = reward + 1
        advantages = advantages * 10
        self.log()
        advantages = None

    def double(self, x):
        return 4 * half(x)
"""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("engine/core/algos.py", source)
    wheel = script.Wheel(path)
    assert wheel.version == "1.2.3"
    half = wheel.define("core/algos.py", "half", KNOWN=2)
    assert half(3) == 1.5
    assert wheel.define("core/algos.py", "half", "Trainer.double", KNOWN=2)(None, 3) == 6
    step = wheel.statements("core/algos.py", "Trainer.step", after="reward =", until="self.log", half=half)
    assert step(reward=2) == 30


def test_the_page_has_a_line_for_each_engine_of_the_script(script):
    text = script.PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\| ([^|]+) \| `([\w-]+)` [\d.]+ \| ([^|]+) \|", script.MARKED.search(text)[0], re.MULTILINE)
    assert lines == [(engine.name, engine.package, engine.function) for engine in script.ENGINES]
