"""Signs of trouble in the metrics of a run, each reported once with a likely cause and the setting to change.

:class:`Watch` reads rows of metrics and nothing else, so it works with any trainer, a finished log, and tests.
:class:`WarningLog` writes its findings into the run folder.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knapsack_rl.runs.files import append_row, finite_number, read_rows

logger = logging.getLogger(__name__)

WINDOW = 25
"""Rows averaged before anything is reported, because single steps are noisy."""

FEW_PROMPTS = 0.1
"""Share of prompts with a gradient below which gradients have collapsed."""
BOUGHT = 0.2
"""Share of rollouts minus share of prompts with a gradient above which the budget buys the former with the latter."""
LONGEST_OVER_MEAN = 4.0
"""Ratio of the longest completion to the mean above which a step waits for stragglers ..."""
SHORT = 64
"""... unless even the longest has fewer tokens than this."""
UNEVEN = 1.25
"""Ratio of the busiest process's tokens to the mean over processes that counts as uneven."""
LOST = 0.15
"""Share of solved prompts that fail at their next visit. With evenly spread success rates and two rollouts, chance
alone gives 0.10."""
FEWEST_SOLVED = 50
"""Solved prompts that must have been visited again before losses are judged."""
FORGOTTEN = 0.1
"""Drop of held-out accuracy below its best, over two evaluations, that counts as forgetting."""
MISCALIBRATED = 0.15
"""Difference between predicted and realised share of groups with a gradient that counts as miscalibrated."""
TRUNCATED = 0.3
"""Share of completions ending at the length limit that counts as truncation."""
GROUPS_LOST = 0.05
"""Share of groups lost above which it matters which ones."""
HARDER = 0.15
"""Estimated success rate by which lost groups may lie below those that arrive."""
LONGER = 1.3
"""Ratio of the length of lost groups to that of those that arrive above which the loss is by length."""

ROLLOUTS = "knapsack/effective_gradient_ratio"
PROMPTS = "knapsack/effective_prompt_ratio"
SOLVED, UNSOLVED = "knapsack/all_correct", "knapsack/all_wrong"
SOLVED_BEFORE, LOST_AGAIN = "knapsack/solved_before", "knapsack/lost"
PREDICTED, REALISED = "knapsack/predicted_nonzero_gradient", "knapsack/realised_nonzero_gradient"
MEAN_LENGTH, MAX_LENGTH, CLIPPED = "completions/mean_length", "completions/max_length", "completions/clipped_ratio"
BALANCE = "knapsack/process_imbalance"
LOST_SHARE = "knapsack/lost_groups_share"
LOST_RATE, ARRIVED_RATE = "knapsack/lost_groups_success_rate", "knapsack/arrived_groups_success_rate"
LOST_LENGTH, ARRIVED_LENGTH = "knapsack/lost_groups_length", "knapsack/arrived_groups_length"
HELD_OUT = "held_out/accuracy"
WATCHED = (
    *(ROLLOUTS, PROMPTS, SOLVED, UNSOLVED, SOLVED_BEFORE, LOST_AGAIN, PREDICTED, REALISED),
    *(MEAN_LENGTH, MAX_LENGTH, CLIPPED, BALANCE),
    *(LOST_SHARE, LOST_RATE, ARRIVED_RATE, LOST_LENGTH, ARRIVED_LENGTH),
)


@dataclass(frozen=True)
class Finding:
    """A sign of trouble.

    Attributes:
        kind: ``"collapse"``, ``"bought"``, ``"stragglers"``, ``"oscillation"``, ``"miscalibration"``,
            ``"truncation"`` or ``"starvation"``.
        step: the step at which it was found.
        seen: the measurement.
        cause: the most likely cause.
        remedy: the setting to change.
    """

    kind: str
    step: int
    seen: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        """Return the whole finding as one line."""
        return f"step {self.step}: {self.seen} {self.cause} {self.remedy}"


