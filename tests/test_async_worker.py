"""The rollout worker of TRL's asynchronous trainer: its loop by hand, and its process with a stand-in of the server."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from hypothesis import example, given, settings
from hypothesis import strategies as st

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("aiohttp")

from trl.experimental.async_grpo import async_rollout_worker as trl_worker

from knapsack_rl.runs.files import ALLOCATION_LOG, STATE_FILE, read_rows
from knapsack_rl.trl import async_loop
from knapsack_rl.trl.async_loop import STATE_FOLDER, KnapsackRolloutLoop, check_async_internals
from knapsack_rl.trl.async_worker import AsyncSettings, KnapsackRolloutWorker
from rollout_server import RATES, dataset, is_right, is_short, rollout_server, tokenizer

MEAN = 4


@pytest.fixture(autouse=True, scope="module")
def _logging_of_accelerate():
    PartialState()  # TRL's logger needs it; trainer and spawned process make it


def arguments(prompts: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_name": "tiny",
        "dataset": dataset(prompts),
        "reward_funcs": [is_right],
        "processing_class": tokenizer(),
        "eos_token_ids": [1],
        "num_generations": MEAN,
    } | changes


def make_loop(folder: Path, prompts: int, window: int = 4, **changes: Any) -> KnapsackRolloutLoop:
    """The loop of the spawned process, in this one."""
    chosen = AsyncSettings(window=window, log_allocations=True, **changes.pop("chosen", {}))
    made = KnapsackRolloutLoop(
        settings=chosen,
        folder=folder,
        rollout_buffer=queue.Queue(),
        model_version_value=SimpleNamespace(value=0),
        heartbeat_value=SimpleNamespace(value=0.0),
        failed_event=None,
        exception_info_queue=None,
        metrics_queue=queue.Queue(),
        **arguments(prompts, **changes),
    )
    made._tool_pool.shutdown()
    made._loop.close()  # the tests have their own
    return made


class Hand:
    """Plays TRL's generate loop: draws rollouts, and completes them in any order."""

    def __init__(self, loop: KnapsackRolloutLoop, first_visit: Counter[int] | None = None) -> None:
        self.loop, self.work = loop, loop._repeat_iterator()
        self.visits = Counter(first_visit or ())
        self.samples: list[Any] = []

    def draw(self) -> tuple[int, int, dict[str, Any]]:
        """The next rollout: its number, that of its prompt, and its row."""
        rollout, row = next(self.work)
        return rollout, int(row["prompt_id"][1:]), row

    def complete(self, drawn: tuple[int, int, dict[str, Any]], version: int = 0) -> bool:
        """Hand in a rollout, a success with the prompt's rate; returns whether it was one."""
        rollout, prompt, row = drawn
        right = bool(np.random.default_rng((prompt, self.visits[prompt])).random() < RATES[prompt % 3])
        self.visits[prompt] += 1
        text, size = ("5", 2) if right else ("444", 4)
        sequence = trl_worker.TrainingSequence([3] * size, [1] * size, [-0.5] * size, "r")
        group = trl_worker.RolloutGroup(
            prompts=[row["prompt"]],
            reward_kwargs={"rate": [row["rate"]]},
            completions=[[{"role": "assistant", "content": text}]],
            completions_ids=[[3] * size],
            completions_sequences=[[sequence]],
            tool_call_counts=[0],
            tool_failure_counts=[0],
            model_version=version,
            group_id=rollout,
            env_rewards=[],
            rollout_rewards=[None],
        )
        self.samples += asyncio.run(self.loop._score_group(group))
        return right


def counts_of(hand: Hand, windows: int, prompts: int) -> list[dict[int, int]]:
    """Rollouts by prompt in each window of all prompts, every one completed at once."""
    found = []
    for _ in range(windows):
        drawn = [hand.draw() for _ in range(prompts * MEAN)]
        for one in drawn:
            hand.complete(one)
        found.append(dict(Counter(prompt for _, prompt, _ in drawn)))
    return found


