"""Measured gradients against value functions: correlations, growth with N, and a value fitted to the gains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.stats import rankdata

from experiments import values
from experiments.contract import Finding, Row, Verdict, by_name, markdown_table, select
from experiments.statistics import RESAMPLES, SEED
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.value import information_gain, nonzero_gradient_probability, value
from knapsack_rl.offline.environments import BoolArray

GROUP_SIZES = (2, 4, 8, 16, 64)
"""N at which gradients are measured."""

TARGET = "own"
"""Value functions are fitted to the gain of the prompt's own success rate, as in the paper's derivation.

Training aims at the gain of other prompts, but that differs much between prompts of equal success rate.
"""

LARGEST_EXPONENT = 5.0

TARGETS = {
    "norm": "gradient norm",
    "cosine": "cosine to a large batch",
    "own": "gain of the prompt itself",
    "population": "gain of other prompts",
}
PAPER = "knapsack"
FORMULAS = {
    PAPER: value,
    "nonzero-gradient": nonzero_gradient_probability,
    "variance": values.reward_variance,
    "signal-to-noise": values.signal_to_noise,
}
GAIN_ALONE = "information gain alone"
CLASSES = {"hard, p < 0.25": (0.0, 0.25), "medium": (0.25, 0.75), "easy, p > 0.75": (0.75, 1.0)}
"""Name of a class to its success rates: from the first, below the second."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Prompts of all seeds and stages; G group sizes.

    Attributes:
        step: (P,) training steps of the model.
        stage: (P,) number of the seed and step.
        rates: (P,) exact success rate.
        by_target: (P, G) mean over groups, for ``norm``, ``cosine``, ``own`` and ``population``.
        fitted_on: (P,) whether the prompt belongs to the half that value functions are fitted on.
    """

    step: IntArray
    stage: IntArray
    rates: FloatArray
    by_target: dict[str, FloatArray]
    fitted_on: BoolArray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Measured:
        """From the rows of ``experiments.gradient_value``; every second prompt of a stage is in the fitting half."""
        chosen = select(rows, part="prompt")
        pairs = np.array([(row["seed"], row["step"]) for row in chosen])
        _, stage = np.unique(pairs, axis=0, return_inverse=True)
        fitted_on = np.zeros(len(chosen), dtype=np.bool_)
        for one in range(stage.max() + 1):
            fitted_on[np.flatnonzero(stage == one)[::2]] = True
        targets = {name: np.array([row[name] for row in chosen]) for name in TARGETS}
        return cls(pairs[:, 1], stage, np.array([row["p"] for row in chosen]), targets, fitted_on)

    @property
    def stages(self) -> list[IntArray]:
        """Indices of the prompts of each stage."""
        return [np.flatnonzero(self.stage == one) for one in range(self.stage.max() + 1)]

    def relative(self, target: str) -> FloatArray:
        """A target (P, G) relative to its root mean square in the stage: within a batch only ratios matter."""
        found = self.by_target[target].copy()
        for mine in self.stages:
            found[mine] /= np.sqrt(np.mean(found[mine] ** 2))
        return found


def explained(measured: Measured, predicted: FloatArray, target: str, chosen: BoolArray | None = None) -> float:
    """Share of squared gains that values explain up to a factor for each stage; mean over stages.

    In a stage this is 1 - sum (y - c x)^2 / sum y^2 with the best c, which is (x y)^2 / (x x) (y y).

    Args:
        measured: the gains.
        predicted: (P, G) values.
        target: which gain.
        chosen: (P,) the prompts that count; None for all.
    """
    x, y = predicted, measured.by_target[target]
    counted = np.ones(len(x)) if chosen is None else chosen
    xy, xx, yy = (np.bincount(measured.stage, (a * b).sum(axis=1) * counted) for a, b in ((x, y), (x, x), (y, y)))
    return float(np.mean(xy**2 / (np.where(xx > 0.0, xx, 1.0) * yy)))


def fit(measured: Measured, target: str = TARGET) -> dict[str, Any]:
    """Fit V(N, p) = c (1 - p^N - (1-p)^N) p^a (1-p)^b to the measured gains of half the prompts.

    Least squares over exponents a, b in [0, 5] to two digits, with a factor c for each stage, because within a batch
    only ratios matter. The paper's value is a = 1, b = 2.

    Args:
        measured: the gains.
        target: which gain.

    Returns:
        ``success_exponent``, ``failure_exponent``, ``target``, ``prompts`` fitted on, and ``explained`` on the other
        half by the fitted value and by the paper's, see :func:`explained`.
    """
    half = measured.fitted_on
    mixed = nonzero_gradient_probability(np.array(GROUP_SIZES), measured.rates[:, None])

    def shape(a: float, b: float) -> FloatArray:
        return mixed * (measured.rates**a * (1.0 - measured.rates) ** b)[:, None]

    def share(pair: Sequence[float]) -> float:
        return explained(measured, shape(*pair), target, half)

    bounds = [(0.0, LARGEST_EXPONENT)] * 2
    found = minimize(lambda pair: -share(pair), (1.0, 1.0), bounds=bounds, method="Nelder-Mead").x
    digits = [[np.floor(100 * one) / 100, np.ceil(100 * one) / 100] for one in found]
    best = max(((float(a), float(b)) for a in digits[0] for b in digits[1]), key=share)
    judged = {
        name: round(explained(measured, shape(*pair), target, ~half), 4)
        for name, pair in (("fitted", best), ("knapsack", (1.0, 2.0)))
    }
    return {
        "success_exponent": best[0],
        "failure_exponent": best[1],
        "target": target,
        "prompts": int(half.sum()),
        "explained": judged,
    }


def write_fit(found: dict[str, Any], path: Path) -> None:
    """Write the result of :func:`fit` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


