"""Faults while training: each has documented behaviour (docs/faults.md), and none ends a run because of allocation."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer import grpo_trainer

import knapsack_rl as kr
import tiny
from cases import message_of
from knapsack_rl import session as session_module
from knapsack_rl import state as statefile
from knapsack_rl.estimation.named import BetaEstimator
from knapsack_rl.runs.files import complete_checkpoints
from knapsack_rl.training import lock
from knapsack_rl.training.lock import FolderInUseError, own_folder, refuse_if_owned
from knapsack_rl.trl import ALLOCATION_LOG, STATE_FILE, KnapsackGRPOTrainer
from knapsack_rl.trl import deadline as deadline_module
from knapsack_rl.trl.rewards import RewardError, watched

NAN, INF = float("nan"), float("inf")


def trainer_of(folder, *rewards, **settings):
    return tiny.trainer(KnapsackGRPOTrainer, folder, *rewards, **settings)


def last_metric(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row][-1]


# --- reward functions ---

COLUMNS = {
    "prompts": ["one", "two", "three"],
    "completions": ["a", "b" * 500, "c"],
    "completion_ids": [[1], [2], [3]],
    "prompt_id": ["p1", "p2", None],
}


def call(function, **changes):
    return watched(function, "mine", "prompt_id")(**(COLUMNS | changes))


def test_rewards_of_any_number_type_pass() -> None:
    for returned, rewards in (
        ([1, 0.5, True], [1.0, 0.5, 1.0]),
        ([None, NAN, -INF], [None, NAN, -INF]),
        ((1, 2, 3), [1.0, 2.0, 3.0]),
        (np.array([1, 2, 3]), [1.0, 2.0, 3.0]),
        (torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
        ([torch.tensor(1.0), np.float32(2), np.int8(3)], [1.0, 2.0, 3.0]),
        (iter([1, 2, 3]), [1.0, 2.0, 3.0]),
    ):
        assert repr(call(lambda returned=returned, **_: returned)) == repr(rewards)


def test_a_result_that_is_not_a_reward_is_refused_with_its_prompt() -> None:
    for returned, message in (
        ([1, 2], "mine returned 2 rewards for 3 completions"),
        ([], "mine returned 0 rewards for 3 completions"),
        (np.ones((1, 3)), "mine returned 1 rewards for 3"),
        (None, r"mine returned None \(NoneType\); return a list of 3"),
        (1.0, r"mine returned 1\.0 \(float\)"),
        ("abc", r"mine returned 'abc' \(str\)"),
        ({"a": 1, "b": 2, "c": 3}, r"\(dict\)"),
        ([1, "1", 3], r"returned '1' \(str\) for prompt 'p2', completion 'bbb"),
        ([1, 2, [3]], r"returned \[3\] \(list\) for prompt '[0-9a-f]{32}', completion 'c'"),
        ([1j, 2, 3], r"\(complex\) for prompt 'p1', completion 'a'"),
        ([10**400, 2, 3], "prompt 'p1'"),
        ([1, torch.ones(2), 3], "prompt 'p2'"),
    ):
        found = message_of(RewardError, call, lambda returned=returned, **_: returned)
        assert re.search(message, found), found
        assert len(found) < 600


def test_a_raising_function_is_attributed_to_its_prompt() -> None:
    seen = []

    def fails(completions, log_metric, **_):
        log_metric("seen", 1.0)
        if any(text.startswith("b") for text in completions):
            raise KeyError("no verdict")
        return [0.0] * len(completions)

    with pytest.raises(
        RewardError, match=r"mine raised KeyError\('no verdict'\) for prompt 'p2', completion 'bbb"
    ) as e:
        call(fails, log_metric=lambda name, value: seen.append(name))
    assert isinstance(e.value.__cause__, KeyError)
    assert seen == ["seen"], "looking for the prompt must log nothing"

    def fails_together(completions, **_):
        if len(completions) > 1:
            raise ZeroDivisionError
        return [0.0]

    with pytest.raises(RewardError, match="a batch of 3 completions, but for none of them alone"):
        call(fails_together)
    with pytest.raises(KeyboardInterrupt):
        call(lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))


# Ways to hang: asleep, busy, deaf to exceptions, backtracking in a regular expression.


def sleeps():
    time.sleep(3600)


def spins():
    while True:
        pass


def swallows():
    with contextlib.suppress(BaseException):
        time.sleep(3600)


def backtracks():
    re.match(r"(a*)*b", "a" * 60)


def test_a_hanging_function_is_ended_and_attributed_to_its_prompt() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    for hang in (sleeps, spins, swallows, backtracks):

        def stuck(completions, hang=hang, **_):
            if any(text.startswith("b") for text in completions):
                hang()
            return [0.0] * len(completions)

        found = message_of(RewardError, watched(stuck, "stuck", "prompt_id", 0.2), **COLUMNS)
        assert "stuck took more than 0.2 s for prompt 'p2', completion 'bbb" in found, hang
        assert signal.getsignal(signal.SIGVTALRM) is before, hang
        assert "deadline" not in {thread.name for thread in threading.enumerate()}, hang
        assert watched(tiny.has_digit_five, "quick", "prompt_id", 30.0)(**COLUMNS) == [0.0] * 3, hang


STRUCK_WITH_A_LOCK_TAKEN = """
import faulthandler, runpy, signal, sys
module = runpy.run_path(sys.argv[1])  # the file alone: importing its package would load torch and TRL
OutOfTime, deadline = module["OutOfTime"], module["deadline"]
faulthandler.dump_traceback_later(60, exit=True)
struck = 0
def strike(frame, event, argument):
    global struck
    code = frame.f_code
    if event == "return" and code.co_name == "__enter__" and code.co_filename.endswith("threading.py"):
        struck += 1
        signal.raise_signal(signal.SIGVTALRM)  # as the clock may: a lock is taken, its block not yet entered
    return strike
