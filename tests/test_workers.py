"""Allocations do not depend on the number of threads, loading workers or processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import tiny
from knapsack_rl.trl import ALLOCATION_LOG, KnapsackGRPOTrainer

RUN = """
import hashlib, numpy as np, knapsack_rl as kr
digest = hashlib.sha1()
for estimator in ("bayes-filter", "empirical-bayes", "beta", "window"):
    allocator, dice = kr.KnapsackAllocator(estimator), np.random.default_rng(0)
    for _ in range(4):
        ids = [f"p{k}" for k in dice.permutation(600)[:256]]
        allocation = allocator.allocate(ids, 2048)
        digest.update(allocation.counts.tobytes())
        rewards = (dice.random(2048) < 0.3).astype(float)
        allocator.observe([ids[i] for i in allocation.expand()], rewards, dice.integers(1, 99, 2048))
    for array in allocator.state_dict()["arrays"].values():
        digest.update(array.tobytes())
print(digest.hexdigest())
"""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def test_threads_of_the_libraries_change_nothing() -> None:
    found = set()
    for threads in ("1", "3"):
        environment = os.environ | dict.fromkeys(THREADS, threads) | {"PYTHONHASHSEED": threads}
        done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1
    assert len(found.pop()) == 41


def trainer_of(folder, **changes) -> KnapsackGRPOTrainer:
    extra = {"allocator": tiny.informed_allocator()}
    return tiny.trainer(KnapsackGRPOTrainer, folder, extra=extra, log_allocations=True, **changes)


def test_workers_that_load_data_change_nothing(tmp_path) -> None:
    ends = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        trainer = trainer_of(folder, dataloader_num_workers=workers)
        trainer.train()
        rows = [json.loads(line) for line in (folder / ALLOCATION_LOG).read_text().splitlines()]
        ends.append([tiny.fingerprint(trainer.model), *({**row, "seconds": 0} for row in rows)])
    assert len(ends[0]) == 4
    assert ends[0] == ends[1]
