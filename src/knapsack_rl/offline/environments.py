"""Prompts with known true success rates: synthetic ones, which may learn, and a replayed recorded run.

An :class:`Environment` starts an :class:`Episode` from a seed. The seed fixes the rates, the batches and all random
movement, so compared policies see the same prompts in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray, check_counts, check_whole

BoolArray = NDArray[np.bool_]

MIXTURES = {
    "late-training": "0.38*beta(30,1) + 0.22*beta(1,30) + 0.40*uniform",
    "bimodal": "0.5*beta(30,1) + 0.5*beta(1,30)",
    "hard": "0.5*beta(1,30) + 0.2*point(0) + 0.3*uniform",
}
"""Named distributions of success rates: late in uniform training, both ends only, a data set that is too hard."""

_TERM = re.compile(
    r"(?:(?P<weight>[\d.]+)\*)?(?:(?P<uniform>uniform)|beta\((?P<beta>[^()]*)\)|point\((?P<point>[^()]*)\))"
)


class Episode(Protocol):
    """One run of an environment."""

    batches: Sequence[IntArray]
    """Prompt indices of each step, distinct within a step."""

    def rates(self, prompts: IntArray) -> FloatArray:
        """Return (M,) current true success rates of these prompts."""
        ...

    def train(self, prompts: IntArray, effective: BoolArray) -> None:
        """Advance by one step in which these prompts were visited and these groups held both outcomes."""
        ...

    def features(self, prompts: IntArray) -> dict[str, list[str]]:
        """Return (M,) values of these prompts by name of the column; none where nothing is known of them."""
        ...


class Environment(Protocol):
    """Starts episodes."""

    def start(self, seed: int) -> Episode:
        """Return the episode of a seed."""
        ...


def draw_rates(mixture: str, prompts: int, rng: np.random.Generator) -> FloatArray:
    """Draw success rates from a mixture.

    Args:
        mixture: a name of ``MIXTURES``, or terms such as ``"uniform"``, ``"beta(2,5)"``, ``"point(0)"``, each with a
            weight if there are several: ``"0.3*point(0) + 0.7*uniform"``. Weights sum to 1.
        prompts: number of rates, >= 1.
        rng: source of randomness.

    Returns:
        (prompts,) rates in [0, 1].

    Raises:
        ValueError: the text does not describe a mixture, or a number in it is out of range.
    """
    size = check_whole("prompts", prompts, minimum=1)
    terms = _parse(mixture)
    which = rng.choice(len(terms), size=size, p=[weight for weight, _ in terms])
    drawn = np.stack(
        [rng.beta(*shape, size=size) if len(shape) == 2 else np.full(size, shape[0]) for _, shape in terms]
    )
    return drawn[which, np.arange(size)]


def _parse(mixture: str) -> list[tuple[float, tuple[float, ...]]]:
    """Return (weight, parameters) of each term: two parameters for a Beta distribution, one for a point."""
    text = MIXTURES.get(mixture, mixture).replace(" ", "")
    allowed = f"{', '.join(MIXTURES)}, or terms uniform, beta(a,b), point(p) such as '0.3*point(0) + 0.7*uniform'"
    terms: list[tuple[float, tuple[float, ...]]] = []
    for part in text.split("+"):
        match = _TERM.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{mixture!r} is not a mixture of success rates: {part!r} is not understood; write {allowed}"
            )
        try:
            weight = float(match["weight"] or 1.0)
            shape = tuple(float(number) for number in (match["beta"] or match["point"] or "1,1").split(","))
        except ValueError as error:
            raise ValueError(f"{mixture!r} is not a mixture of success rates: {error}; write {allowed}") from error
        if match["beta"] is not None and (len(shape) != 2 or not all(0 < number < np.inf for number in shape)):
            raise ValueError(f"{part!r} needs two numbers above 0, as in beta(1,30)")
        if match["point"] is not None and (len(shape) != 1 or not 0 <= shape[0] <= 1):
            raise ValueError(f"{part!r} needs one number in [0, 1], as in point(0)")
        terms.append((weight, shape))
    total = sum(weight for weight, _ in terms)
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the weights of {mixture!r} sum to {total:g}, but they must sum to 1")
    return [(weight / total, shape) for weight, shape in terms]


def shuffled_batches(prompts: int, epochs: int, batch_size: int, rng: np.random.Generator) -> list[IntArray]:
    """Return batches with every prompt once per epoch, reshuffled each time; the last of an epoch may be smaller."""
    check_whole("epochs", epochs, minimum=1)
    check_whole("batch_size", batch_size, minimum=1)
    cuts = np.arange(batch_size, prompts, batch_size)
    return [batch for _ in range(epochs) for batch in np.split(rng.permutation(prompts), cuts)]


@dataclass(frozen=True)
class Sudden:
    """A change of success rates from one step to the next.

    Attributes:
        epoch: time of the change in epochs since the start, > 0.
        share: share of the prompts that change, in (0, 1]; where prompts have skills, of the skills.
        mixture: the changed prompts draw new rates from it, see :func:`draw_rates`; None keeps their rates.
        shift: logits by which the changed prompts move, after a draw.
    """

    epoch: float
    share: float = 1.0
    mixture: str | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Synthetic:
    """Prompts drawn from a mixture, static or learning.

    In logits, a visited prompt moves by ``gain`` if its group was effective (held both outcomes) and always by a normal
    step of standard deviation ``walk``; all prompts move by ``drift`` over an epoch. Rates of exactly 0 and 1 stay.
    With all three at 0 and no sudden changes the rates are static.

    With ``skills`` the mixture is that of the skills, and the logits of the prompts of one skill are normal around it.
    Three columns of features then say of a prompt its ``skill``, a ``useless`` random label, and a ``misleading`` pair
    of skills, the hardest with the easiest.

    Attributes:
        mixture: see :func:`draw_rates`.
        prompts: number of prompts.
        epochs: visits of each prompt.
        batch_size: prompts per step.
        gain: logits per effective group.
        drift: logits per epoch.
        walk: logits per visit, >= 0.
        changes: sudden changes.
        retired: other prompts, which are visited once before all others and never again.
        reshuffled: whether an epoch has every prompt once; otherwise each batch is drawn anew from all prompts.
        skills: number of skills, 0 for none.
        spread: standard deviation, in logits, of the prompts of a skill, >= 0.
        skill_gain: logits by which all prompts of a skill move with each of its effective groups.
    """

    mixture: str = "late-training"
    prompts: int = 4096
    epochs: int = 50
    batch_size: int = 128
    gain: float = 0.0
    drift: float = 0.0
    walk: float = 0.0
    changes: tuple[Sudden, ...] = ()
    retired: int = 0
    reshuffled: bool = True
    skills: int = 0
    spread: float = 0.5
    skill_gain: float = 0.0

    def start(self, seed: int) -> SyntheticEpisode:
        """Return the episode of a seed."""
        check_whole("skills", self.skills, minimum=0, maximum=self.prompts)
        if not (0 <= self.spread < np.inf and np.isfinite(self.skill_gain)):
            raise ValueError(f"spread must be finite and >= 0, skill_gain finite, got {self.spread, self.skill_gain}")
        if not (np.isfinite([self.gain, self.drift]).all() and 0 <= self.walk < np.inf):
            raise ValueError(f"gain, drift and walk must be finite, walk >= 0, got {self.gain, self.drift, self.walk}")
        for change in self.changes:
            if not (0 < change.epoch < np.inf and 0 < change.share <= 1 and np.isfinite(change.shift)):
                raise ValueError(f"a change needs an epoch > 0, a share in (0, 1] and a finite shift, got {change}")
            if change.mixture is not None:
                _parse(change.mixture)
        return SyntheticEpisode(self, seed)


class SyntheticEpisode:
    """One run of a :class:`Synthetic` environment."""

    def __init__(self, environment: Synthetic, seed: int) -> None:
        order, start, self._steps = (np.random.default_rng([seed, stream]) for stream in range(3))
        self._environment = environment
        in_use, retired = environment.prompts, check_whole("retired", environment.retired, minimum=0)
        batches = shuffled_batches(in_use, environment.epochs, environment.batch_size, order)
        if not environment.reshuffled:
            batches = [order.choice(in_use, batch.size, replace=False) for batch in batches]
        before = shuffled_batches(retired, 1, environment.batch_size, order) if retired else []
        self.batches: Sequence[IntArray] = [in_use + batch for batch in before] + batches
        # Every prompt is a skill of its own where there are none.
        self._skill = np.arange(in_use + retired) % (environment.skills or in_use + retired)
        self._skills = int(self._skill.max()) + 1
        self._drift = 0.0
        self._logits = self._drawn(environment.mixture, np.arange(self._skills), start)
        self._columns = self._labels(np.random.default_rng([seed, 2, 0])) if environment.skills else {}
        self._epochs = -retired / in_use
        self._changes = [
            (change, np.random.default_rng([seed, 2, 1 + k]))
            for k, change in enumerate(sorted(environment.changes, key=lambda change: change.epoch))
        ]

    def rates(self, prompts: IntArray) -> FloatArray:
        """Return (M,) current true success rates of these prompts."""
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(-(self._logits[prompts] + self._drift)))

    def features(self, prompts: IntArray) -> dict[str, list[str]]:
        """Return (M,) values by name, see :class:`Synthetic`; none without skills."""
        return {name: [f"{name} {k}" for k in column[prompts].tolist()] for name, column in self._columns.items()}

    def train(self, prompts: IntArray, effective: BoolArray) -> None:
        """Move the prompts that learn."""
        environment = self._environment
        passed = prompts.size / environment.prompts
        self._drift += environment.drift * passed
        # Drawn regardless of the policy, so that the walk is the same for all policies.
        step = environment.walk * self._steps.standard_normal(prompts.size)
        self._logits[prompts] += environment.gain * effective + step
        if environment.skill_gain:
            practised = np.bincount(self._skill[prompts[effective]], minlength=self._skills)
            self._logits += environment.skill_gain * practised[self._skill]
        self._epochs += passed
        while self._changes and self._changes[0][0].epoch <= self._epochs + 1e-9:
            self._change(*self._changes.pop(0))

    def _change(self, change: Sudden, rng: np.random.Generator) -> None:
        skills = np.flatnonzero(rng.random(self._skills) < change.share)
        changed = np.isin(self._skill, skills)
        if change.mixture is not None and skills.size:
            self._logits[changed] = self._drawn(change.mixture, skills, rng) - self._drift
        self._logits[changed] += change.shift

    def _drawn(self, mixture: str, skills: IntArray, rng: np.random.Generator) -> FloatArray:
        """Return new logits of the prompts of these skills, in order of the prompts."""
        center = np.zeros(self._skills)
        center[skills] = _logits(draw_rates(mixture, skills.size, rng))
        prompts = self._skill[np.isin(self._skill, skills)]
        if not self._environment.skills:
            return center[prompts]
        return center[prompts] + self._environment.spread * rng.standard_normal(prompts.size)

    def _labels(self, rng: np.random.Generator) -> dict[str, IntArray]:
        """Return the (P,) number of each prompt's value in every column of features."""
        rates = np.bincount(self._skill, self.rates(np.arange(self._skill.size))) / np.bincount(self._skill)
        rank = np.argsort(np.argsort(rates))
        return {
            "skill": self._skill,
            "useless": rng.integers(self._skills, size=self._skill.size),
            "misleading": np.minimum(rank, self._skills - 1 - rank)[self._skill],
        }


