"""Check that an engine computes correct advantages for groups of unequal size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.advantages import Advantage, check_advantage
from knapsack_rl.allocation.checks import FloatArray, IntArray

AdvantageFunction = Callable[[IntArray, FloatArray], ArrayLike]

PROPERTIES = {
    "shape": "one finite advantage for each rollout",
    "sign": "where rewards of a group differ, a higher reward has a higher advantage",
    "centre": "advantages of a group sum to zero",
    "equal rewards": "a group whose rewards are all equal has advantage zero",
    "own group": "rewards of other groups do not change the advantages of a group",
    "group of one": "a group of one rollout has advantage zero",
    "group size": "a group of twice the size, with the same shares of each reward, has the same advantages",
    "row order": "reordering the rows does not change their advantages",
    "labels": "renaming the groups does not change the advantages",
}
"""The checks by name, each with the property that must hold."""

LIKELY = {
    "own group": "groups are probably found by position, as reshape(-1, N) does, not by id",
    "centre": "groups are probably found by position, as reshape(-1, N) does, or no group mean is subtracted",
    "equal rewards": "groups are probably mixed up, or no group mean is subtracted",
    "group of one": "the rollout probably gets its raw reward: allocate 0 or at least 2 rollouts to every prompt, and "
    "note that failed rollouts shorten groups",
    "group size": "a sum over the group is probably divided by the configured number of rollouts, not by the group's "
    "own; an engine that weighs every prompt the same is tested with weighting='prompt'",
    "row order": "rows of a group probably have to be adjacent",
}


SAME_SIZE = 0.1
"""Divisors n and n - 1 make large groups differ by less than this share; a wrong divisor makes it 41 % or more."""


class ConformanceError(AssertionError):
    """An engine's advantages are wrong for ragged groups.

    Attributes:
        failures: an example by name of each violated property.
    """

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__(failures)
        self.failures = failures

    def __str__(self) -> str:
        count = f"{len(self.failures)} of {len(PROPERTIES)} checks"
        lines = [f"the engine's advantages are wrong for ragged groups ({count}):"]
        for name, wanted in PROPERTIES.items():
            if name in self.failures:
                hint = f"; {LIKELY[name]}" if name in LIKELY else ""
                lines.append(f"  - {name}: {wanted}, but {self.failures[name]}{hint}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Case:
    sizes: tuple[int, ...]
    group_R: IntArray  # noqa: N815 - the suffix names the shape
    rewards: FloatArray
    compared: bool = False  # whether the first two groups differ in size alone


def check_engine(
    advantage_function: AdvantageFunction,
    *,
    mean_rollouts: int = 4,
    scale: Literal["group", "batch", "none"] = "group",
    weighting: Literal["rollout", "prompt"] = "rollout",
    advantage: Advantage = "group-std",
    allow: Collection[str] = (),
    tolerance: float = 1e-4,
    seed: int = 0,
    sizes: Sequence[Sequence[int]] = (),
) -> None:
    """Test an engine's advantage function on ragged groups; return silently if it passes.

    Most batches have as many rollouts as uniform groups of ``mean_rollouts`` would have, so that reshaping alone does
    not raise an error; in one a rollout is missing, as after a failure. The tests check properties (see
    ``PROPERTIES``) rather than values, so any constant in the denominator, either kind of standard deviation and
    baselines such as RLOO's pass.

    Args:
        advantage_function: takes (R,) whole-number group ids and (R,) float64 rewards, returns (R,) advantages. Wrap
            the engine's own function accordingly.
        mean_rollouts: N of the uniform groups as configured in the engine, >= 2.
        scale: the standard deviation that the engine divides by. With ``"batch"`` other groups may change the scale of
            a group's advantages, but not their proportions.
        weighting: whether every rollout weighs the same or, by a factor 1 / N_i in the advantages, every prompt.
        advantage: with ``"group-mean"``, for an engine that divides by the mean of the group, rewards are >= 0.
        allow: names of properties that may fail, for example ``("group of one",)``.
        tolerance: largest difference to ignore; an engine in float32 has errors of about 1e-6.
        seed: seed of the test batches.
        sizes: group sizes of each batch to test, in place of the usual batches: ``sizes=[(4, 4, 3, 4)]`` asks only
            about a missing rollout. The property "group size" needs the usual batches.

    Raises:
        ConformanceError: a property does not hold; the message names each such property with an example.
        ValueError: an argument is out of range.

    >>> import knapsack_rl as kr
    >>> kr.check_engine(kr.group_advantages)
    """
    if mean_rollouts < 2:
        raise ValueError(f"mean_rollouts must be at least 2, got {mean_rollouts}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    if weighting not in ("rollout", "prompt"):
        raise ValueError(f"weighting must be 'rollout' or 'prompt', got {weighting!r}")
    if advantage != "group-std":
        check_advantage(advantage, scale, "scale")
    unknown = set(allow) - set(PROPERTIES)
    if unknown:
        raise ValueError(f"allow names unknown properties {sorted(unknown)}; known are {', '.join(PROPERTIES)}")
    if any(size < 1 for batch in sizes for size in batch) or not all(map(len, sizes)):
        raise ValueError(f"sizes must be batches of at least one group, of at least one rollout each, got {sizes}")
    rng = np.random.default_rng(seed)
    failures: dict[str, str] = {}
    lowest = 0.0 if advantage == "group-mean" else -1.0
    cases = _cases(sizes, rng) if sizes else [*_cases(_ragged(mean_rollouts), rng), _two_sizes(mean_rollouts)]
    for made in cases:
        case = replace(made, rewards=np.abs(made.rewards)) if advantage == "group-mean" else made
        try:
            found = _violations(advantage_function, case, scale, tolerance, rng, lowest)
            if case.compared and "shape" not in found:
                found |= _size_violation(advantage_function, case, weighting)
        except Exception as error:  # noqa: BLE001 - any exception of the engine is a finding
            failures.setdefault("shape", f"it raised {type(error).__name__}: {error}, for groups of {case.sizes}")
            continue
        for name, detail in found.items():
            failures.setdefault(name, detail)
    failures = {name: detail for name, detail in failures.items() if name not in allow}
    if failures:
        raise ConformanceError(failures)


def _ragged(mean: int) -> list[tuple[int, ...]]:
    """Return ragged batches whose totals are multiples of the mean, and one in which a rollout is missing."""
    return [
        (mean,) * 4,
        (2, 2 * mean - 2, mean, mean),
        (2 * mean - 2, 2, mean + 1, mean - 1) if mean > 2 else (2, 2, 2, 2),
        (1, 2 * mean - 1, mean, mean),
        (2, 2, 5 * mean - 4),
        (mean, mean - 1, mean, mean) if mean > 2 else (3, 2, 2),
    ]


def _cases(batches: Sequence[Sequence[int]], rng: np.random.Generator) -> list[_Case]:
    """Make batches of these group sizes with binary and with graded rewards; the last group's rewards are equal."""
    cases = []
    for sizes in map(tuple, batches):
        group_R = np.repeat(np.arange(len(sizes)), sizes)
        for graded in (False, True):
            rewards = (
                rng.normal(size=group_R.size).round(2) if graded else (rng.random(group_R.size) < 0.5).astype(float)
            )
            for group, size in enumerate(sizes):
                rows = np.flatnonzero(group_R == group)
                if size == 1:
                    rewards[rows] = 1.0
                elif group == len(sizes) - 1:
                    rewards[rows] = 1.0  # equal
                else:
                    rewards[rows[:2]] = (0.0, 1.0)  # never equal
            cases.append(_Case(sizes, group_R, rewards))
    return cases