class Correlation(NamedTuple):
    """A correlation, mean over seeds and stages, with its interval over prompts."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})".replace("-", "−")


def predictions(rates: FloatArray) -> dict[str, FloatArray]:
    """Values (P, G) of prompts with these success rates at the group sizes, by value function."""
    counts = np.array(GROUP_SIZES)
    found = {name: formula(counts, rates[:, None]) for name, formula in FORMULAS.items()}
    found[GAIN_ALONE] = np.repeat(information_gain(rates)[:, None], counts.size, axis=1)
    return found


def correlation(measured: Measured, predicted: FloatArray, target: FloatArray, *, by_rank: bool) -> Correlation:
    """Correlation over all (prompt, N) of a stage, mean over stages; bootstrap over each stage's prompts.

    Ranks (for Spearman's) are those of the whole stage, also in the resamples.

    Args:
        measured: has the stages.
        predicted: (P, G).
        target: (P, G).
        by_rank: Spearman's correlation in place of Pearson's.
    """
    rng = np.random.default_rng(SEED)
    drawn = np.zeros(RESAMPLES + 1)
    for mine in measured.stages:
        x, y = predicted[mine], target[mine]
        if by_rank:
            x, y = (rankdata(series).reshape(series.shape) for series in (x, y))
        size = mine.size
        weights = rng.multinomial(size, np.full(size, 1.0 / size), RESAMPLES)
        weights = np.concatenate([np.ones((1, size)), weights])  # the first is the sample itself
        x, y = x - x.mean(), y - y.mean()
        moments = np.stack([x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], axis=1)
        sx, sy, sxx, syy, sxy = (weights @ moments).T / x.size
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn += (sxy - sx * sy) / np.sqrt((sxx - sx**2) * (syy - sy**2)) / len(measured.stages)
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975])
    return Correlation(float(drawn[0]), float(low), float(high))


def shape_in_size(measured: Measured, low: float, high: float) -> tuple[FloatArray, FloatArray]:
    """Own gain (G,) and V(N, p) (G,), each summed over prompts with low <= p < high, relative to the largest N."""
    mine = (measured.rates >= low) & (measured.rates < high)
    gains = measured.relative("own")[mine].sum(axis=0)
    mixed = (nonzero_gradient_probability(np.array(GROUP_SIZES), measured.rates[:, None]))[mine]
    weighted = (measured.relative("own")[mine][:, -1:] * mixed).sum(axis=0)  # so that both agree at the largest N
    return gains / gains[-1], weighted / weighted[-1]


def _verdict(found: Correlation) -> Verdict:
    return "holds" if found.low >= 0.7 else "holds in part" if found.low >= 0.3 else "does not hold"


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The paper's value against each target, against other values, and the shape of its information gain."""
    measured = Measured.of(rows)
    predicted = predictions(measured.rates)
    found = []
    for target, label in TARGETS.items():
        rank, linear = (
            correlation(measured, predicted[PAPER], measured.by_target[target], by_rank=by_rank)
            for by_rank in (True, False)
        )
        claim, text = f"A high V(N, p) means a large {label}", f"Spearman {rank}, Pearson {linear}"
        found.append(Finding(claim, "derived, not measured", text, _verdict(rank)))
    shares = {name: explained(measured, predicted[name], "population") for name in FORMULAS}
    best = max(shares, key=lambda name: shares[name])
    found.append(
        Finding(
            "Of the value functions the paper's predicts the gain of other prompts best",
            "–",
            "share of squared gains explained up to a factor: "
            + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items()),
            "holds" if best == PAPER else "holds in part" if shares[PAPER] > shares[best] - 0.05 else "does not hold",
        )
    )
    fitted = fit(measured)
    ours, paper = fitted["explained"]["fitted"], fitted["explained"][PAPER]
    found.append(
        Finding(
            "The information gain p (1 − p)² has the right shape",
            "p (1 − p)²",
            f"fitted p^{fitted['success_exponent']:.2f} (1 − p)^{fitted['failure_exponent']:.2f} explains "
            f"{100 * ours:.0f} % of the squared own gains of the prompts not fitted on, the paper's "
            f"{100 * paper:.0f} %",
            "holds" if paper > ours - 0.01 else "holds in part" if paper > ours - 0.1 else "does not hold",
        )
    )
    return found