def _logits(rates: FloatArray) -> FloatArray:
    """Return logits, infinite (and so for ever) at 0 and 1."""
    with np.errstate(divide="ignore"):
        return np.log(rates) - np.log1p(-rates)


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded outcomes of prompts, visit by visit.

    Attributes:
        prompt: (V,) prompt of each visit, ascending from 0 without gaps; visits of a prompt are in order of time.
        successes: (V,) successes of the visit.
        totals: (V,) rollouts of the visit, >= 1.
    """

    prompt: IntArray
    successes: IntArray
    totals: IntArray

    def __post_init__(self) -> None:
        if not self.prompt.shape == self.successes.shape == self.totals.shape or self.prompt.ndim != 1:
            raise ValueError("prompt, successes and totals must be one-dimensional and equally long")
        if not self.prompt.size:
            raise ValueError("the trace holds no visits")
        gaps = np.diff(self.prompt, prepend=-1)
        if not np.isin(gaps, (0, 1)).all() or self.prompt[0] != 0:
            raise ValueError("prompt must ascend from 0 without gaps")
        check_counts(self.successes)
        if (self.totals < 1).any() or (self.successes > self.totals).any():
            raise ValueError("every visit needs at least one rollout, and no more successes than rollouts")

    @classmethod
    def from_visits(cls, prompt: ArrayLike, successes: ArrayLike, totals: ArrayLike) -> Trace:
        """Return a trace of visits in order of time; prompts are numbered from 0 and may be interleaved."""
        at, good, total = (np.asarray(column, dtype=np.int64) for column in (prompt, successes, totals))
        order = np.argsort(at, kind="stable")
        return cls(at[order], good[order], total[order])

    @cached_property
    def visits(self) -> IntArray:
        """(P,) visits of each prompt."""
        return np.bincount(self.prompt)

    @cached_property
    def starts(self) -> IntArray:
        """(P,) index of each prompt's first visit."""
        return np.cumsum(self.visits) - self.visits

    def __len__(self) -> int:
        return self.visits.size

    def take(self, prompts: IntArray) -> Trace:
        """Return the trace of some prompts, renumbered in the given order."""
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i] + self.visits[i]) for i in prompts])
        renumbered = np.repeat(np.arange(prompts.size), self.visits[prompts])
        return Trace(renumbered, self.successes[rows], self.totals[rows])

    def smooth(self, bandwidth: float) -> FloatArray:
        """Return the success rate of each visit, smoothed over the visits of its prompt with a Gaussian kernel.

        p(t) = sum_v K(t - v) successes(v) / sum_v K(t - v) totals(v), K(d) = exp(-d^2 / (2 bandwidth^2)).

        Args:
            bandwidth: standard deviation of the kernel in visits, > 0.

        Returns:
            (V,) rates in [0, 1].

        Raises:
            ValueError: the bandwidth is not above 0.
        """
        if not 0.0 < bandwidth < np.inf:
            raise ValueError(f"bandwidth must be a number of visits above 0, got {bandwidth!r}")
        rates = np.empty(self.prompt.size)
        for length in np.unique(self.visits):  # prompts with the same number of visits share one kernel matrix
            distance = np.subtract.outer(np.arange(length), np.arange(length)) / bandwidth
            kernel = np.exp(-0.5 * distance**2)
            rows = self.starts[self.visits == length][:, None] + np.arange(length)
            rates[rows] = (self.successes[rows] @ kernel) / (self.totals[rows] @ kernel)
        return np.minimum(rates, 1.0)  # a ratio of rounded sums may exceed 1 in its last digit


