"""What the rows of ``experiments.robustness`` say: table lines, a paragraph, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.contract import Finding, Row, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECORDED = "recorded run"
WINDOW, SAMPLED = "window (rewards)", "fresh rewards"
DISCOUNT, PRIOR = "discount per visit", "prior (pseudo-rewards)"
DELAY, LOGITS = "outcomes late (epochs)", "noise on the true rate (logits)"
KNOBS = (WINDOW, SAMPLED, DISCOUNT, PRIOR, DELAY, LOGITS)
LOGARITHMIC = (WINDOW, SAMPLED, PRIOR)

DEFAULT, PAPER = "Bayes filter", "paper"
LOWEST_DRAWN = -0.6

Curve = dict[float, tuple[float, float]]
"""Where on the curve to (mean, standard deviation over seeds) of the gain captured."""


def curve(rows: Sequence[Row], environment: str, knob: str, policy: str) -> Curve:
    """Gain captured of a policy as the knob is turned; settings in which it is not defined are left out."""
    found: dict[float, list[float]] = {}
    for row in rows:
        asked = (row["environment"], row["knob"], row["policy"]) == (environment, knob, policy)
        if asked and row["gain_captured"] is not None:
            found.setdefault(row["at"], []).append(row["gain_captured"])
    return {
        at: (float(np.mean(gains)), float(np.std(gains, ddof=1)) if len(gains) > 1 else 0.0)
        for at, gains in sorted(found.items())
    }


def _policies(rows: Sequence[Row], knob: str) -> list[str]:
    return list(dict.fromkeys(row["policy"] for row in rows if row["knob"] == knob))


def _environments(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["environment"] for row in rows))


def _seeds(rows: Sequence[Row]) -> int:
    return len({row["seed"] for row in rows})


def _percent(at: tuple[float, float]) -> str:
    return f"{100 * at[0]:.0f} ± {100 * at[1]:.0f} %".replace("-", "−")


def _ends(found: Curve) -> str:
    """The worst and the best point, with their settings."""
    worst, best = min(found, key=lambda at: found[at][0]), max(found, key=lambda at: found[at][0])
    return f"from {_percent(found[worst])} at {worst:g} to {_percent(found[best])} at {best:g}"


def _spread(found: Curve) -> float:
    means = [mean for mean, _ in found.values()]
    return max(means) - min(means)


def _graded(loss: float, small: float, large: float) -> Verdict:
    return "holds" if loss <= small else "holds in part" if loss <= large else "does not hold"


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Lines of the table; all on the recorded run, whose rates are those of a real training run."""
    seeds = f"recorded run, {_seeds(rows)} seeds"
    late = {policy: curve(rows, RECORDED, DELAY, policy) for policy in (DEFAULT, PAPER)}
    last = max(late[DEFAULT])
    first = min(at for at in late[DEFAULT] if at > 0)
    found = [
        Finding(
            "Success rates of an earlier epoch are accurate enough (one more epoch of delay costs a tenth of the gain "
            "at most)",
            "assumed",
            "; ".join(
                f"{policy}: {_percent(gains[0.0])} of the gain captured at once, {_percent(gains[first])} with "
                f"outcomes {first:g} epoch{'s' * (first > 1)} late, {_percent(gains[last])} with {last:g}"
                for policy, gains in late.items()
            )
            + f"; {seeds}",
            _graded(1.0 - late[DEFAULT][first][0] / late[DEFAULT][0.0][0], 0.1, 0.5),
        )
    ]
    window = curve(rows, RECORDED, WINDOW, PAPER)
    found.append(
        Finding(
            "The length of the paper's window matters little (at most 5 points of the gain)",
            "16 rewards",
            f"gain captured {_ends(window)} rewards; {seeds}",
            _graded(_spread(window), 0.05, 0.2),
        )
    )
    knobs = [("Beta", DISCOUNT), ("empirical Bayes", DISCOUNT), ("Beta", PRIOR)]
    curves = {pair: curve(rows, RECORDED, pair[1], pair[0]) for pair in knobs}
    found.append(
        Finding(
            "Discount and smoothing matter little (at most 5 points of the gain)",
            "-",
            "; ".join(f"{policy}, {knob}: {_ends(found)}" for (policy, knob), found in curves.items()) + f"; {seeds}",
            _graded(max(_spread(found) for found in curves.values()), 0.05, 0.2),
        )
    )
    noise = curve(rows, RECORDED, LOGITS, _policies(rows, LOGITS)[0])
    half = [at for at, (mean, _) in noise.items() if mean >= 0.5]
    found.append(
        Finding(
            "Half of the gain survives noise of one logit on the true rates",
            "-",
            ", ".join(f"{at:g} logits: {_percent(gain)}" for at, gain in noise.items()) + f"; {seeds}",
            "holds" if max(half) >= 1.0 else "holds in part" if max(half) >= 0.5 else "does not hold",
        )
    )
    lead, rival, where = _closest_rival(rows)
    found.append(
        Finding(
            "The Bayes filter as it comes captures as much as the best setting of any other estimator",
            "-",
            f"least lead {100 * lead:+.1f} points, over {rival} ({where}); {_seeds(rows)} seeds".replace("-", "−"),
            _graded(-lead, 0.0, 0.05),
        )
    )
    return found


