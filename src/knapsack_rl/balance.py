"""Rollout balancer: spread unequal work over workers so that they all finish together.

A step of training waits for its last rollout. With N_i rollouts for prompt i, the unit of work is one
rollout, not one prompt (Li et al., arXiv 2509.25849, rollout balancer), and how long a rollout takes is not
known before it ends. `knapsack_rl.estimation.lengths.predict_work` turns the lengths seen at earlier visits into an
expected length per prompt; `RolloutQueue` hands rollouts to whichever worker is free, longest predicted first: the long
rollouts start early and the short ones fill the gaps left by wrong predictions.

The order is deterministic and uses no random numbers. A worker processes one rollout at a time at constant speed; an
engine that generates several at once counts as one worker per slot.
"""

import heapq
import threading
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import check_amounts


class RolloutQueue:
    """A queue of items for workers that pull: longest predicted first, each handed out once. Thread-safe.

    `next(queue)` hands out the index of an item and raises StopIteration when none is waiting;
    `for item in queue` does so in a loop, and any number of threads may loop over one queue. `len(queue)` is
    the number of waiting items. The predictions alone fix the order; it is never shuffled.

    Rollouts of one prompt are separate items, so they may run on different workers. Items of equal predicted
    work go out prompt by prompt, in the order of each prompt's first item, then by index, so that an engine
    with a prefix cache meets the rollouts of a prompt close together.

    `requeue` puts a failed item back in its place by predicted work. A loop that has ended does not see items
    requeued later, so the worker that requeues must continue to pull.

    Args:
        work: (R,) predicted work per item, in [0, 1e300], any unit.
        ids: R hashable prompt ids, one per item (default: each item is a separate prompt); they only break ties.

    Raises:
        ValueError: `work` is not as described, or `ids` has another length.
    """

    def __init__(self, work: ArrayLike, ids: Sequence[Hashable] | None = None) -> None:
        work_R = check_amounts(work, "work")
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
            index: the item, as returned by `next`.

        Raises:
            ValueError: the item does not exist, or is waiting: never handed out, or requeued twice.
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