class Watch:
    """Looks for signs of trouble in rows of metrics.

    Each is reported once, when the mean over a full window of rows passes its threshold. Keys are those of
    ``metrics.jsonl`` and of the TRL trainer's log; metrics missing from a row are not judged.

    Args:
        window: rows averaged, >= 1.
        reported: kinds reported before, for a run that is resumed.

    Raises:
        ValueError: the window is below 1.
    """

    def __init__(self, *, window: int = WINDOW, reported: Iterable[str] = ()) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self._window = window
        self._recent = {name: deque[float](maxlen=window) for name in WATCHED}
        self._held_out: list[float] = []
        self._reported = set(reported)

    def row(self, row: Mapping[str, Any]) -> list[Finding]:
        """Take in a row with its ``step``; return the findings that are new."""
        for name, numbers in self._recent.items():
            number = finite_number(row.get(name))
            if number is not None:
                numbers.append(number)
            elif name == LOST_AGAIN and row.get(SOLVED_BEFORE) == 0:
                numbers.append(0.0)  # stays aligned with the number of prompts of which it is a share
        accuracy = finite_number(row.get(HELD_OUT))
        if accuracy is not None:
            self._held_out.append(accuracy)
        found = []
        for kind, rule in _RULES.items():
            texts = None if kind in self._reported else rule(self)
            if texts is not None:
                self._reported.add(kind)
                found.append(Finding(kind, int(row.get("step", 0)), *texts))
        return found

    def mean(self, name: str) -> float:
        """Return the mean over the window; NaN until it is full."""
        numbers = self._recent[name]
        return sum(numbers) / self._window if len(numbers) == self._window else math.nan

    def lost_share(self) -> float:
        """Return the share of prompts solved at their last visit that failed at this one; NaN if there are too few."""
        solved, lost = self._recent[SOLVED_BEFORE], self._recent[LOST_AGAIN]
        if len(solved) < self._window or len(lost) < self._window or sum(solved) < FEWEST_SOLVED:
            return math.nan
        return sum(share * size for share, size in zip(lost, solved, strict=True)) / sum(solved)

    def forgotten(self) -> tuple[float, float]:
        """Return the best held-out accuracy so far, and how far both newest evaluations lie below it."""
        if len(self._held_out) < 3:
            return math.nan, math.nan
        best = max(self._held_out)
        return best, best - max(self._held_out[-2:])


def watch_rows(rows: Iterable[Mapping[str, Any]], *, window: int = WINDOW) -> list[Finding]:
    """Return all findings of a finished log, in the order of its rows."""
    watch = Watch(window=window)
    return [finding for row in rows for finding in watch.row(row)]


class WarningLog:
    """Watches a run and writes each finding to a file as one JSON line; a resumed run repeats none.

    Args:
        path: the file, ``warnings.jsonl`` of the run folder.
        on_finding: called with each finding; by default it is logged as a warning.
        window: rows averaged, >= 1.
    """

    def __init__(
        self, path: Path, on_finding: Callable[[Finding], None] | None = None, *, window: int = WINDOW
    ) -> None:
        self._path, self._on_finding = path, on_finding or _log
        self._watch = Watch(window=window, reported=[str(row.get("kind")) for row in read_rows(path)])

    def row(self, row: Mapping[str, Any]) -> None:
        """Take in a row of metrics."""
        for finding in self._watch.row(row):
            self._on_finding(finding)
            try:
                append_row(self._path, dataclasses.asdict(finding))
            except OSError as error:
                logger.warning("%s could not be written (%s); the run continues", self._path, error)


def _log(finding: Finding) -> None:
    logger.warning("%s", finding)


_Texts = tuple[str, str, str] | None
"""Measurement, cause and remedy; None if the sign is absent."""


def _collapse(watch: Watch) -> _Texts:
    share = watch.mean(PROMPTS)
    if not share < FEW_PROMPTS:
        return None
    seen = f"Only {share:.0%} of the prompts carry a gradient."
    solved, unsolved = watch.mean(SOLVED), watch.mean(UNSOLVED)
    if solved > 0.7:
        return (
            seen,
            f"{solved:.0%} of the groups are entirely correct: the data set is used up.",
            "Stop here, or add harder prompts; min_rollouts 0 skips solved ones.",
        )
    if unsolved > 0.7:
        return (
            seen,
            f"{unsolved:.0%} of the groups are entirely wrong: the prompts are out of reach, or the verifier rejects "
            "correct answers.",
            "Read the sample completions first. Then add easier prompts, or raise max_rollouts if the largest "
            "allocation reaches it.",
        )
    return (
        seen,
        "Most prompts are either solved or out of reach, or their groups are too small to hold both outcomes.",
        "Raise num_generations (--rollouts-per-prompt), or add prompts of medium difficulty.",
    )


def _bought(watch: Watch) -> _Texts:
    rollouts, prompts = watch.mean(ROLLOUTS), watch.mean(PROMPTS)
    if not rollouts - prompts > BOUGHT:
        return None
    return (
        f"{rollouts:.0%} of the rollouts but only {prompts:.0%} of the prompts carry a gradient.",
        "A few prompts get most of the budget: this raises the share of rollouts, but few prompts learn.",
        "Lower max_rollouts; with allocation 'paper' or estimator 'window' try 'bayes-filter'.",
    )