def _two_sizes(mean: int) -> _Case:
    """Make a batch whose second group is the first one twice, with a group of equal rewards beside them."""
    sizes = (8 * mean, 16 * mean, mean)
    rewards = np.concatenate([np.tile([0.0, 1.0], 12 * mean), np.ones(mean)])
    return _Case(sizes, np.repeat(np.arange(3), sizes), rewards, compared=True)


def _size_violation(function: AdvantageFunction, case: _Case, weighting: str) -> dict[str, str]:
    advantages = np.abs(np.asarray(function(case.group_R.copy(), case.rewards.copy()), dtype=np.float64))
    small, large = (float(advantages[case.group_R == group].max()) for group in (0, 1))
    expected = case.sizes[0] / case.sizes[1] if weighting == "prompt" else 1.0
    if abs(large - expected * small) <= SAME_SIZE * expected * small:
        return {}
    example = f"0 and 1 in turn gave advantages of {small:.3g} in a group of {case.sizes[0]} and {large:.3g} in one of"
    return {"group size": f"{example} {case.sizes[1]}, expected {expected * small:.3g}"}


def _violations(
    function: AdvantageFunction, case: _Case, scale: str, tolerance: float, rng: np.random.Generator, lowest: float
) -> dict[str, str]:
    group_R, rewards = case.group_R, case.rewards
    advantages = np.asarray(function(group_R.copy(), rewards.copy()), dtype=np.float64)
    if advantages.shape != group_R.shape or not np.isfinite(advantages).all():
        return {"shape": f"groups of {case.sizes} gave shape {advantages.shape} or numbers that are not finite"}
    found: dict[str, str] = {}

    def note(name: str, group: int, expected: str) -> None:
        rows = np.flatnonzero(group_R == group)[:8]
        given = ", ".join(f"{value:.3g}" for value in advantages[rows])
        from_ = ", ".join(f"{value:g}" for value in rewards[rows])
        found.setdefault(name, f"with groups of {case.sizes}, rewards ({from_}) gave ({given}), expected {expected}")

    for group, size in enumerate(case.sizes):
        rows = group_R == group
        of_group, given = advantages[rows], rewards[rows]
        if size == 1:
            if abs(of_group[0]) > tolerance:
                note("group of one", group, "0")
        elif np.ptp(given) == 0.0:
            if np.abs(of_group).max() > tolerance:
                note("equal rewards", group, "zeros")
        else:
            if abs(of_group.sum()) > tolerance * size:
                note("centre", group, "a sum of 0")
            if (np.diff(of_group[np.argsort(given, kind="stable")]) < -tolerance).any() or np.ptp(
                of_group
            ) <= tolerance:
                note("sign", group, "the order of the rewards")

    # The other groups get other rewards; group 0 keeps its own.
    kept = group_R == 0
    changed = np.where(kept, rewards, np.where(rng.random(rewards.size) < 0.5, 3.0, lowest))
    after = np.asarray(function(group_R.copy(), changed), dtype=np.float64)
    if after.shape != advantages.shape or not _same(advantages[kept], after[kept], scale, tolerance):
        note("own group", 0, f"the same as with other groups' rewards changed ({_some(after)})")

    shuffled = rng.permutation(group_R.size)
    after = np.asarray(function(group_R[shuffled], rewards[shuffled]), dtype=np.float64)
    if after.shape != advantages.shape or not _same(advantages[shuffled], after, "group", tolerance):
        note("row order", 0, "the same in another order of rows")

    names = rng.permutation(1000)[: len(case.sizes)]
    after = np.asarray(function(names[group_R], rewards.copy()), dtype=np.float64)
    if after.shape != advantages.shape or not _same(advantages, after, "group", tolerance):
        note("labels", 0, f"the same with ids {names.tolist()}")
    return found


def _same(before: FloatArray, after: FloatArray, scale: str, tolerance: float) -> bool:
    if scale == "batch":  # proportions only
        before, after = (x / max(np.abs(x).max(), tolerance) for x in (before, after))
        tolerance *= 10
    return bool(np.allclose(before, after, rtol=tolerance, atol=tolerance))


def _some(numbers: FloatArray) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers[:4])