try:
    with deadline(0.05):
        sys.settrace(strike)
        while True:
            pass
except OutOfTime:
    print(struck)
"""


def test_a_signal_at_the_end_of_a_deadline_leaves_no_lock_held() -> None:
    """A handler that raised just after a lock was taken would leave it taken, and the run would wait for ever."""
    command = [sys.executable, "-c", STRUCK_WITH_A_LOCK_TAKEN, deadline_module.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0


def test_a_slow_batch_of_quick_completions_is_distinguished_from_a_hang() -> None:
    def slow(completions, **_):
        time.sleep(0.15 * len(completions))
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"more than 0\.3 s for a batch of 3 completions, but for none of them alone"):
        watched(slow, "slow", "prompt_id", 0.3)(**COLUMNS)


def test_an_asynchronous_function_that_hangs_is_ended() -> None:
    async def stuck(completions, **_):
        if any(text.startswith("b") for text in completions):
            await asyncio.sleep(3600)
        return [0.0] * len(completions)

    async def own_timeout(completions, **_):
        raise TimeoutError("of a service")

    with pytest.raises(RewardError, match=r"stuck took more than 0\.2 s for prompt 'p2'"):
        asyncio.run(watched(stuck, "stuck", "prompt_id", 0.2)(**COLUMNS))
    with pytest.raises(RewardError, match=r"raised TimeoutError\('of a service'\) for prompt 'p1'"):
        asyncio.run(watched(own_timeout, "mine", "prompt_id", 30.0)(**COLUMNS))


def test_a_call_that_ignores_the_interrupt_is_logged_and_ends_late(caplog) -> None:
    def deaf(completions, **_):
        for _ in range(2):
            with contextlib.suppress(BaseException):
                time.sleep(0.25)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"deaf took more than 0\.1 s"):
        watched(deaf, "deaf", "prompt_id", 0.1)(**COLUMNS)
    assert "a call limited to 0.1 s was interrupted and is still running" in caplog.text


def test_a_hang_in_training_ends_the_run_with_the_prompt(tmp_path) -> None:
    def stuck(completions, prompt_id, **_):
        if "p3" in prompt_id:
            time.sleep(3600)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"stuck took more than 0\.5 s for prompt 'p3', completion '"):
        trainer_of(tmp_path, stuck, max_steps=6, reward_timeout=0.5).train()
    for wrong in (0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="reward_timeout must be None or a number of seconds > 0"):
            trainer_of(tmp_path, reward_timeout=wrong)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="train in the main thread"):
        pool.submit(trainer_of, tmp_path, reward_timeout=1.0).result()


def test_faults_of_reward_functions_stop_the_run_with_the_prompt(tmp_path) -> None:
    def strings(completions, **_):
        return [0.0] * (len(completions) - 1) + ["1"]

    async def later(completions, **_):
        raise OSError("service down")

    def odd(completions, prompt_id, **_):
        if "p3" in prompt_id:
            raise RuntimeError("cannot parse")
        return [0.0] * len(completions)

    for function, message in ((strings, "strings returned '1'"), (later, "later raised OSError.*prompt 'p")):
        with pytest.raises(RewardError, match=message):
            trainer_of(tmp_path, function).train()
    with pytest.raises(RewardError, match=r"odd raised RuntimeError\('cannot parse'\) for prompt 'p3', completion '"):
        trainer_of(tmp_path, odd, max_steps=6).train()


def test_an_asynchronous_reward_trains(tmp_path, monkeypatch) -> None:
    async def later(completions, **_):
        return tiny.has_digit_five(completions)

    class Judge:
        async def __call__(self, completions, model, **_):
            return tiny.has_digit_five(completions)

    forms = {
        "function": later,
        "partial": partial(later, model="a"),
        "partial of a partial": partial(partial(later, model="a"), retries=2),
        "partial of an object": partial(Judge(), model="a"),
    }
    if not hasattr(grpo_trainer, "is_async_callable"):
        del forms["partial of an object"]
    for name, function in forms.items():
        trainer = trainer_of(tmp_path / name, function)
        trainer.train()
        assert trainer.state.global_step == 3, name
        assert trainer.allocator.tracker.records().rollouts.sum() == 48, name

    # TRL before 1.14 takes objects for synchronous functions, and has no loop for them.
    monkeypatch.setattr(grpo_trainer, "is_async_callable", inspect.iscoroutinefunction, raising=False)
    with pytest.raises(ValueError, match=r"does not await Judge.*trl>=1\.14"):
        trainer_of(tmp_path, partial(Judge(), model="a"))


def test_a_missing_reward_is_counted_and_the_run_continues(tmp_path) -> None:
    for value in (None, NAN, INF, -INF):

        def sometimes(completions, value=value, **_):
            return [value, *tiny.has_digit_five(completions)[1:]]

        trainer = trainer_of(tmp_path / str(value), sometimes)
        trainer.train()
        assert last_metric(trainer, "knapsack/unscored_rollouts") == 3, value
        assert trainer.allocator.tracker.records().rollouts.sum() == 48 - 3, value
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters()), value


# --- the allocator fails ---


class Failing(BetaEstimator):
    """Fails in one method from some call on."""

    def __init__(self, method: str, how="raise"):
        super().__init__()
        self.evidence_size = 0
        self._method, self._how = method, how

    def _maybe(self, name):
        if name == self._method and self._how == "raise":
            raise RuntimeError("estimator broken")

    def believe(self, records, max_rollouts):
        self._maybe("believe")
        found = super().believe(records, max_rollouts)
        if self._method == "believe":
            found.marginals[:] = NAN
        return found

    def absorb(self, records, successes, totals):
        self._maybe("absorb")
        return (
            np.full((len(records), 3), NAN) if self._method == "absorb" else super().absorb(records, successes, totals)
        )

    def refit(self, population):
        self._maybe("refit")


def test_an_estimator_that_fails_does_not_end_the_run(caplog) -> None:
    for case in product(("believe", "absorb", "refit"), ("raise", "nonsense")):
        method, _ = case
        caplog.clear()
        allocator = kr.KnapsackAllocator(Failing(*case))
        for _ in range(3):
            allocation = allocator.allocate(["a", "b", 7], 20)
            assert allocation.counts.sum() == 20, case
            assert allocation.counts.min() >= 2, case
            allocator.observe([["a", "b", 7][i] for i in allocation.expand()], np.arange(20) % 2)
        assert allocator.tracker.records().rollouts.sum() == 60, case
        failures = allocator.metrics()["allocation_failures"]
        if case == ("refit", "nonsense"):
            assert failures == 0
            continue
        assert failures >= (1 if method == "refit" else 3), case
        (logged,) = [record for record in caplog.records if "failed; the run continues" in record.message]
        assert logged.exc_info is not None, case
        if method == "believe":
            assert sorted(allocation.counts) == [6, 7, 7], case
            assert allocation.reason == "allocation failed: divided evenly", case
            assert allocator.adopt(["a", "b"], [3, 1]).counts.tolist() == [3, 1], case


def test_even_division_is_exact_and_serves_whole_groups() -> None:
    allocator = kr.KnapsackAllocator(Failing("believe"), min_rollouts=3)
    ids = list(range(7))
    for budget in range(60):
        counts = allocator.allocate(ids, budget).counts
        assert counts.sum() == budget
        if budget >= 3:
            served = counts[counts > 0]
            assert served.min() >= 3
            assert served.max() - served.min() <= 1
    again = allocator.allocate(ids[::-1], 25).counts[::-1]
    assert again.tolist() == allocator.allocate(ids, 25).counts.tolist(), "the same whatever the order of the batch"


def test_a_failing_allocation_of_tokens_and_of_a_top_up(monkeypatch) -> None:
    tokens = kr.KnapsackAllocator(Failing("believe"), budget_unit="tokens", min_rollouts=3)
    assert tokens.allocate(["a", "b"], 5000.0).counts.tolist() == [3, 3], "as many as where no length is known"
    assert tokens.metrics()["allocation_failures"] == 1

    allocator = kr.KnapsackAllocator()
    allocator.allocate(["a", "b", "c"], 6)
    monkeypatch.setattr(allocator.estimator, "posterior", lambda records: 1 / 0)
    found = allocator.top_up(["a", "b", "c"], [2, 2, 2], [0, 1, 2], 7)
    assert sorted(found.counts) == [2, 2, 3]
    assert np.isnan(found.nonzero_gradient).all()
    assert allocator.metrics()["allocation_failures"] == 1
    with pytest.raises(ValueError, match="needs an estimator with a posterior on a grid"):
        kr.KnapsackAllocator("beta").top_up(["a"], [2], [1], 3)


def test_failures_are_part_of_the_state() -> None:
    allocator = kr.KnapsackAllocator(Failing("believe"))
    allocator.allocate(["a"], 4)
    twin = kr.KnapsackAllocator(BetaEstimator())
    twin.load_state_dict(allocator.state_dict())
    assert twin.metrics()["allocation_failures"] == 1


class WrongAllocator(kr.KnapsackAllocator):
    """Answers that no engine could use."""

    answer = "raise"

    def allocate(self, prompt_ids, budget):
        found = super().allocate(prompt_ids, budget)
        if self.answer == "raise":
            raise RuntimeError("allocator broken")
        wrong = {"short": found.counts[1:], "sum": found.counts + 1, "negative": found.counts * np.array([-1, 1, 1, 1])}
        object.__setattr__(found, "counts", wrong[self.answer])
        return found

    def record(self, *arguments, **settings):
        if self.answer == "raise":
            raise RuntimeError("observation broken")
        super().record(*arguments, **settings)


def test_training_continues_evenly_if_the_allocator_fails(tmp_path, caplog) -> None:
    stock = trainer_of(tmp_path / "stock", allocation="uniform")
    stock.train()
    for answer in ("raise", "short", "sum", "negative"):
        caplog.clear()
        allocator, folder = WrongAllocator("beta"), tmp_path / answer
        allocator.answer = answer
        trainer = trainer_of(folder, extra={"allocator": allocator}, log_allocations=True, **tiny.AS_STOCK)
        trainer.train()
        assert trainer.state.global_step == 3, answer
        kinds = 2 if answer == "raise" else 1  # observing fails too
        assert last_metric(trainer, "knapsack/allocation_failures") == 3 * kinds, answer
        assert sum("failed; the run continues" in record.message for record in caplog.records) == kinds, answer
        rows = [json.loads(line) for line in (folder / ALLOCATION_LOG).read_text().splitlines()]
        assert [row["counts"] for row in rows] == [[4] * 4] * 3, answer
        assert tiny.fingerprint(trainer.model) == tiny.fingerprint(stock.model), (answer, "not the stock step")


# --- ids and data ---


def test_an_id_that_changes_its_type_is_logged_once(caplog) -> None:
    allocator = kr.KnapsackAllocator("beta")
    allocator.observe([7, 7, "x", -3], [1, 0, 1, 1])
    allocator.allocate([7, "x"], 8)
    assert not caplog.records
    for _ in range(2):
        allocator.allocate(["7", "x", "-3"], 12)
    assert [record.message for record in caplog.records] == [
        "prompt id '7' is new, but 7 is known: they differ in type, so observations of 7 do not count for '7'. "
        "Give every id the same type in every epoch (logged once)"
    ]
    other = kr.KnapsackAllocator("beta")
    other.observe(["12", "x"], [1, 1])
    other.adopt([12, 5], [2, 2])
    assert "prompt id 12 is new, but '12' is known" in caplog.text
    for quiet in ("012", "1_2", "١٢", "--1", "", "9" * 5000):
        assert kr.KnapsackAllocator("beta").allocate([quiet], 2).counts.tolist() == [2]


def test_an_id_too_long_to_be_printed_is_refused() -> None:
    allocator = kr.KnapsackAllocator("beta")
    with pytest.raises(ValueError, match=r"prompt_ids\[1\] is a number of more than 300 digits"):
        allocator.allocate(["a", 10**5000], 8)


def test_an_excessive_budget_is_refused() -> None:
    for budget in (2**24 + 1, 2**63, 10**400):
        with pytest.raises(ValueError, match="budget must be at most 16777216 rollouts a step"):
            kr.KnapsackAllocator("beta").allocate(["a", "b"], budget)


def test_every_test_that_the_documentation_names_is_there() -> None:
    here = Path(__file__).parent
    text = (here.parent / "docs" / "faults.md").read_text()
    names = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text))
    assert len(names) > 25
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in here.glob("test_*.py")), re.MULTILINE))
    assert names <= defined, names - defined
    files = set(re.findall(r"\btest_\w+\.py", text))
    assert all((here / name).exists() for name in files), files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new", "clash"])
def test_two_processes_with_different_data(kind: str, tmp_path) -> None:
    first, second = tiny.on_two_processes("other_data_worker.py", tmp_path, kind)
    assert first == second
    if kind == "clash":  # neither process hangs: both report the error
        assert "id 'p0' names different prompts on two processes" in first["error"]
        assert first["rollouts"] == {}
        return
    assert first["error"] is None
    assert sum(first["rollouts"].values()) == 32
    assert {name[0] for name in first["rollouts"]} == {"p", "q"}


def test_resuming_on_another_data_set_keeps_what_is_known(tmp_path, caplog) -> None:
    first = trainer_of(tmp_path, max_steps=6, save_strategy="steps", save_steps=6)
    first.train()
    known = first.allocator.tracker.lookup([f"p{k}" for k in range(24)])
    assert (known.visits == 1).all()

    rows = [row for row in tiny.dataset(30) if row["prompt_id"] not in ("p0", "p5")]
    rest = trainer_of(tmp_path / "rest", data=Dataset.from_list(rows), max_steps=6)
    with caplog.at_level(logging.INFO):
        rest.restore_progress(tmp_path / "checkpoint-6")
    assert (
        "of 28 prompts 22 are known, 6 are new (added, or not visited yet); 2 known prompts are no longer"
        in caplog.text
    )
    found = rest.allocator.tracker.lookup([f"p{k}" for k in range(24)])
    assert found.successes.tolist() == known.successes.tolist()

    same = trainer_of(tmp_path / "same", max_steps=6)
    caplog.clear()
    same.restore_progress(tmp_path / "checkpoint-6")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_checkpoints_within_a_generation_are_warned_about(tmp_path, caplog) -> None:
    def warnings_of(**changes):
        caplog.clear()
        settings = {"save_strategy": "steps", "gradient_accumulation_steps": 2, "steps_per_generation": 4}
        trainer_of(tmp_path, per_device_train_batch_size=4, max_steps=4, **(settings | changes)).train()
        return [record.message for record in caplog.records if "save_steps" in record.message]

    assert len(warnings_of(save_steps=3)) == 1
    assert "saving every 1 steps falls within one" in warnings_of(save_steps=0.25)[0]  # a share of all steps
    assert warnings_of(save_steps=0.5) == []
    assert (
        warnings_of(save_steps=4)
        == warnings_of(save_steps=3, save_strategy="no")
        == warnings_of(save_steps=1, steps_per_generation=2)
        == []
    )
    assert (
        "Make save_steps x gradient_accumulation_steps a multiple of 8"
        in warnings_of(save_steps=2, num_iterations=2)[0]
    )


# --- disk ---


def full_disk(*arguments, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_a_checkpoint_stops_the_run_and_spares_the_earlier_one(tmp_path, monkeypatch) -> None:
    trainer = trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    real = statefile._write_array
    monkeypatch.setattr(
        statefile, "_write_array", lambda *a: full_disk() if trainer.state.global_step > 2 else real(*a)
    )
    with pytest.raises(OSError, match=r"checkpoint-4 is not complete.*No space left.*make room, then resume") as caught:
        trainer.train()
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "checkpoint-4" / STATE_FILE).exists()
    assert not list((tmp_path / "checkpoint-4").glob(".*tmp"))
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]  # save_total_limit has not removed it


def test_resume_passes_over_an_incomplete_checkpoint_and_says_so(tmp_path, caplog) -> None:
    whole = trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])  # killed while transformers wrote its last file
    rest = trainer_of(tmp_path, max_steps=4)
    rest.train(resume_from_checkpoint=True)
    assert f"checkpoint-4 in {tmp_path}: no readable trainer_state.json" in caplog.text
    assert "resuming from checkpoint-2" in caplog.text
    assert tiny.fingerprint(rest.model) == tiny.fingerprint(whole.model)
    records, others = rest.allocator.tracker.records(), whole.allocator.tracker.records()
    assert records.rollouts.tolist() == others.rollouts.tolist()

    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"no checkpoint to resume from. checkpoint-2, checkpoint-4 in .*: no readable"
    ):
        trainer_of(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint found"):  # as the stock trainer
        trainer_of(tmp_path / "empty", max_steps=4).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_again_is_incomplete_until_it_is(tmp_path, monkeypatch) -> None:
    trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    again = trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    monkeypatch.setattr(again, "save_model", full_disk)
    with pytest.raises(OSError, match="No space left"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]


def test_a_full_disk_at_the_log_loses_rows_and_does_not_end_the_run(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(session_module, "append_row", full_disk)
    trainer = trainer_of(tmp_path, log_allocations=True)
    trainer.train()
    assert trainer.state.global_step == 3
    assert sum("logging failed; the run continues" in record.message for record in caplog.records) == 1
    assert last_metric(trainer, "knapsack/allocation_failures") == 0
    assert last_metric(trainer, "knapsack/failures/logging") == 3


# --- one process per run folder ---

HOLD = "import sys, time; from pathlib import Path; from knapsack_rl.training.lock import own_folder\n"


def holder(folder) -> subprocess.Popen:
    code = HOLD + "with own_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path, caplog) -> None:
    process = holder(tmp_path)
    try:
        for attempt in (lambda: own_folder(tmp_path).__enter__(), lambda: refuse_if_owned(tmp_path)):
            with pytest.raises(FolderInUseError, match=rf"by another run: process {process.pid} on .*choose another"):
                attempt()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with own_folder(tmp_path):
        assert json.loads((tmp_path / lock.LOCK_FILE).read_text())["pid"] == os.getpid()
        assert f"left behind by a killed run (process {process.pid}" in caplog.text
        with pytest.raises(FolderInUseError), own_folder(tmp_path):
            pass
    caplog.clear()
    with own_folder(tmp_path):
        assert not caplog.records
    refuse_if_owned(tmp_path)
    refuse_if_owned(tmp_path / "nowhere")


def test_a_lock_file_may_hold_anything(tmp_path) -> None:
    for content in ("", "garbage", "{}", '{"pid": "x"}', "\x00" * 50, "[" * 2000):
        (tmp_path / lock.LOCK_FILE).write_text(content)
        with own_folder(tmp_path):
            pass
        with pytest.raises(ZeroDivisionError), own_folder(tmp_path):
            raise ZeroDivisionError
        with own_folder(tmp_path):
            pass


def test_training_into_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    from knapsack_rl.cli.display import Quiet
    from knapsack_rl.training.compare import Run, execute
    from knapsack_rl.training.run import train
    from knapsack_rl.training.settings import TrainSettings

    settings = TrainSettings(steps=1, prompts_per_step=4, train_prompts=8, held_out_prompts=0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with own_folder(tmp_path):
        with pytest.raises(FolderInUseError):
            train(settings, tmp_path, Quiet())
        with pytest.raises(FolderInUseError):
            train(settings, tmp_path, Quiet(), resume=True)
        with pytest.raises(FolderInUseError):
            execute([Run(settings, tmp_path)], jobs=1, progress=None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["metrics.jsonl", lock.LOCK_FILE]
