"""Expected lengths of rollouts per prompt, from observed lengths.

A failure is usually longer than a success of the same prompt, often up to the limit. So lengths are kept by outcome:

    c_i = p_i E[length | success] + (1 - p_i) E[length | failure].

Either expectation is the prompt's mean, shrunk to the population's by :func:`predict_work`: a prompt that never
succeeded has the population's length of a success.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray, as_float64, check_amounts
from knapsack_rl.allocation.tokens import LEAST_TOKENS
from knapsack_rl.estimation.tracker import OUTCOMES, LengthSums, Outcome

LONGEST = 1e9
"""Most tokens of one rollout; squares of mistaken numbers would overflow the sums of lengths."""

LENGTH_SAMPLE = 8192
"""Most known prompts that stand for the population at a step, so that its time does not grow with their number."""

MIN_COUNT = 1e-9  # a discounted count below this holds no usable evidence: the prompt counts as never seen
_MAX_COUNT = 2.0**53  # above this, adding 1 to a float64 count changes nothing
_UNDERFLOW = 1e-300  # a smaller sum was discounted to nothing
_SUMS_RTOL = 1e-4  # `total² <= count · total_squared` may fail by this, as sums accumulated in float32 do
_VARIANCE_FLOOR = 1e-18  # a smaller variance, in units of the largest mean square, is rounding error of zero


def predict_work(count: ArrayLike, total: ArrayLike, total_squared: ArrayLike) -> FloatArray:
    """Return the expected work per rollout of each prompt, shrunk towards the population mean.

    The raw mean of a few heavy-tailed lengths is noisy, and the population mean ignores observations of the prompt.
    The one-way random-effects model (length = population mean + prompt effect + noise) weighs the two: the
    prediction is `mu + n_i / (n_i + s2_within / s2_between) · (mean_i − mu)`. Both variances come from the
    one-way analysis of variance for unequal group sizes (method of moments), and `mu` weighs each prompt's
    mean by that same factor. Every prediction lies between the smallest and the largest observed mean.

    Degenerate cases:

    * nothing observed at all: ones, that is, equal work;
    * a prompt never seen (count below 1e-9, which discounting can produce): `mu`;
    * one seen prompt: its mean, for every prompt;
    * no prompt with more than one rollout, so that the variances cannot be separated: they are assumed to be
      equal, which gives the factor n_i / (n_i + 1) and keeps the order of equally observed prompts;
    * means that differ no more than noise explains (s2_between estimated as 0): the pooled mean for all;
    * no noise within any prompt: the mean of each prompt.

    Args:
        count: (P,) rollouts observed per prompt, in [0, 2^53]. Discounted counts need not be whole; they are
            treated as numbers of rollouts, which overstates the noise and so shrinks more.
        total: (P,) sum of their lengths in tokens (or any unit of work), >= 0.
        total_squared: (P,) sum of their squared lengths, >= total² / count.

    Returns:
        (P,) float64 expected work per rollout, in the unit of `total`; finite and >= 0.

    Raises:
        ValueError: the shapes differ or are not one-dimensional, a value is outside its range (1e300 at most), or the
            three sums cannot come from the same observations.
    """
    sums = (
        check_amounts(count, "count", _MAX_COUNT),
        check_amounts(total, "total"),
        check_amounts(total_squared, "total_squared"),
    )
    _check_sums(*sums)
    return _Population.of(sums).expected(sums)


@dataclass(frozen=True)
class _Population:
    """The random-effects model of the lengths of a population; means are in units of ``scale``.

    Attributes:
        scale: largest root mean square of a prompt, so that no square can overflow; 0 if all lengths are 0.
        mean: population mean mu.
        ratio: s2_within / s2_between; None without evidence that prompts differ.
        least: smallest mean of a prompt.
        most: largest mean of a prompt.
    """

    scale: float
    mean: float
    ratio: float | None
    least: float
    most: float

    @classmethod
    def of(cls, sums: LengthSums) -> _Population:
        """Fit the model; without any observation every prompt has length 1."""
        count_P, total_P, total_squared_P = sums
        seen_P = count_P >= MIN_COUNT
        if not seen_P.any():
            return cls(1.0, 1.0, None, 1.0, 1.0)
        n, mean = count_P[seen_P], total_P[seen_P] / count_P[seen_P]
        root_mean_square = np.sqrt(total_squared_P[seen_P]) / np.sqrt(n)
        scale = float(root_mean_square.max())
        if scale == 0.0:
            return cls(0.0, 0.0, None, 0.0, 0.0)
        mean, mean_square = mean / scale, (root_mean_square / scale) ** 2
        ratio = _variance_ratio(n, mean, n * np.maximum(mean_square - mean**2, 0.0))
        least, most = float(mean.min()), float(mean.max())
        mu = float(np.average(mean, weights=n if ratio is None else n / (n + ratio)))
        return cls(scale, min(max(mu, least), most), ratio, least, most)  # an average may err in the last place

    def expected(self, sums: LengthSums) -> FloatArray:
        """Return the expected length of a rollout of prompts, who need not be among those of the model."""
        count_P, total_P, _ = sums
        seen_P = count_P >= MIN_COUNT
        predicted_P = np.full_like(count_P, self.mean)
        if self.ratio is not None:
            n, mean = count_P[seen_P], total_P[seen_P] / count_P[seen_P] / self.scale
            # Rounding may leave the range of the means by one unit in the last place, and so turn 0 negative.
            least, most = np.minimum(mean, self.least), np.maximum(mean, self.most)
            predicted_P[seen_P] = np.clip(self.mean + n / (n + self.ratio) * (mean - self.mean), least, most)
        return predicted_P * self.scale


def expected_lengths(lengths: Mapping[Outcome, LengthSums], rows: IntArray) -> FloatArray:
    """Return (M,) expected tokens of a rollout whatever its outcome; ones if no length has been observed.

    Args:
        lengths: sums of all known prompts by outcome, see ``Tracker.lengths``.
        rows: (M,) their rows, -1 for a prompt never seen, which has the population's mean.
    """
    return _Population.of(_population_sums(lengths, OUTCOMES)).expected(_sums_at(lengths, OUTCOMES, rows))


def expected_tokens(
    lengths: Mapping[Outcome, LengthSums], rows: IntArray, success_rates: FloatArray
) -> FloatArray | None:
    """Return (M,) expected tokens per rollout, at least 1, or None if no length has been observed.

    If lengths are known of one outcome only, they are used for the other too.

    Args:
        lengths: sums of all known prompts by outcome, see ``Tracker.lengths``.
        rows: (M,) their rows, -1 for a prompt never seen.
        success_rates: (M,) estimates; NaN is replaced by the share of successes among the rollouts of known length.
    """
    everyone = {outcome: _population_sums(lengths, (outcome,)) for outcome in OUTCOMES}
    known = [outcome for outcome in OUTCOMES if (everyone[outcome][0] >= MIN_COUNT).any()]
    if not known:
        return None
    expected = {o: _Population.of(everyone[o]).expected(_sums_at(lengths, (o,), rows)) for o in known}
    if len(known) == 1:
        return np.maximum(expected[known[0]], LEAST_TOKENS)
    counts = {outcome: float(everyone[outcome][0].sum()) for outcome in known}
    p = np.where(np.isnan(success_rates), counts["success"] / sum(counts.values()), success_rates)
    return np.maximum(p * expected["success"] + (1.0 - p) * expected["failure"], LEAST_TOKENS)


def _population_sums(lengths: Mapping[Outcome, LengthSums], outcomes: Sequence[Outcome]) -> LengthSums:
    """Return the sums of at most ``LENGTH_SAMPLE`` known prompts, or of all if these have no observation.

    The sample is a golden-ratio sequence of places: spread evenly, and without a period that an order of the prompts,
    such as two data sets in turn, could share.
    """
    known = lengths[outcomes[0]][0].size
    if known > LENGTH_SAMPLE:
        places = (np.arange(LENGTH_SAMPLE) * ((5**0.5 - 1) / 2) % 1.0 * known).astype(np.int64)
        sample = _sums_at(lengths, outcomes, places)
        if (sample[0] >= MIN_COUNT).any():
            return sample
    return _sums_at(lengths, outcomes, np.arange(known))


def _sums_at(lengths: Mapping[Outcome, LengthSums], outcomes: Sequence[Outcome], rows: IntArray) -> LengthSums:
    """Return the sums of the given rows over these outcomes; zeros for row -1."""
    if not lengths[outcomes[0]][0].size:
        return np.zeros(rows.size), np.zeros(rows.size), np.zeros(rows.size)
    count, total, squares = (
        np.where(rows < 0, 0.0, sum(column[rows] for column in columns))
        for columns in zip(*(lengths[outcome] for outcome in outcomes), strict=True)
    )
    return count, total, squares


def check_lengths(lengths: ArrayLike, rollouts: int) -> FloatArray:
    """Return the tokens of each rollout as (R,) float64.

    Raises:
        ValueError: there is not one per rollout, or one is outside [0, ``LONGEST``].
    """
    try:
        array, _ = as_float64(lengths)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lengths must be {rollouts} numbers from 0 to {LONGEST:g}, one per rollout: {error}"
        ) from error
    if array.shape != (rollouts,) or not ((array >= 0) & (array <= LONGEST)).all():
        raise ValueError(
            f"lengths must be {rollouts} numbers from 0 to {LONGEST:g}, one per rollout, got shape {array.shape}"
        )
    return array


def _variance_ratio(n: FloatArray, mean: FloatArray, within_squares: FloatArray) -> float | None:
    """Return s2_within / s2_between of the seen prompts, or None without evidence that prompts differ."""
    if len(n) < 2:
        return None
    repeated = n > 1.0  # a count of 1 or less has no degree of freedom for noise
    if not repeated.any():
        return 1.0
    within = float(within_squares[repeated].sum() / (n[repeated] - 1.0).sum())
    share = n / n.sum()
    between_mean_square = float((n * (mean - (share * mean).sum()) ** 2).sum() / (len(n) - 1))
    # E[between_mean_square] = s2_within + n_effective · s2_between (Searle, Casella & McCulloch 1992, ch. 3).
    n_effective = float(n.sum() * (share * (1.0 - share)).sum() / (len(n) - 1))
    between = (between_mean_square - within) / n_effective
    return within / between if between > _VARIANCE_FLOOR else None


def check_length_sums(lengths: Mapping[Outcome, LengthSums]) -> None:
    """Raise ``ValueError`` if sums of lengths, as of ``Tracker.lengths``, cannot come from the same rollouts."""
    for outcome, sums in lengths.items():
        try:
            _check_sums(*sums)
        except ValueError as error:
            raise ValueError(f"lengths of the outcome {outcome!r} are impossible: {error}") from error


def _check_sums(count_P: FloatArray, total_P: FloatArray, total_squared_P: FloatArray) -> None:
    if not count_P.shape == total_P.shape == total_squared_P.shape:
        raise ValueError(
            f"count, total and total_squared have shapes {count_P.shape}, {total_P.shape} and "
            f"{total_squared_P.shape}; allowed: one shape (P,); pass one entry per prompt in each"
        )
    # Cauchy and Schwarz, by square roots because squares may overflow.
    impossible_P = total_P > np.sqrt(count_P) * np.sqrt(total_squared_P) * (1.0 + _SUMS_RTOL)
    impossible_P &= count_P >= MIN_COUNT
    # Discounting takes the count to 0 some visits before the sums of longer lengths, which is not an error.
    impossible_P |= (count_P == 0.0) & (np.maximum(total_P, total_squared_P) > _UNDERFLOW)
    if impossible_P.any():
        i = int(np.argmax(impossible_P))
        raise ValueError(
            f"prompt {i} has count {count_P[i]:g}, total {total_P[i]:g}, total_squared {total_squared_P[i]:g}; "
            "allowed: total² <= count · total_squared, and zeros where count is 0; "
            "sum the lengths and their squares over the rollouts that are counted"
        )
