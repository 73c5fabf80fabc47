"""Expected lengths of rollouts per prompt, from observed lengths.

A failure is usually longer than a success of the same prompt, often up to the limit. So lengths are kept by outcome:

    c_i = p_i E[length | success] + (1 - p_i) E[length | failure].

Either expectation is the prompt's mean, shrunk to the population's by :func:`predict_work`: a prompt that never
succeeded has the population's length of a success.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray, check_amounts
from knapsack_rl.allocation.policies import LEAST_TOKENS
from knapsack_rl.estimation.tracker import Outcome, Records

LONGEST = 1e9
"""Most tokens of one rollout; squares of mistaken numbers would overflow the sums of lengths."""

MIN_COUNT = 1e-9  # a discounted count below this holds no usable evidence: the prompt counts as never seen
_MAX_COUNT = 2.0**53  # above this, adding 1 to a float64 count changes nothing
_UNDERFLOW = 1e-300  # a smaller sum was discounted to nothing
_SUMS_RTOL = 1e-4  # `total² <= count · total_squared` may fail by this, as sums accumulated in float32 do
_VARIANCE_FLOOR = 1e-18  # a smaller variance, in units of the largest mean square, is rounding error of zero
_OUTCOMES: tuple[Outcome, Outcome] = ("success", "failure")


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
    count_P = check_amounts(count, "count", _MAX_COUNT)
    total_P = check_amounts(total, "total")
    total_squared_P = check_amounts(total_squared, "total_squared")
    _check_sums(count_P, total_P, total_squared_P)

    seen_P = count_P >= MIN_COUNT
    if not seen_P.any():
        return np.ones_like(count_P)
    n, mean = count_P[seen_P], total_P[seen_P] / count_P[seen_P]
    root_mean_square = np.sqrt(total_squared_P[seen_P]) / np.sqrt(n)
    # In units of the largest root mean square no square below can overflow.
    scale = float(root_mean_square.max())
    if scale == 0.0:
        return np.zeros_like(count_P)
    mean, mean_square = mean / scale, (root_mean_square / scale) ** 2

    ratio = _variance_ratio(n, mean, n * np.maximum(mean_square - mean**2, 0.0))
    factor = np.zeros_like(n) if ratio is None else n / (n + ratio)
    mu = float(np.average(mean, weights=n if ratio is None else factor))
    predicted_P = np.full_like(count_P, mu)
    predicted_P[seen_P] = mu + factor * (mean - mu)
    # Rounding may leave the range of the means by one unit in the last place, and so turn 0 negative.
    return np.clip(predicted_P, mean.min(), mean.max()) * scale


def shrunk_lengths(sums: tuple[FloatArray, FloatArray, FloatArray], rows: IntArray) -> FloatArray:
    """Return (M,) expected lengths of a rollout of each prompt, shrunk to the population; ones if none is known.

    Args:
        sums: (P,) count, sum and sum of squares of the lengths of every known prompt.
        rows: (M,) index of each prompt; -1 for one never seen, which has the population's mean.
    """
    # A prompt without observations is appended, where index -1 finds it.
    return predict_work(*(np.append(column, 0.0) for column in sums))[rows]


def expected_tokens(everyone: Records, rows: IntArray, success_rates: FloatArray) -> FloatArray | None:
    """Return (M,) expected tokens per rollout, at least 1, or None if no length has been observed.

    If lengths are known of one outcome only, they are used for the other too.

    Args:
        everyone: records of all known prompts.
        rows: (M,) their rows, -1 for a prompt never seen.
        success_rates: (M,) estimates; NaN is replaced by the share of successes among all rollouts of known length.
    """
    observed = {outcome: everyone.lengths_of(outcome) for outcome in _OUTCOMES}
    counts = {outcome: float(sums[0].sum()) for outcome, sums in observed.items()}
    known = [outcome for outcome in _OUTCOMES if (observed[outcome][0] >= MIN_COUNT).any()]
    if not known:
        return None
    lengths = {outcome: shrunk_lengths(observed[outcome], rows) for outcome in known}
    if len(known) == 1:
        return np.maximum(lengths[known[0]], LEAST_TOKENS)
    p = np.where(np.isnan(success_rates), counts["success"] / sum(counts.values()), success_rates)
    return np.maximum(p * lengths["success"] + (1.0 - p) * lengths["failure"], LEAST_TOKENS)


def check_lengths(lengths: ArrayLike, rollouts: int) -> FloatArray:
    """Return the tokens of each rollout as (R,) float64.

    Raises:
        ValueError: there is not one per rollout, or one is outside [0, ``LONGEST``].
    """
    array = np.asarray(lengths, dtype=np.float64)
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