@pytest.mark.trl_range
@settings(max_examples=15, deadline=None)
@given(
    prompts=st.integers(2, 9),
    window=st.integers(2, 7),
    inflight=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    lost=st.sampled_from([0.0, 0.1]),
)
@example(prompts=6, window=4, inflight=2, seed=13882369, lost=0.1)  # the last rollout drawn was complete before others
def test_budgets_are_exact_and_outcomes_observed_however_they_arrive(
    tmp_path_factory, prompts, window, inflight, seed, lost
):
    loop = make_loop(tmp_path_factory.mktemp("run"), prompts, window)
    hand, dice = Hand(loop), np.random.default_rng(seed)
    submitted: list[int] = []
    waiting: list[Any] = []
    done: dict[int, list[bool]] = defaultdict(list)  # by number of the group, as this test numbers them
    sizes: list[tuple[int, int]] = []  # prompt, rollouts drawn
    group_of: dict[int, int] = {}
    while True:
        drawn = hand.draw()
        if not sizes or sizes[-1][0] != drawn[1]:
            if len(group_of) >= 30 * MEAN:
                break  # every group so far has been drawn to its end
            sizes.append((drawn[1], 0))
        sizes[-1] = drawn[1], sizes[-1][1] + 1
        group_of[drawn[0]] = len(sizes) - 1
        submitted.append(drawn[1])
        waiting.append(drawn)
        while len(waiting) > inflight:
            one = waiting.pop(int(dice.integers(len(waiting))))
            if dice.random() >= lost:  # a lost rollout leaves its group incomplete
                done[group_of[one[0]]].append(hand.complete(one, version=int(dice.integers(3))))
    # Windows: consecutive prompts, cut at `window` of them or where the data set starts again.
    position = 0
    length = window if window < prompts else prompts
    while position + length <= len(sizes):
        names = [prompt for prompt, _ in sizes[position : position + length]]
        if len(set(names)) < length:
            break  # the window ended at a repeat before it was full; checked for aligned sizes below
        assert sum(size for _, size in sizes[position : position + length]) == MEAN * length
        assert min(size for _, size in sizes) >= 2
        position += length
    assert [prompt for prompt, _ in sizes] == [k % prompts for k in range(len(sizes))]
    # Every complete group is observed once, at the next window; the others are not.
    loop._observe()
    expected: Counter[int] = Counter()
    for number, results in done.items():
        if len(results) == sizes[number][1]:
            expected[sizes[number][0]] += len(results)
    assert len({sample.group_id for sample in hand.samples}) == sum(len(r) == sizes[n][1] for n, r in done.items())
    logged: Counter[int] = Counter()
    for row in read_rows(loop.folder.parent / ALLOCATION_LOG):
        for name, scored in zip(row["prompt_ids"], row["scored"], strict=True):
            logged[int(name[1:])] += scored
    assert logged == expected


def test_columns_of_the_data_and_an_earlier_run_are_features(tmp_path):
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text("".join(f'{{"step": 1, "prompt_id": "p{k}", "reward": {k % 2}}}\n' for k in range(3)))
    loop = make_loop(tmp_path, 6, chosen={"feature_columns": "rate", "prior": str(earlier)})
    counts_of(Hand(loop), 2, 6)
    loop._observe()
    shared = loop.knapsack.allocator.shared
    assert shared.features.names == ["earlier rate", "rate"]
    rates = [row["rate"] for row in dataset(6)]
    found = dict(
        zip(shared.features.names, shared.features.codes([f"p{k}" for k in range(6)]).T.tolist(), strict=False)
    )
    assert len({*zip(rates, found["rate"], strict=True)}) == len(set(rates)) == len(set(found["rate"]))
    assert found["earlier rate"][0] == found["earlier rate"][2] != found["earlier rate"][1]
    assert found["earlier rate"][3:] == [0] * 3  # not in the earlier run
    assert loop.knapsack.allocator.metrics()["allocation_failures"] == 0


def test_groups_are_whole_and_advantages_are_those_of_their_rewards(tmp_path):
    loop = make_loop(tmp_path, 6, reward_funcs=[is_right, is_short], chosen={"outcome_reward": "is_right"})
    hand, dice = Hand(loop), np.random.default_rng(1)
    sizes: dict[int, int] = Counter()
    for _ in range(6):
        drawn = [hand.draw() for _ in range(6 * MEAN)]
        dice.shuffle(drawn)
        for version, one in enumerate(drawn):
            hand.complete(one, version)
    for sample in hand.samples:
        sizes[sample.group_id] += 1
    assert set(sizes) == set(range(36))  # numbered as TRL numbers prompts, so that it resumes at the right one
    assert max(sizes.values()) > MEAN
    for number, size in sizes.items():
        group = [sample for sample in hand.samples if sample.group_id == number]
        rewards = np.array([sample.metrics["reward"] for sample in group])
        reference = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        np.testing.assert_allclose([sample.advantage for sample in group], reference)
        assert len({sample.model_version for sample in group}) == 1
        assert size == len(group)
    # outcomes are those of the named function: all wrong, mixed, all right
    records = loop.knapsack.allocator.tracker.records()
    assert records is not None
    loop._observe()
    rates = loop.knapsack.allocator.belief([f"p{k}" for k in range(6)]).mean
    assert max(rates[[0, 3]]) < min(rates[[1, 4]]) < max(rates[[1, 4]]) < min(rates[[2, 5]])