def figures(rows: Sequence[Row]) -> Callable[[str], str]:
    """Sizes of the measurement, the check by steps taken, the fits, Spearman correlations by value and target."""
    measured = Measured.of(rows)
    predicted = predictions(measured.rates)
    found = {"prompts": f"{measured.rates.size}"}
    for step in sorted(set(measured.step.tolist())):
        rates = [row["mean_rate"] for row in select(rows, part="stage", step=step)]
        found[f"mean success rate after {step} steps"] = f"{np.mean(rates):.2f}"
    for target, label in TARGETS.items():
        for name, table in predicted.items():
            found[f"{name}, {label}"] = str(correlation(measured, table, measured.by_target[target], by_rank=True))
    taken = np.array([row["step_taken"] for row in select(rows, part="prompt") if "step_taken" in row])
    found |= {
        "steps taken": f"{len(taken)}",
        "steps taken, own": f"{np.corrcoef(taken[:, 0], taken[:, 1])[0, 1]:.3f}",
        "steps taken, own ratio": f"{np.median(taken[:, 0] / taken[:, 1]):.2f}",
        "steps taken, others": f"{np.corrcoef(taken[:, 2], taken[:, 3])[0, 1]:.3f}",
        "prompts that lower others": f"{100 * float((measured.by_target['population'][:, 2] < 0).mean()):.0f} %",
    }
    fitted = fit(measured)
    a, b = fitted["success_exponent"], fitted["failure_exponent"]
    found |= {"fitted a": f"{a:.2f}", "fitted b": f"{b:.2f}", "fitted peak": f"{a / (a + b):.2f}" if a + b else "–"}
    found |= {f"explained by {name}": f"{100 * share:.0f} %" for name, share in fitted["explained"].items()}
    return by_name(found)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Correlations, and growth with N."""
    measured = Measured.of(rows)
    predicted = predictions(measured.rates)
    correlations = [
        (name, *(str(correlation(measured, table, target, by_rank=True)) for target in measured.by_target.values()))
        for name, table in predicted.items()
    ]
    sizes = []
    for label, (low, high) in CLASSES.items():
        for kind, shares in zip(("measured", "predicted"), shape_in_size(measured, low, high), strict=True):
            sizes.append((f"{label}: {kind}", *(f"{share:.2f}" for share in shares)))
    return {
        "Spearman": markdown_table(("value", *TARGETS.values()), correlations),
        "sizes": markdown_table(("prompts", *(f"N = {n}" for n in GROUP_SIZES)), sizes),
    }
