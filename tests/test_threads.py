"""One allocator, several threads: calls run one after the other, nothing is lost, and the order of calls decides."""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

import knapsack_rl as kr

THREADS, ROUNDS, PROMPTS = 6, 25, 10


@pytest.fixture(autouse=True)
def _threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], None]) -> None:
    """Run the work in threads that start at once; raise what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def guarded(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("estimator", ["beta", "bayes-filter"])
def test_no_observation_is_lost(estimator: str, tmp_path) -> None:
    allocator = kr.KnapsackAllocator(estimator)

    def work(number: int) -> None:
        dice = random.Random(number)
        for turn in range(ROUNDS):
            ids = [f"{number}-{dice.randrange(PROMPTS)}", "shared", turn]
            allocation = allocator.allocate(ids, 15)
            assert allocation.counts.sum() == 15
            allocator.observe([ids[i] for i in allocation.expand()], np.arange(15) % 2, np.arange(15))
            metrics = allocator.metrics()
            assert metrics["budget"] == 15
            if turn % 5 == 0:
                path = tmp_path / f"{number}.npz"
                allocator.save(path)
                twin = kr.KnapsackAllocator.load(path)  # every state on the way is a whole one
                records = twin.tracker.records()
                assert records.rollouts.sum() % 15 == 0
                assert records.visits.sum() == records.rollouts.sum() / 5

    together(work)
    records = allocator.tracker.records()
    assert records.rollouts.sum() == THREADS * ROUNDS * 15
    assert records.visits.sum() == THREADS * ROUNDS * 3
    assert allocator.tracker.lookup(["shared"]).visits[0] == THREADS * ROUNDS
    assert allocator.metrics()["allocation_failures"] == 0


def test_a_copy_goes_its_own_way() -> None:
    allocator = kr.KnapsackAllocator("beta")
    allocator.observe(["a"] * 4, [1, 0, 0, 0])
    twin = copy.deepcopy(allocator)
    with allocator._lock:
        together(lambda number: twin.observe(["a"], [1]))
    assert twin.tracker.lookup(["a"]).rollouts[0] == 4 + THREADS
    assert allocator.tracker.lookup(["a"]).rollouts[0] == 4


def test_the_order_of_calls_decides_and_not_the_thread() -> None:
    def steps(allocator: kr.KnapsackAllocator):
        dice = np.random.default_rng(0)
        for _ in range(12):
            ids = [f"p{k}" for k in dice.permutation(20)[:6]]
            allocation = allocator.allocate(ids, 30)
            allocator.observe([ids[i] for i in allocation.expand()], (dice.random(30) < 0.4).astype(float))
            yield allocation.counts.tolist()

    expected = list(steps(kr.KnapsackAllocator()))
    again: list[list[int]] = []
    run = steps(kr.KnapsackAllocator())
    turn = threading.Lock()

    def work(number: int) -> None:
        for _ in range(2):
            with turn:  # whoever it is, steps are taken in order
                again.append(next(run))

    together(work)
    assert again == expected