def _closest_rival(rows: Sequence[Row]) -> tuple[float, str, str]:
    """(lead of the default over the best setting of any other estimator, that setting, environment), at its least."""
    found = []
    for where in _environments(rows):
        default = curve(rows, where, DELAY, DEFAULT)[0.0][0]
        for knob in (WINDOW, DISCOUNT, PRIOR):
            for policy in _policies(rows, knob):
                for at, (mean, _) in curve(rows, where, knob, policy).items():
                    found.append((default - mean, f"{policy} with {knob} {at:g}", where))
    return min(found)


def paragraph(rows: Sequence[Row]) -> str:
    """Method, result, and what went against us."""
    lines = [
        "In the simulator the true success rates are known, so the value of every allocation is, too. Shown is the "
        "share of the gain between uniform allocation (0 %) and known rates (100 %) that a policy captures at the same "
        "budget (N = 8, N_low = 2, N_up = 128), at visits 8 and later; below 0 % it is worse than uniform. One thing "
        "is changed at a time, all else being the default. The recorded run takes part with the half of its prompts on "
        "which nothing was chosen; no setting was chosen on any of these figures. Mean ± standard deviation over "
        f"{_seeds(rows)} seeds.",
    ]
    for knob in KNOBS:
        curves = {
            (where, policy): curve(rows, where, knob, policy)
            for where in _environments(rows)
            for policy in _policies(rows, knob)
        }
        points = sorted({at for found in curves.values() for at in found})
        lines += [
            "",
            f"| {knob} | {' | '.join(f'{at:g}' for at in points)} |",
            "| --- |" + " --- |" * len(points),
        ]
        for (where, policy), found in curves.items():
            cells = [_percent(found[at]) if at in found else "–" for at in points]
            lines.append(f"| {where}: {policy} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _against_us(rows)])


def _against_us(rows: Sequence[Row]) -> str:
    said = []
    lead, rival, where = _closest_rival(rows)
    if lead < 0:
        said.append(f"{rival} captures {-100 * lead:.1f} points more than the Bayes filter ({where})")
    for environment in _environments(rows):
        late = curve(rows, environment, DELAY, DEFAULT)
        rest = max(late)
        if late[rest][0] < 0.5 * late[0.0][0]:
            said.append(
                f"with outcomes {rest:g} epochs late the Bayes filter keeps {_percent(late[rest])} of "
                f"{_percent(late[0.0])} ({environment})"
            )
        beaten = [
            policy
            for policy in _policies(rows, DELAY)
            if policy != DEFAULT and curve(rows, environment, DELAY, policy)[rest][0] > late[rest][0]
        ]
        if beaten:
            said.append(f"and then {', '.join(beaten)} captures more ({environment})")
        worse = sorted(
            {
                f"{policy} ({knob} {at:g})"
                for knob in (WINDOW, SAMPLED)
                for policy in _policies(rows, knob)
                for at, (mean, _) in curve(rows, environment, knob, policy).items()
                if mean < 0
            }
        )
        if worse:
            said.append(f"worse than uniform: {', '.join(worse)} ({environment})")
    return "Against us, or against the paper: " + ("; ".join(said) if said else "nothing in these rows") + "."


def figure(rows: Sequence[Row]) -> Figure:
    """Gain captured against each setting; an environment a row.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    places = _environments(rows)
    page = Figure(figsize=(15, 2.9 * len(places)), layout="constrained")
    axes = page.subplots(len(places), len(KNOBS), sharey=True, sharex="col", squeeze=False)
    for where, line in zip(places, axes, strict=True):
        for knob, ax in zip(KNOBS, line, strict=True):
            _draw(rows, where, knob, ax)
            ax.set_xlabel(knob if where == places[-1] else "")
        line[0].set_ylabel(f"{where}\ngain captured (%)")
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    page.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    return page


def _draw(rows: Sequence[Row], where: str, knob: str, ax: Axes) -> None:
    from knapsack_rl.report.plots import CURVE_COLOURS, MARKERS

    every = list(dict.fromkeys(row["policy"] for row in rows))
    for policy in _policies(rows, knob):
        found = curve(rows, where, knob, policy)
        style = every.index(policy)
        mean, deviation = (100 * np.array(part) for part in zip(*found.values(), strict=True))
        colour, x = CURVE_COLOURS[style], list(found)
        ax.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, mean, color=colour, marker=MARKERS[style], markersize=4, linewidth=1.4, label=policy)
    if knob in LOGARITHMIC:
        ax.set_xscale("log", base=2)
    ax.axhline(0, color="#777777", linewidth=0.8)
    ax.set_ylim(100 * LOWEST_DRAWN, 105)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.6)
