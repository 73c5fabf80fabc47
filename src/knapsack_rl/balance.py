"""Rollout balancer: spread unequal work over workers so that all of them finish together.

A step of training waits for its last rollout. With N_i rollouts for prompt i, the unit of work is one
rollout, not one prompt (Li et al., arXiv 2509.25849, rollout balancer), and how long a rollout takes is not
known before it ends. Three steps, each usable alone:

* `predict_work` turns the lengths seen at earlier visits into an expected length per prompt;
* `RolloutQueue` hands rollouts to whichever worker is free, longest predicted first. Prefer it: the long
  rollouts start early and the short ones fill the gaps that wrong predictions leave;
* `partition` fixes the placement beforehand, for engines that cannot pull: the error of the predictions stays.

All three are deterministic and draw no random numbers. A worker processes one rollout at a time at constant
speed; an engine that generates several at once is as many workers as it has slots.
"""

import heapq
import operator
import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Vector = NDArray[np.float64]

MIN_COUNT = 1e-9  # a discounted count below this holds no usable evidence: the prompt reads as never seen
_MAX_COUNT = 2.0**53  # above this, adding 1 to a float64 count changes nothing
_MAX_WORK = 1e300  # leaves room for the sum of 1e8 items
_UNDERFLOW = 1e-300  # a smaller sum was discounted to nothing
_SUMS_RTOL = 1e-4  # `total² <= count · total_squared` may fail by this, as sums accumulated in float32 do
_VARIANCE_FLOOR = 1e-18  # a smaller variance, in units of the largest mean square, is rounding error of zero


def predict_work(count: ArrayLike, total: ArrayLike, total_squared: ArrayLike) -> _Vector:
    """Return the expected work per rollout of each prompt, shrunk towards the population mean.

    The raw mean of a few heavy-tailed lengths is noisy, and the population mean ignores what is known. The
    one-way random-effects model (length = population mean + prompt effect + noise) weighs the two: the
    prediction is `mu + n_i / (n_i + s2_within / s2_between) · (mean_i − mu)`. Both variances come from the
    one-way analysis of variance for unequal group sizes (method of moments), and `mu` weighs each prompt's
    mean by that same factor. Every prediction lies between the smallest and the largest observed mean.

    Degenerate cases:

    * nothing observed at all: ones, that is, equal work;
    * a prompt never seen (count below 1e-9, which discounting can produce): `mu`;
    * one seen prompt: its mean, for every prompt;
    * no prompt with more than one rollout, so that the variances cannot be told apart: they are taken as
      equal, which gives the factor n_i / (n_i + 1) and keeps the order of equally observed prompts;
    * means that differ no more than noise explains (s2_between estimated as 0): the pooled mean for all;
    * no noise inside any prompt: each prompt's own mean.

    Args:
        count: (P,) rollouts observed per prompt, in [0, 2^53]. Discounted counts need not be whole; they are
            read as numbers of rollouts, which overstates the noise and so shrinks more.
        total: (P,) sum of their lengths in tokens (or any unit of work), >= 0.
        total_squared: (P,) sum of their squared lengths, >= total² / count.

    Returns:
        (P,) float64 expected work per rollout, in the unit of `total`; finite and >= 0.

    Raises:
        ValueError: if the shapes differ or are not one-dimensional, if a value is outside its range (1e300 at
            most), or if the three sums cannot come from the same observations.
    """
    count_P = _nonnegative_vector(count, "count", _MAX_COUNT)
    total_P = _nonnegative_vector(total, "total")
    total_squared_P = _nonnegative_vector(total_squared, "total_squared")
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


@dataclass(frozen=True, eq=False)
class Partition:
    """A static assignment of R work items to workers, as `partition` returns it. Arrays are read-only.

    Attributes:
        worker_of: (R,) int64, the worker of each item, in [0, workers).
        loads: (workers,) float64, the sum of the work of each worker's items.
        makespan: the largest load: when the last worker finishes.
        lower_bound: no assignment of these items, static or dynamic, can finish before.
        order: (R,) int64, all items in the order in which they were placed: longest first.
    """

    worker_of: NDArray[np.int64]
    loads: _Vector
    makespan: float
    lower_bound: float
    order: NDArray[np.int64]

    @property
    def imbalance(self) -> float:
        """Makespan over lower bound, never below 1; 1 is perfect, and stands for no work at all."""
        return self.makespan / self.lower_bound if self.lower_bound > 0.0 else 1.0

    def indices(self, worker: int) -> NDArray[np.int64]:
        """Return the items of one worker in processing order: longest first, ties by lowest index.

        Args:
            worker: in [0, workers).

        Returns:
            (n,) int64 item indices; the workers' arrays together hold every item once.

        Raises:
            ValueError: if there is no such worker.
        """
        if not 0 <= worker < len(self.loads):
            raise ValueError(f"worker is {worker!r}; allowed: 0 to {len(self.loads) - 1}; pass one of these")
        return self.order[self.worker_of[self.order] == worker]