def test_a_group_has_the_version_of_its_oldest_rollout(tmp_path):
    loop = make_loop(tmp_path, 4)
    hand = Hand(loop)
    for version, one in enumerate([hand.draw() for _ in range(MEAN)]):
        hand.complete(one, 7 - version)
    assert {sample.model_version for sample in hand.samples} == {7 - MEAN + 1}


def test_a_resumed_run_allocates_as_the_uninterrupted_one(tmp_path):
    loop = make_loop(tmp_path / "whole", 6, window=6)
    hand = Hand(loop)
    before = counts_of(hand, 5, 6)
    first = hand.draw()  # the state is written when the next window is allocated
    saved = tmp_path / "checkpoint-5"
    shutil.copytree(tmp_path / "whole" / STATE_FOLDER, saved)
    visits = Counter(hand.visits)
    rest = [hand.draw() for _ in range(6 * MEAN - 1)]
    for one in [first, *rest]:
        hand.complete(one)
    after = [dict(Counter(prompt for _, prompt, _ in [first, *rest])), *counts_of(hand, 3, 6)]
    assert before[0] != after[0]
    resumed = make_loop(tmp_path / "resumed", 6, window=6, state=saved / STATE_FILE, dataset_start_index=30)
    assert counts_of(Hand(resumed, visits), 4, 6) == after
    assert resumed.window == 9
    fresh = make_loop(tmp_path / "fresh", 6, window=6, dataset_start_index=30)
    assert counts_of(Hand(fresh, visits), 4, 6) != after


def trainer_args(folder: Path, **changes: Any) -> Any:
    return SimpleNamespace(**{"output_dir": str(folder), "num_generations": MEAN, "max_staleness": 2} | changes)


def begin(worker: KnapsackRolloutWorker, folder: Path, step: int = 0, **changes: Any) -> None:
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    worker.callback.on_train_begin(trainer_args(folder, **changes), state, None)


@pytest.fixture
def with_vllm(monkeypatch):
    monkeypatch.setattr(trl_worker, "is_vllm_available", lambda: True)  # the loop itself never imports it


def drain(worker: KnapsackRolloutWorker, groups: int) -> list[Any]:
    """Rows of the first groups, as the trainer takes them."""
    found: list[Any] = []
    deadline = time.monotonic() + 60
    while len({sample.group_id for sample in found}) <= groups and time.monotonic() < deadline:
        try:
            found.append(worker.rollout_buffer.get(timeout=1.0))
        except queue.Empty:
            worker.check_health(60)
    return found


def logged(worker: KnapsackRolloutWorker) -> dict[str, float]:
    """The newest number of each metric, read as the trainer does, while the process runs."""
    found: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while "knapsack/lost_groups" not in found and time.monotonic() < deadline:
        try:
            found |= worker.metrics_queue.get(timeout=1.0)
        except queue.Empty:
            worker.check_health(60)
    return found


@pytest.mark.trl_range
def test_the_process_of_the_worker_against_a_server(tmp_path, with_vllm):
    with rollout_server() as (address, served):
        made = arguments(6, vllm_server_url=address, max_inflight_tasks=6, queue_maxsize=16)
        worker = KnapsackRolloutWorker(settings=AsyncSettings(window=6, log_metrics="all"), **made)
        begin(worker, tmp_path)
        try:
            worker.start()
            samples = drain(worker, 30)
            assert worker.lost.metrics() == {}  # nothing is lost yet
            worker.update_model_version(3)  # more than max_staleness beyond the rows in the queue
            drain(worker, 4)
            worker.update_model_version(4)
            numbers = logged(worker)
        finally:
            worker.stop()
        sizes = Counter(sample.group_id for sample in samples)
        for window in range(4):
            assert sum(sizes[6 * window + k] for k in range(6)) == 6 * MEAN
        assert {sizes[k] for k in range(6)} == {MEAN}  # nothing was known
        assert max(sizes[k] for k in range(6, 24)) > MEAN
        for number in range(24):
            group = [sample for sample in samples if sample.group_id == number]
            assert group[0].prompt[0]["content"] == f"{number % 6}"
            assert {sample.metrics["reward"] for sample in group} <= ({0.0}, {0.0, 1.0}, {1.0})[number % 3]
        assert set(served.requests) == set(range(6))
        assert numbers["knapsack/budget"] == 6 * MEAN
        assert numbers["knapsack/lost_groups/stale"] == numbers["knapsack/lost_groups"] > 0

        # A checkpoint, and a resumed run that takes its state along.
        step = tmp_path / "checkpoint-3"
        step.mkdir()
        worker.callback.on_save(
            trainer_args(tmp_path), SimpleNamespace(global_step=3, is_world_process_zero=True), None
        )
        known = {k: served.requests[k] for k in served.requests}
        again = KnapsackRolloutWorker(settings=AsyncSettings(window=6, log_metrics="all"), **made)
        begin(again, tmp_path, 3)
        again._loop_kwargs["dataset_start_index"] = 18  # as TRL sets it from rollout_state.json
        try:
            again.start()
            resumed = drain(again, 12)
            again.update_model_version(1)
            numbers = logged(again)
        finally:
            again.stop()
        sizes = Counter(sample.group_id for sample in resumed)
        assert sum(sizes[k] for k in range(6)) == 6 * MEAN
        assert len({sizes[k] for k in range(6)}) > 1  # its first window knows the prompts
        assert sum(served.requests.values()) > sum(known.values())
        written = async_loop.read_groups(step / STATE_FILE)[1]
        assert numbers["knapsack/lost_groups/resumed"] == sum(number >= 18 for number, *_ in written) > 0


