"""What the rows of ``experiments.gradient_value`` say: table lines, a paragraph, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.contract import Finding, Row, Verdict
from experiments.gradient_fit import GROUP_SIZES, Measured, explained, fit
from experiments.intervals import RESAMPLES, SEED, ranks
from experiments.values import reward_variance, signal_to_noise
from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.allocation.value import information_gain, nonzero_gradient_probability
from knapsack_rl.allocation.value import value as paper_value

TARGETS = {
    "norm": "gradient norm",
    "cosine": "cosine to a large batch",
    "own": "gain of the prompt itself",
    "population": "gain of other prompts",
}
PAPER = "knapsack"
RIVALS = {
    PAPER: paper_value,
    "nonzero-gradient": nonzero_gradient_probability,
    "variance": reward_variance,
    "signal-to-noise": signal_to_noise,
}
GAIN_ALONE = "information gain alone"
CLASSES = {"hard, p < 0.25": (0.0, 0.25), "medium": (0.25, 0.75), "easy, p > 0.75": (0.75, 1.0)}


class Correlation(NamedTuple):
    """A correlation, mean over seeds and stages, with its interval over prompts."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})".replace("-", "−")


def predictions(rates: FloatArray) -> dict[str, FloatArray]:
    """(P, G) what each value function says of prompts with these rates at the group sizes."""
    counts = np.array(GROUP_SIZES)
    found = {name: function(counts, rates[:, None]) for name, function in RIVALS.items()}
    found[GAIN_ALONE] = np.repeat(information_gain(rates)[:, None], counts.size, axis=1)
    return found


def correlation(measured: Measured, predicted: FloatArray, target: FloatArray, *, by_rank: bool) -> Correlation:
    """Correlation over all (prompt, N) of a stage, mean over stages; bootstrap over each stage's prompts.

    Ranks (for Spearman's) are those of the whole stage, also in the resamples.

    Args:
        measured: tells the stages.
        predicted: (P, G).
        target: (P, G).
        by_rank: Spearman's correlation in place of Pearson's.
    """
    rng = np.random.default_rng(SEED)
    drawn = np.zeros(RESAMPLES + 1)
    for mine in measured.stages:
        x, y = predicted[mine], target[mine]
        if by_rank:
            x, y = (ranks(series.ravel()).reshape(series.shape) for series in (x, y))
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


def _verdict(found: Correlation) -> Verdict:
    return "holds" if found.low >= 0.7 else "holds in part" if found.low >= 0.3 else "does not hold"