def _stragglers(watch: Watch) -> _Texts:
    uneven, longest, mean = watch.mean(BALANCE), watch.mean(MAX_LENGTH), watch.mean(MEAN_LENGTH)
    if uneven > UNEVEN:
        return (
            f"The busiest process generates {uneven:.2f} times the mean of the processes.",
            "Long completions fall on the same process, because the rollouts of a prompt do.",
            "Generate with a server that all processes share (use_vllm, vllm_mode 'server'), or cap "
            "max_completion_length (--max-completion-tokens).",
        )
    if longest >= SHORT and longest > LONGEST_OVER_MEAN * mean:
        return (
            f"The longest completion of a step has {longest:,.0f} tokens, {longest / mean:.1f} times the mean.",
            "Every step waits for its longest completion after the others have finished.",
            "Lower max_completion_length (--max-completion-tokens), or generate with vLLM, which fills the gaps; in "
            "your own training loop use RolloutQueue.",
        )
    return None


def _oscillation(watch: Watch) -> _Texts:
    lost = watch.lost_share()
    if lost > LOST:
        return (
            f"{lost:.0%} of the prompts that were solved at their last visit now fail more often than not.",
            "The policy forgets what it had learned: updates are too large, or solved prompts get too little weight.",
            "Lower learning_rate, raise min_rollouts, or set kl_coefficient (TRL's beta) above 0.",
        )
    best, below = watch.forgotten()
    if below > FORGOTTEN:
        return (
            f"Held-out accuracy has fallen {100 * below:.0f} points below its best, {best:.0%}.",
            "The policy forgets, or overfits the prompts it trains on.",
            "Lower learning_rate or train fewer steps; the checkpoint of the best evaluation may still be there.",
        )
    return None


def _miscalibration(watch: Watch) -> _Texts:
    predicted, realised = watch.mean(PREDICTED), watch.mean(REALISED)
    if predicted - realised > MISCALIBRATED:
        return (
            f"A gradient was predicted for {predicted:.0%} of the groups, but {realised:.0%} have one.",
            "Success rates move faster than the estimates, or the rollouts of a prompt resemble each other more than "
            "chance allows.",
            "Visit prompts more often (fewer train_prompts), lower learning_rate, or check temperature; with estimator "
            "'beta', 'empirical-bayes' or 'window' try 'bayes-filter'.",
        )
    if realised - predicted > MISCALIBRATED:
        return (
            f"A gradient was predicted for {predicted:.0%} of the groups, but {realised:.0%} have one.",
            "Rewards may have more than two levels, or the success threshold does not split them.",
            "Set outcome_reward or success_threshold so that every outcome is a success or a failure.",
        )
    return None


def _truncation(watch: Watch) -> _Texts:
    clipped = watch.mean(CLIPPED)
    if not clipped > TRUNCATED:
        return None
    return (
        f"{clipped:.0%} of the completions end at the length limit.",
        "A truncated answer counts as wrong, so its prompt looks harder than it is.",
        "Raise max_completion_length (--max-completion-tokens), or ask for shorter answers.",
    )


def _starvation(watch: Watch) -> _Texts:
    share = watch.mean(LOST_SHARE)
    rate, arrived_rate = watch.mean(LOST_RATE), watch.mean(ARRIVED_RATE)
    length, arrived_length = watch.mean(LOST_LENGTH), watch.mean(ARRIVED_LENGTH)
    harder, longer = arrived_rate - rate > HARDER, length > LONGER * arrived_length
    if not share > GROUPS_LOST or not (harder or longer):
        return None
    seen = []
    if harder:
        seen.append(f"harder (estimated success rate {rate:.2f} against {arrived_rate:.2f})")
    if longer:
        seen.append(f"longer ({length:,.0f} tokens against {arrived_length:,.0f})")
    return (
        f"{share:.0%} of the groups are lost, and they are {' and '.join(seen)} than those that arrive.",
        "Long rollouts outlive the policies that the trainer accepts: hard prompts are generated but rarely trained "
        "on.",
        "Raise max_staleness (verl: max_off_policy_threshold), lower max_inflight_tasks or max_completion_length, or "
        "add generation servers.",
    )


_RULES: dict[str, Callable[[Watch], _Texts]] = {
    "collapse": _collapse,
    "bought": _bought,
    "stragglers": _stragglers,
    "oscillation": _oscillation,
    "miscalibration": _miscalibration,
    "truncation": _truncation,
    "starvation": _starvation,
}