MOST_WORKERS = 2**24
"""Of a partition, which lists every worker: a mistaken number must not fill the memory."""


def partition(work: ArrayLike, workers: int) -> Partition:
    """Assign each item to a worker: longest item first, always to the least-loaded worker.

    This is the LPT rule (Graham 1969, *Bounds on multiprocessing timing anomalies*): its makespan is at most
    4/3 − 1/(3·workers) times the optimum, in O(R log R). Equal items go in order of their index. Of equally
    loaded workers the one with fewer items takes the next, then the lowest index; the middle rule spreads
    items whose predicted work is 0 but whose true work may not be.

    `lower_bound` is the largest of the mean load, the longest item and, with more items than workers m, the
    sum of the m-th and (m + 1)-th longest, because two of the m + 1 longest must share a worker.

    Args:
        work: (R,) work per item, in [0, 1e300], any unit; one item per rollout, for example
            `np.repeat(predict_work(...), counts)`.
        workers: number of workers, 1 to 2^24.

    Returns:
        The assignment, its loads and how far it may be from the optimum.

    Raises:
        ValueError: if `work` or `workers` is not as described.
    """
    work_R = _nonnegative_vector(work, "work")
    if isinstance(workers, bool) or not isinstance(workers, int | np.integer) or not 1 <= workers <= MOST_WORKERS:
        raise ValueError(
            f"workers is {workers!r}; allowed: a whole number from 1 to {MOST_WORKERS}; pass how many rollouts run at "
            "one time"
        )
    order_R = np.argsort(-work_R, kind="stable").astype(np.int64, copy=False)
    descending = work_R[order_R]
    free = [(0.0, 0, worker) for worker in range(workers)]  # a heap of (load, items, worker)
    assigned: list[int] = []
    for item_work in descending.tolist():
        load, items, worker = free[0]
        assigned.append(worker)
        heapq.heapreplace(free, (load + item_work, items + 1, worker))
    worker_of_R = np.empty_like(order_R)
    worker_of_R[order_R] = assigned
    loads = np.array([load for load, _, _ in sorted(free, key=operator.itemgetter(2))])

    makespan = float(loads.max())
    bounds = [float(descending.sum()) / workers, *descending[:1].tolist()]
    if len(descending) > workers:
        bounds.append(float(descending[workers - 1] + descending[workers]))
    for array in (worker_of_R, loads, order_R):
        array.flags.writeable = False
    # Bound and loads add the same numbers in different orders: rounding must not put the bound above.
    return Partition(worker_of_R, loads, makespan, min(max(bounds), makespan), order_R)