def _about(measured: Measured) -> str:
    steps = sorted(set(measured.step.tolist()))
    seeds = {step: len(set(measured.seed[measured.step == step].tolist())) for step in steps}
    stages = ", ".join(f"{step} ({count} seed{'s' * (count > 1)})" for step, count in seeds.items())
    return f"{measured.rates.size} prompts, N {GROUP_SIZES[0]} to {GROUP_SIZES[-1]}, training steps {stages}"


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Lines of the table."""
    measured = Measured.of(rows)
    values, about = predictions(measured.rates), _about(measured)
    found = []
    for target, label in TARGETS.items():
        rank = correlation(measured, values[PAPER], measured.by_target[target], by_rank=True)
        linear = correlation(measured, values[PAPER], measured.by_target[target], by_rank=False)
        found.append(
            Finding(
                f"A high V(N, p) means a large {label}",
                "derived, not measured",
                f"Spearman {rank}, Pearson {linear}; {about}",
                _verdict(rank),
            )
        )
    shares = {name: explained(measured, table, "population") for name, table in values.items() if name != GAIN_ALONE}
    best = max(shares, key=lambda name: shares[name])
    listed = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    found.append(
        Finding(
            "Of the value functions the paper's predicts the gain of other prompts best",
            "-",
            f"share of squared gains explained up to a factor: {listed}; {about}",
            "holds" if best == PAPER else "holds in part" if shares[PAPER] > shares[best] - 0.05 else "does not hold",
        )
    )
    fitted = fit(rows)
    ours, paper = fitted["explained"]["fitted"], fitted["explained"][PAPER]
    found.append(
        Finding(
            "The information gain p (1 − p)² has the right shape",
            "p (1 − p)²",
            f"fitted p^{fitted['success_exponent']:.2f} (1 − p)^{fitted['failure_exponent']:.2f} explains "
            f"{100 * ours:.0f} % of the squared own gains of the prompts not fitted on, the paper's "
            f"{100 * paper:.0f} %; {about}",
            "holds" if paper > ours - 0.01 else "holds in part" if paper > ours - 0.1 else "does not hold",
        )
    )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """Method, result, and what went against us."""
    measured = Measured.of(rows)
    values = predictions(measured.rates)
    stages = [row for row in rows if row["part"] == "stage"]
    lines = [
        "On the shipped arithmetic model, as it is and at points of runs of the main job (default settings, a run for "
        f"each seed), prompts were drawn in equal numbers from strata of their success rate ({_about(measured)}). The "
        "success rate is exact: the probability of the answer's tokens and the end of the sequence. Groups were drawn "
        "as training draws them, their GRPO gradient being the mean over the group's rollouts of advantage times "
        "gradient of the log-probability, and so weighted per prompt; weighted per rollout, all gains are N times as "
        "large. Measured, as means over groups: the norm; the cosine to the gradient of a batch of other prompts; the "
        "slope along the gradient of the prompt's own success rate, and of the mean success rate of other training "
        "prompts. " + _steps_taken(rows),
        "",
        "Mean success rate of the training prompts: "
        + "; ".join(
            f"after {step} steps {np.mean([row['mean_rate'] for row in stages if row['step'] == step]):.2f}"
            for step in sorted({row["step"] for row in stages})
        )
        + ".",
        "",
    ]
    for by_rank, name in ((True, "Spearman"), (False, "Pearson")):
        lines += [
            f"{name} correlation over prompts and N, mean over seeds and stages, 95 % bootstrap interval over prompts:",
            "",
            f"| value | {' | '.join(TARGETS.values())} |",
            "| --- |" + " --- |" * len(TARGETS),
        ]
        for value, table in values.items():
            cells = [str(correlation(measured, table, measured.by_target[t], by_rank=by_rank)) for t in TARGETS]
            lines.append(f"| {value} | {' | '.join(cells)} |")
        lines.append("")
    lines += _weighted(measured, values) + _by_stage(measured, values) + _by_size(measured)
    fitted = fit(rows)
    lines += [
        f"Fitted on half of the prompts: V = (1 − p^N − (1−p)^N) · p^{fitted['success_exponent']:.2f} "
        f"(1−p)^{fitted['failure_exponent']:.2f}, with its peak at p = {_peak(fitted):.2f} (the paper's: 0.33). On the "
        f"other half it explains {100 * fitted['explained']['fitted']:.0f} % of the squared gains of the prompt "
        f"itself, the paper's value {100 * fitted['explained'][PAPER]:.0f} %. Fitted to the gain of other prompts, "
        "exponents are {success_exponent:.2f} and {failure_exponent:.2f}.".format(**fit(rows, "population")),
        "",
        _against_us(measured, values, fitted),
    ]
    return "\n".join(lines)


def _peak(fitted: Mapping[str, float]) -> float:
    a, b = fitted["success_exponent"], fitted["failure_exponent"]
    return a / (a + b) if a + b > 0 else float("nan")


def _steps_taken(rows: Sequence[Row]) -> str:
    taken = np.array([row["step_taken"] for row in rows if row["part"] == "prompt" and "step_taken" in row])
    own = float(np.corrcoef(taken[:, 0], taken[:, 1])[0, 1])
    others = float(np.corrcoef(taken[:, 2], taken[:, 3])[0, 1])
    ratio = np.median(taken[:, 0] / taken[:, 1])
    return (
        f"{len(taken)} steps of 0.0001 times a gradient (N = 8) were taken and success rates measured again: gains and "
        f"slopes correlate with {own:.3f} for the prompt itself (median ratio {ratio:.2f}) and {others:.3f} for the "
        "others."
    )


def _weighted(measured: Measured, values: Mapping[str, FloatArray]) -> list[str]:
    counts = np.array(GROUP_SIZES)
    found = {
        name: [
            correlation(measured, table, measured.by_target[target] * counts, by_rank=True)
            for target in ("own", "population")
        ]
        for name, table in values.items()
    }
    return [
        "The same gains weighted per rollout, as in the paper's loss (times N), Spearman:",
        "",
        f"| value | {TARGETS['own']} | {TARGETS['population']} |",
        "| --- | --- | --- |",
        *(f"| {name} | {own} | {others} |" for name, (own, others) in found.items()),
        "",
    ]


def _by_stage(measured: Measured, values: Mapping[str, FloatArray]) -> list[str]:
    lines = [
        "V(N, p) of the paper by stage, Spearman (mean over seeds, standard deviation over seeds):",
        "",
        f"| training steps | {' | '.join(TARGETS.values())} |",
        "| --- |" + " --- |" * len(TARGETS),
    ]
    for step in sorted(set(measured.step.tolist())):
        cells = []
        for target in TARGETS:
            found = [
                np.corrcoef(ranks(values[PAPER][mine].ravel()), ranks(measured.by_target[target][mine].ravel()))[0, 1]
                for mine in measured.stages
                if measured.step[mine[0]] == step
            ]
            cells.append(f"{np.mean(found):.2f} ± {np.std(found, ddof=1) if len(found) > 1 else 0.0:.2f}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return [*lines, ""]


def shape_in_size(measured: Measured, low: float, high: float) -> tuple[FloatArray, FloatArray]:
    """(G,) measured own gain and V(N, p), each summed over prompts with low <= p < high, relative to the largest N."""
    mine = (measured.rates >= low) & (measured.rates < high)
    gains = measured.relative("own")[mine].sum(axis=0)
    mixed = (nonzero_gradient_probability(np.array(GROUP_SIZES), measured.rates[:, None]))[mine]
    weighted = (measured.relative("own")[mine][:, -1:] * mixed).sum(axis=0)  # so that both agree at the largest N
    return gains / gains[-1], weighted / weighted[-1]


def _by_size(measured: Measured) -> list[str]:
    lines = [
        "How the gain of the prompt itself grows with N, relative to the largest N, against the probability of a "
        "non-zero gradient, the factor of V that depends on N:",
        "",
        f"| prompts | {' | '.join(f'N = {n}' for n in GROUP_SIZES)} |",
        "| --- |" + " --- |" * len(GROUP_SIZES),
    ]
    for label, (low, high) in CLASSES.items():
        gains, mixed = shape_in_size(measured, low, high)
        lines.append(f"| {label}: measured | {' | '.join(f'{x:.2f}' for x in gains)} |")
        lines.append(f"| {label}: predicted | {' | '.join(f'{x:.2f}' for x in mixed)} |")
    return [*lines, ""]


def _against_us(measured: Measured, values: Mapping[str, FloatArray], fitted: Mapping[str, object]) -> str:
    said = []
    for target, label in TARGETS.items():
        found = {
            name: correlation(measured, table, measured.by_target[target], by_rank=True).mean
            for name, table in values.items()
        }
        better = [f"{name} ({rank:.2f})" for name, rank in found.items() if rank > found[PAPER] and name != PAPER]
        if better:
            said.append(f"{label} is ranked better than by V ({found[PAPER]:.2f}) by {', '.join(better)}")
    gains, mixed = shape_in_size(measured, *CLASSES["medium"])
    if gains[0] < 0.8 * mixed[0]:
        said.append(
            f"V saturates too early in N: at N = {GROUP_SIZES[0]} medium prompts have {100 * gains[0]:.0f} % of their "
            f"gain at N = {GROUP_SIZES[-1]}, V says {100 * mixed[0]:.0f} %"
        )
    negative = float((measured.by_target["population"][:, 2] < 0).mean())
    said.append(f"the gradient of {100 * negative:.0f} % of the prompts (N = 8) lowers the success rate of the others")
    return "Against us, or against the paper: " + "; ".join(said) + "."