def test_the_real_trainer_of_transformers_keeps_the_state_with_its_checkpoints(tmp_path, with_vllm):
    import torch
    from transformers import Trainer
    from trl.experimental.async_grpo import AsyncGRPOConfig

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Any, **_: Any) -> dict[str, Any]:
            return {"loss": ((self.weight - x) ** 2).mean()}

    loop = make_loop(tmp_path, 6)
    hand = Hand(loop)

    def run(steps: int, resume: bool | None) -> KnapsackRolloutWorker:
        worker = KnapsackRolloutWorker(**arguments(6))
        args = AsyncGRPOConfig(
            output_dir=str(tmp_path), max_steps=steps, save_steps=1, num_generations=MEAN, bf16=False, use_cpu=True,
            report_to=[], gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(Model(), args, train_dataset=[{"x": torch.ones(1)}] * 64, callbacks=[worker.callback])

        def step(*_: Any) -> None:
            counts_of(hand, 1, 6)

        worker.callback.on_step_end = lambda args, state, control, **_: step()
        trainer.train(resume_from_checkpoint=resume)
        return worker

    first = run(2, None)
    assert first._loop_kwargs["state"] is None
    assert first.max_staleness == AsyncGRPOConfig(output_dir="x", bf16=False, use_cpu=True).max_staleness
    states = [(tmp_path / f"checkpoint-{k}" / STATE_FILE).read_bytes() for k in (1, 2)]
    assert states[0] != states[1]
    second = run(3, True)
    assert second._loop_kwargs["state"] == tmp_path / "checkpoint-2" / STATE_FILE


def test_what_cannot_work_is_refused_before_anything_is_generated(tmp_path, with_vllm, monkeypatch):
    for changes, words in (
        ({"min_rollouts": 0}, "min_rollouts must be at least 1"),
        ({"rounds": 2}, "rounds must be 1"),
        ({"window": 1}, "window must be at least 2"),
    ):
        with pytest.raises(ValueError, match=words):
            AsyncSettings(**changes)
    with pytest.raises(ValueError, match="num_generations"):
        KnapsackRolloutWorker(settings=AsyncSettings(max_rollouts=3), **arguments(6))
    with pytest.raises(ValueError, match=r"feature_columns must be columns of the data set, .*'rate'.*got \['level'\]"):
        KnapsackRolloutWorker(settings=AsyncSettings(feature_columns="level"), **arguments(6))
    with pytest.raises(ValueError, match="names different prompts"):
        twins = dataset(4).map(lambda row: {"prompt_id": "same"})
        KnapsackRolloutWorker(**arguments(4, dataset=twins))
    worker = KnapsackRolloutWorker(**arguments(6))
    with pytest.raises(RuntimeError, match="callbacks="):
        worker.start()
    with pytest.raises(ValueError, match=r"num_generations is 5 .* and 4"):
        begin(worker, tmp_path, num_generations=5)
    with pytest.raises(ValueError, match="outcome_reward 'other'"):
        make_loop(tmp_path, 4, chosen={"outcome_reward": "other"})
    monkeypatch.setattr(async_loop._AsyncRolloutLoop, "_score_group", lambda self, group, more: [])
    with pytest.raises(RuntimeError, match="not supported"):
        check_async_internals()


def test_a_loop_that_groups_otherwise_is_refused(tmp_path):
    loop = make_loop(tmp_path, 4)
    with pytest.raises(RuntimeError, match="a group of one rollout has 2"):
        asyncio.run(loop._score_group(SimpleNamespace(completions=[1, 2], group_id=0)))


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    hand = Hand(make_loop(tmp_path / "file", 6))
    assert sum(counts_of(hand, 3, 6)[2].values()) == 6 * MEAN
    assert hand.loop.knapsack.allocator.failures["saving"] >= 3