class RolloutQueue:
    """Items for workers that pull: longest predicted first, each item handed out once. Thread-safe.

    `next(queue)` hands out the index of an item and raises StopIteration when none is waiting;
    `for item in queue` does so in a loop, and any number of threads may loop over one queue. `len(queue)` is
    the number of waiting items. The order is fixed by the predictions alone: nothing shuffles it.

    Rollouts of one prompt are separate items, so they may run on different workers. Items of equal predicted
    work go out prompt by prompt, in the order of each prompt's first item, then by index, so that an engine
    with a prefix cache meets the rollouts of a prompt close together.

    A failed item goes back by its predicted work with `requeue`. A loop that has ended does not see items
    requeued later: the worker that requeues must go on pulling.

    Args:
        work: (R,) predicted work per item, in [0, 1e300], any unit.
        ids: R hashable prompt ids, one per item (default: each item is its own prompt); they only break ties.

    Raises:
        ValueError: if `work` is not as described or `ids` has another length.
    """

    def __init__(self, work: ArrayLike, ids: Sequence[Hashable] | None = None) -> None:
        work_R = _nonnegative_vector(work, "work")
        items = range(len(work_R))
        keys = items if ids is None else ids
        if len(keys) != len(items):
            raise ValueError(
                f"ids has {len(keys)} entries for {len(items)} items; allowed: one per item; "
                "repeat each prompt's id once per rollout"
            )
        first: dict[Hashable, int] = {}
        first_of_R = np.array([first.setdefault(key, item) for item, key in enumerate(keys)], dtype=np.int64)
        order_R = np.lexsort((first_of_R, -work_R))  # a stable sort, so the index breaks the last ties
        self._item_at_rank: list[int] = order_R.tolist()
        self._rank_of_item: list[int] = np.argsort(order_R).tolist()
        self._waiting = list(items)  # a heap of ranks; sorted, hence already a heap
        self._is_out = [False] * len(items)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._waiting)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._lock:
            if not self._waiting:
                raise StopIteration
            item = self._item_at_rank[heapq.heappop(self._waiting)]
            self._is_out[item] = True
            return item

    def requeue(self, index: int) -> None:
        """Put back an item that was handed out and failed.

        Args:
            index: the item, as `next` gave it.

        Raises:
            ValueError: if there is no such item, or if it is waiting: never handed out or handed in twice.
        """
        with self._lock:
            whole = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
            if not whole or not 0 <= index < len(self._is_out) or not self._is_out[index]:
                raise ValueError(
                    f"item {index!r} is not handed out; allowed: the items handed out, of 0 to "
                    f"{len(self._is_out) - 1}; requeue an item once each time the queue gave it and it failed"
                )
            self._is_out[index] = False
            heapq.heappush(self._waiting, self._rank_of_item[index])


def _variance_ratio(n: _Vector, mean: _Vector, within_squares: _Vector) -> float | None:
    """Return s2_within / s2_between of the seen prompts; None if nothing shows that prompts differ."""
    if len(n) < 2:
        return None
    repeated = n > 1.0  # only these inform about noise: a count of 1 or less has no degree of freedom
    if not repeated.any():
        return 1.0
    within = float(within_squares[repeated].sum() / (n[repeated] - 1.0).sum())
    share = n / n.sum()
    between_mean_square = float((n * (mean - (share * mean).sum()) ** 2).sum() / (len(n) - 1))
    # E[between_mean_square] = s2_within + n_effective · s2_between (Searle, Casella & McCulloch 1992, ch. 3).
    n_effective = float(n.sum() * (share * (1.0 - share)).sum() / (len(n) - 1))
    between = (between_mean_square - within) / n_effective
    return within / between if between > _VARIANCE_FLOOR else None


def _check_sums(count_P: _Vector, total_P: _Vector, total_squared_P: _Vector) -> None:
    if not count_P.shape == total_P.shape == total_squared_P.shape:
        raise ValueError(
            f"count, total and total_squared have shapes {count_P.shape}, {total_P.shape} and "
            f"{total_squared_P.shape}; allowed: one shape (P,); pass one entry per prompt in each"
        )
    # Cauchy and Schwarz, by square roots because squares may overflow.
    impossible_P = total_P > np.sqrt(count_P) * np.sqrt(total_squared_P) * (1.0 + _SUMS_RTOL)
    impossible_P &= count_P >= MIN_COUNT
    # Discounting makes the count 0 some visits before the sums of longer lengths: that is no mistake.
    impossible_P |= (count_P == 0.0) & (np.maximum(total_P, total_squared_P) > _UNDERFLOW)
    if impossible_P.any():
        i = int(np.argmax(impossible_P))
        raise ValueError(
            f"prompt {i} has count {count_P[i]:g}, total {total_P[i]:g}, total_squared {total_squared_P[i]:g}; "
            "allowed: total² <= count · total_squared, and zeros where count is 0; "
            "sum the lengths and their squares over the rollouts that are counted"
        )


def _nonnegative_vector(values: ArrayLike, name: str, largest: float = _MAX_WORK) -> _Vector:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {vector.shape}; allowed: one dimension; flatten it first")
    bad = ~((vector >= 0.0) & (vector <= largest))  # true for NaN
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"{name}[{i}] is {vector[i]}; allowed: numbers from 0 to {largest:g}; correct that entry")
    return vector