@dataclass(frozen=True, eq=False)
class Replay:
    """A recorded run whose smoothed success rates are taken as the truth; they do not react to the policy.

    At its k-th visit a prompt has the smoothed rate of its k-th recorded visit; after the last one the rate stays.

    Attributes:
        trace: the recorded visits.
        bandwidth: see :meth:`Trace.smooth`.
        batches: prompt indices of each step; None shuffles all prompts into batches by the seed.
        batch_size: prompts per step, if shuffled.
        epochs: visits of each prompt, if shuffled; None takes the largest recorded number of visits.
    """

    trace: Trace
    bandwidth: float = 2.5
    batches: Sequence[IntArray] | None = None
    batch_size: int = 128
    epochs: int | None = None

    @cached_property
    def smoothed(self) -> FloatArray:
        """(V,) rates of the trace's visits."""
        return self.trace.smooth(self.bandwidth)

    def start(self, seed: int) -> ReplayEpisode:
        """Return the episode of a seed."""
        batches = self.batches
        if batches is None:
            epochs = int(self.trace.visits.max()) if self.epochs is None else self.epochs
            rng = np.random.default_rng([seed, 0])
            batches = shuffled_batches(len(self.trace), epochs, self.batch_size, rng)
        return ReplayEpisode(self.trace, self.smoothed, batches)


class ReplayEpisode:
    """One run of a :class:`Replay` environment."""

    def __init__(self, trace: Trace, smoothed: FloatArray, batches: Sequence[IntArray]) -> None:
        self.batches = batches
        self._trace, self._smoothed = trace, smoothed
        self._visited = np.zeros(len(trace), dtype=np.int64)

    def rates(self, prompts: IntArray) -> FloatArray:
        """Return (M,) smoothed rates at the next visits of these prompts."""
        trace = self._trace
        return self._smoothed[trace.starts[prompts] + np.minimum(self._visited[prompts], trace.visits[prompts] - 1)]

    def train(self, prompts: IntArray, effective: BoolArray) -> None:
        """Advance these prompts to their next visit; nothing else moves."""
        self._visited[prompts] += 1

    def features(self, prompts: IntArray) -> dict[str, list[str]]:
        """Return no features: the recorded run has none."""
        return {}
