"""The plug-in against verl's own classes in one process: everything of its path but Ray, generation and the update.

verl composes the configuration, loads the plug-in, batches the rows, reads ``__rollout_n__``, stores trajectories,
samples groups and computes advantages with its own code; replaced are the transfer queue (a dictionary) and the engine.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import math
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed: make test-verl", allow_module_level=True)

import torch
import transfer_queue
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback
from verl.trainer.ppo.v1 import PPOTrainer, agent_loop_tq
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.import_utils import load_class_from_fqn

import knapsack_rl as kr
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.ids import numbered
from knapsack_rl.runs.files import STATE_FILE
from knapsack_rl.verl.launch import (
    MANAGER_KEY,
    VerlSettings,
    check_config,
    overrides,
    pick,
    varying_rows_multiple,
    without_effect,
)
from verl_harness import example, material
from verl_harness.launch import launch_line

PROMPTS, MEAN, STEPS = 8, 4, 6
RATES = (0.0, 0.1, 0.5, 1.0)


def configured(folder, mode="sync", *more, **settings):
    """verl's own configuration with the overrides of the plug-in, composed by Hydra."""
    lines = launch_line(folder, folder / "model", [folder / "none.parquet"], STEPS, f"trainer.v1.trainer_mode={mode}")
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[*lines, *overrides(VerlSettings(**settings)), *more])
    OmegaConf.resolve(config)
    return config


class Queue:
    """A transfer queue that is a dictionary."""

    def __init__(self):
        self.tags, self.rows = {"train": {}, "val": {}}, {"train": {}, "val": {}}

    async def async_kv_put(self, key, partition_id, tag):
        self.tags[partition_id].setdefault(key, {"is_prompt": True, "global_steps": 1}).update(tag)

    async def async_kv_batch_put(self, keys, fields, tags, partition_id):
        for row, (key, tag) in enumerate(zip(keys, tags, strict=True)):
            self.tags[partition_id][key] = tag
            self.rows[partition_id][key] = fields[row : row + 1]

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        for row, key in enumerate(keys):
            if tags is not None:
                self.tags[partition_id][key] = tags[row]
            for name in () if fields is None else fields.keys():
                value = tensordict_utils.index_select_tensor_dict(fields, [row])[name]
                self.rows[partition_id][key][name] = value

    def kv_list(self, partition_id=None):
        return self.tags

    def kv_clear(self, keys, partition_id):
        for key in keys:
            self.tags[partition_id].pop(key, None)

    def kv_batch_get(self, keys, partition_id, select_fields):
        return {name: [self.rows[partition_id][key][name][0] for key in keys] for name in select_fields}


class Worker:
    """A stand-in for a Ray handle, around verl's own worker class, whose agent loop rolls dice."""

    def __init__(self, config, queue, rng):
        kind = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class
        self.inner = object.__new__(kind)
        self.inner.config, self.inner.background_tasks = config, set()
        self.inner._run_agent_loop = self.roll
        self.inner._compute_score = self.score
        self.inner._compute_teacher_logprobs = self.nothing
        self.inner._compute_multi_modal_inputs = lambda *_: {}
        self.inner._compute_position_ids = lambda ids, *_: torch.arange(ids.shape[-1])[None]
        self.queue, self.rng, self.received, self.generated = queue, rng, [], Counter()
        self.longer = {}  # tokens more of a prompt
        self.answered = {}  # sessions of a prompt that the engine answers, of those where not all are
        self.generate_sequences = SimpleNamespace(remote=lambda chunk: asyncio.run(self.everything(chunk)))

    async def everything(self, chunk):
        await self.inner.generate_sequences(chunk)
        await asyncio.gather(*self.inner.background_tasks)

    async def nothing(self, *_, **__):
        pass

    async def score(self, outputs, kwargs):
        outputs[-1].reward_score = float(self.rng.random() < RATES[kwargs["extra_info"]["index"] % 4])

    async def roll(self, sampling_params, trajectory, trace, session_id, **prompt):
        self.received.append(prompt)
        if session_id >= self.answered.get(prompt["extra_info"]["index"], math.inf):
            raise TimeoutError("the engine did not answer")
        length = int(self.rng.integers(1, 5)) + self.longer.get(prompt["extra_info"]["index"], 0)
        if not trajectory["validate"]:
            self.generated[f"numbers/{prompt['extra_info']['index']}"] += length
        output = AgentLoopOutput(  # a tool answers in two tokens
            prompt_ids=[5, 6],
            response_ids=[7] * length + [8, 8],
            response_mask=[1] * length + [0, 0],
            metrics=AgentLoopMetrics(),
        )
        await self.inner._agent_loop_postprocess(output, trajectory["validate"], session_id=session_id, **prompt)


class Run:
    """The part of verl's task runner and trainer that the plug-in sees."""

    def __init__(self, config, monkeypatch, seed=0):
        self.config, self.trainer_mode, self.step = config, config.trainer.v1.trainer_mode, 0
        self.queue, self.rng = Queue(), np.random.default_rng(seed)
        self.numbers, self.refills, self.refilled = count(), [*range(2 * PROMPTS, 3 * PROMPTS)], []
        for name in ("kv_list", "kv_clear", "kv_batch_get", "kv_batch_put", "async_kv_put", "async_kv_batch_put"):
            monkeypatch.setattr(transfer_queue, name, getattr(self.queue, name))
        monkeypatch.setattr(agent_loop_tq.ray, "get", lambda references: references)
        self.callback = build_checkpoint_callback(config)
        self.buffer = PPOTrainer._build_replay_buffer(self)
        manager = load_class_from_fqn(pick(config, MANAGER_KEY), "AgentLoopManager")
        self.manager = manager(config=config, llm_client=None)
        self.manager.agent_loop_workers = [Worker(config, self.queue, self.rng) for _ in range(2)]

    def _add_prompts_to_generate(self, prompts):
        self.refilled.append(prompts)
        self.dispatch(self.refills[:prompts])
        del self.refills[:prompts]

    def rows(self):
        start = (self.step - 1) * PROMPTS % (2 * PROMPTS)
        return self.rows_of(range(start, start + PROMPTS))

    def rows_of(self, prompts):
        return [
            {
                "raw_prompt": [{"role": "user", "content": f"prompt {k}"}],
                "data_source": "numbers",
                "extra_info": {"index": k},
                "index": k,
                "reward_model": {"ground_truth": "1"},
                "dummy_tensor": torch.tensor([0], dtype=torch.uint8),
            }
            for k in prompts
        ]

    def dispatch(self, prompts=None, **whole):
        """As PPOTrainer does: collate, name the rows, register and send them."""
        rows = self.rows() if prompts is None else self.rows_of(prompts)
        columns = collate_fn(rows)
        columns["uid"] = np.array([f"{self.step}-{next(self.numbers)}" for _ in rows], dtype=object)
        tag = {"is_prompt": True, "status": "pending", "global_steps": self.step}
        partition = "val" if whole.get("validate") else "train"
        self.queue.kv_batch_put([*columns["uid"]], partition, tags=[dict(tag) for _ in rows])
        batch = tensordict_utils.get_tensordict(columns)
        tensordict_utils.assign_non_tensor_data(batch, "global_steps", self.step)
        for name, value in whole.items():
            tensordict_utils.assign_non_tensor_data(batch, name, value)
        for worker in self.manager.agent_loop_workers:
            worker.received.clear()
        self.manager.generate_sequences(batch)

    def train(self):
        self.step += 1
        self.dispatch()
        return self.buffer.sample(global_steps=self.step, partition_id="train", batch_size=PROMPTS)

    def outcome(self, batch, estimator=core_algos.AdvantageEstimator.GRPO):
        """(prompts, rewards) by row, and the advantages that verl computes for them."""
        data = self.queue.kv_batch_get(batch.keys, "train", ["rm_scores", "extra_info", "uid"])
        prompts = [f"numbers/{getattr(extra, 'data', extra)['index']}" for extra in data["extra_info"]]
        rewards = [float(scores.sum()) for scores in data["rm_scores"]]
        scores = torch.tensor(rewards)[:, None]
        rows = DataProto.from_dict(
            tensors={"token_level_rewards": scores.clone(), "response_mask": torch.ones_like(scores)},
            non_tensors={"uid": np.array([getattr(uid, "data", uid) for uid in data["uid"]], dtype=object)},
        )
        done = compute_advantage_for_multi_trajectories(
            rows, batch_keys=batch.keys, adv_estimator=estimator, num_repeat=MEAN
        )
        return prompts, rewards, done.batch["advantages"][:, 0].tolist()


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_six_steps_of_verls_own_code(tmp_path, monkeypatch, mode):
    """Group sizes, totals, advantages and learning, on what verl computed."""
    run = Run(configured(tmp_path, mode, poll_interval=0.01, log_metrics="all"), monkeypatch)
    reference, ragged = KnapsackAllocator(), 0
    for _ in range(STEPS):
        batch, metrics = run.train()
        prompts, rewards, advantages = run.outcome(batch)
        sizes = Counter(prompts)
        assert sum(sizes.values()) == PROMPTS * MEAN
        assert min(sizes.values()) >= 2
        ids = sorted(sizes)
        assert [sizes[i] for i in ids] == reference.allocate(ids, PROMPTS * MEAN).counts.tolist()
        reference.observe(prompts, rewards)
        if run.step == 1:  # later visits let the sum fade
            tracker = run.buffer.session.allocator.tracker
            generated = sum((worker.generated for worker in run.manager.agent_loop_workers), Counter())
            assert dict(zip(tracker.prompt_ids, tracker.records().length_sum, strict=True)) == dict(generated)
        groups = defaultdict(list)
        for prompt, reward in zip(prompts, rewards, strict=True):
            groups[prompt].append(reward)
        for prompt, reward, advantage in zip(prompts, rewards, advantages, strict=True):
            mates = groups[prompt]
            mean = math.fsum(mates) / len(mates)
            spread = math.sqrt(math.fsum((mate - mean) ** 2 for mate in mates) / (len(mates) - 1))
            assert advantage == pytest.approx((reward - mean) / (spread + 1e-6), rel=1e-5, abs=1e-6)
            ragged += len(mates) != MEAN and spread > 0
        assert metrics["knapsack/budget"] == PROMPTS * MEAN
        assert metrics["knapsack/allocation_failures"] == 0
        assert metrics["knapsack/rollouts"] == PROMPTS * MEAN
    assert ragged > 0
    assert metrics["knapsack/prompts_seen"] == 2 * PROMPTS


def test_two_rounds_of_verls_own_code(tmp_path, monkeypatch):
    """Exact totals, sizes that follow the first outcomes, and groups of both rounds in verl's advantages."""
    run = Run(configured(tmp_path, poll_interval=0.01, log_metrics="all", rounds=2), monkeypatch)
    across = 0
    for _ in range(STEPS):
        batch, metrics = run.train()
        prompts, rewards, advantages = run.outcome(batch)
        first = Counter(prompts[: 2 * PROMPTS])
        assert set(first.values()) == {2} and len(prompts) == PROMPTS * MEAN == len(set(batch.keys))
        outcomes = defaultdict(set)
        for prompt, reward in zip(prompts[: 2 * PROMPTS], rewards, strict=False):
            outcomes[prompt].add(reward)
        equal = {prompt for prompt, found in outcomes.items() if len(found) == 1}
        assert set(prompts[2 * PROMPTS :]) <= (equal or set(prompts))
        for row, (prompt, reward, advantage) in enumerate(zip(prompts, rewards, advantages, strict=True)):
            mates = [other for other, mate in zip(rewards, prompts, strict=True) if mate == prompt]
            mean = math.fsum(mates) / len(mates)
            spread = math.sqrt(math.fsum((mate - mean) ** 2 for mate in mates) / (len(mates) - 1))
            assert advantage == pytest.approx((reward - mean) / (spread + 1e-6), rel=1e-5, abs=1e-6)
            across += row < 2 * PROMPTS and prompt in equal and spread > 0
        assert metrics["knapsack/budget"] == metrics["knapsack/rollouts"] == PROMPTS * MEAN
        assert metrics["knapsack/allocation_failures"] == 0
    assert across, "no group got its gradient in the second round"
    assert metrics["knapsack/prompts_seen"] == 2 * PROMPTS


def test_advantages_over_the_mean_are_found_in_verls_registry(tmp_path, monkeypatch):
    name = "knapsack_group_mean"
    more = f"algorithm.adv_estimator={name}"
    run = Run(configured(tmp_path, "sync", more, poll_interval=0.01, value="likelihood"), monkeypatch)
    ragged = 0
    for _ in range(STEPS):
        batch, _ = run.train()
        prompts, rewards, advantages = run.outcome(batch, run.config.algorithm.adv_estimator)
        sizes = Counter(prompts)
        for prompt, reward, advantage in zip(prompts, rewards, advantages, strict=True):
            mates = [other for row, other in enumerate(rewards) if prompts[row] == prompt]
            weight = len(prompts) / (len(sizes) * len(mates))
            expected = (reward * len(mates) / sum(mates) - 1) * weight if 0 < sum(mates) < len(mates) else 0.0
            assert advantage == pytest.approx(expected, rel=1e-5, abs=1e-6)
            ragged += len(mates) != MEAN and expected != 0
    assert ragged > 0


def test_advantages_over_the_posterior_mean_go_by_what_was_known_before_the_batch(tmp_path, monkeypatch):
    more = "algorithm.adv_estimator=knapsack_posterior_mean"
    run = Run(configured(tmp_path, "sync", more, poll_interval=0.01), monkeypatch)
    allocator = run.manager.session.allocator
    for _ in range(STEPS):
        before = copy.deepcopy(allocator)
        batch, _ = run.train()
        prompts, rewards, found = run.outcome(batch, run.config.algorithm.adv_estimator)
        ids, group = numbered(prompts)
        groups = before.outcomes_of(group, np.array(rewards), len(ids))
        expected = groups.by_outcome(before.expected_outcomes(ids, groups))
        wanted = kr.group_advantages(prompts, rewards, advantage="posterior-mean", baseline=expected)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert (wanted != 0).any()
    assert allocator.value == "likelihood-0.5"


@pytest.mark.parametrize("columns", [["level"], "level, data_source"])
def test_columns_of_the_data_are_the_features_of_their_prompts(tmp_path, monkeypatch, columns):
    rows = Run.rows

    def graded(self):
        found = rows(self)
        for row in found:
            row["extra_info"]["level"] = RATES[row["index"] % 4]
        return found

    monkeypatch.setattr(Run, "rows", graded)
    run = Run(configured(tmp_path, poll_interval=0.01, log_metrics="all", feature_columns=columns), monkeypatch)
    for _ in range(STEPS):
        _, metrics = run.train()
    features = run.manager.session.allocator.shared.features
    ids = run.manager.session.allocator.tracker.prompt_ids
    assert features.names == sorted(["level", *(["data_source"] if "data_source" in columns else [])])
    place = features.names.index("level")
    levels = [RATES[int(name.split("/")[1]) % 4] for name in ids]
    assert dict(zip(levels, features.codes(ids)[:, place].tolist(), strict=True)) == {0.0: 2, 0.1: 3, 0.5: 4, 1.0: 5}
    assert len(set(zip(levels, features.codes(ids)[:, place].tolist(), strict=True))) == 4
    assert metrics["knapsack/allocation_failures"] == 0
    assert 0 < metrics["knapsack/features/level"] < 1
    wrong = Run(configured(tmp_path, poll_interval=0.01, feature_columns=["topic"]), monkeypatch)
    with pytest.raises(ValueError, match=r"no prompt of the first batch has 'topic'.*which are \['index', 'level'\]"):
        wrong.train()


def test_validation_and_uniform_allocation_are_stock(tmp_path, monkeypatch):
    run = Run(configured(tmp_path, allocation="uniform", poll_interval=0.01), monkeypatch)
    batch, _ = run.train()
    assert set(Counter(run.outcome(batch)[0]).values()) == {MEAN}
    run.step += 1
    run.dispatch(validate=True)
    received = [prompt for worker in run.manager.agent_loop_workers for prompt in worker.received]
    assert len(received) == PROMPTS * run.config.actor_rollout_ref.rollout.val_kwargs.n
    assert not any("knapsack_prompt_id" in prompt for prompt in received)
    _, metrics = run.buffer.sample(global_steps=run.step, partition_id="val", batch_size=PROMPTS)
    assert metrics == {}


def test_a_skipped_prompt_is_a_finished_group_without_rows(tmp_path, monkeypatch):
    run = Run(configured(tmp_path, min_rollouts=0, poll_interval=0.01), monkeypatch)
    shortest = PROMPTS
    for _ in range(12):
        batch, _ = run.train()
        sizes = Counter(run.outcome(batch)[0])
        assert sum(sizes.values()) == PROMPTS * MEAN
        assert 1 not in sizes.values()
        shortest = min(shortest, len(sizes))
    assert shortest < PROMPTS


def lost_of(metrics):
    return {name.removeprefix("knapsack/"): value for name, value in metrics.items() if "lost_groups" in name}


def test_groups_that_verl_drops_as_stale_are_counted(tmp_path, monkeypatch):
    """Two groups of an older step are left over; verl drops and replaces them, and they count once."""
    oldest = "trainer.v1.sampler.max_off_policy_threshold=1"
    run = Run(configured(tmp_path, "colocate_async", oldest, poll_interval=0.01), monkeypatch)
    _, metrics = run.train()
    assert lost_of(metrics) == {}
    run.dispatch([0, 3])  # of rates 0 and 1, whose estimates are below and above that of an unseen prompt
    rows = [key for key in run.queue.rows["train"] if key.startswith(("1-8_", "1-9_"))]
    tokens = {
        uid: [int(run.queue.rows["train"][key]["response_mask"][0].sum()) for key in rows if key.startswith(uid)]
        for uid in ("1-8", "1-9")
    }
    estimates = run.manager.session.allocator.allocate(["numbers/0", "numbers/3"], 2 * MEAN).success_rates
    batch, metrics = run.train()
    assert run.refilled == [2]
    assert not {"1-8", "1-9"} & {key.split("_")[0] for key in batch.keys}
    found = lost_of(metrics)
    assert found["lost_groups"] == found["lost_groups/stale"] == 2
    assert found["lost_groups_share"] == pytest.approx(2 / (2 + PROMPTS))
    assert found["lost_groups_length"] == pytest.approx(np.mean([np.mean(each) for each in tokens.values()]))
    assert found["lost_groups_success_rate"] == pytest.approx(np.mean(estimates))
    assert metrics["training/off_policy/evicted_samples"] == 2
    assert "knapsack/allocation_failures" not in metrics
    _, metrics = run.train()  # verl replaced two groups and had enough without: these are stale now
    assert lost_of(metrics)["lost_groups/stale"] == 2


@pytest.mark.parametrize("answered", [0, 2])
@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("refills", [False, True])
def test_groups_that_fail_are_counted_whether_or_not_verl_replaces_them(tmp_path, monkeypatch, mode, answered, refills):
    more = f"trainer.v1.sampler.sync_refill_failed_groups={refills}"
    run = Run(configured(tmp_path, mode, more, poll_interval=0.01, log_metrics="all"), monkeypatch)
    for _ in range(2):  # so that lengths are expected
        run.train()
    for worker in run.manager.agent_loop_workers:
        worker.answered = {1: answered}
    batch, metrics = run.train()
    prompts = Counter(run.outcome(batch)[0])
    found = lost_of(metrics)
    assert metrics["knapsack/allocation_failures"] == 0
    if mode == "sync" and answered:  # a shorter group is trained on
        assert (prompts["numbers/1"], found, run.refilled) == (answered, {}, [])
        return
    assert "numbers/1" not in prompts
    assert found["lost_groups"] == found["lost_groups/failed"] == 1
    assert 1 <= found["lost_groups_length"] <= 4
    assert 0 < found["lost_groups_success_rate"] < 1
    replaced = refills or mode != "sync"  # an asynchronous run replaces every group that fails
    assert run.refilled == ([1] if replaced else [])
    assert prompts["numbers/16"] == (MEAN if replaced else 0)
    assert len(prompts) == PROMPTS - (not replaced)
    assert run.manager.session.sent == {}


def test_a_prompt_whose_first_round_fails_is_not_lost_if_it_has_a_second(tmp_path, monkeypatch):
    run = Run(configured(tmp_path, poll_interval=0.01, rounds=2), monkeypatch)
    send = run.manager.generate_sequences

    def recovered(prompts):
        send(prompts)
        for worker in run.manager.agent_loop_workers:
            worker.answered = {}

    for worker in run.manager.agent_loop_workers:
        worker.answered = {1: 0}
    monkeypatch.setattr(run.manager, "generate_sequences", recovered)
    batch, metrics = run.train()
    assert Counter(run.outcome(batch)[0])["numbers/1"] > 0
    assert lost_of(metrics) == {}


def test_a_budget_in_tokens_of_verls_own_code(tmp_path, monkeypatch):
    """Uniform until lengths are known; then rollouts that vary in number, need no padding and cost the same tokens."""
    settings = {"budget_unit": "tokens", "log_metrics": "all", "poll_interval": 0.01}
    small = "actor_rollout_ref.actor.ppo_mini_batch_size=2"
    run = Run(configured(tmp_path, "sync", small, **settings), monkeypatch)
    for worker in run.manager.agent_loop_workers:
        worker.longer = dict.fromkeys(range(3, 2 * PROMPTS, 4), 40)  # the solved ones
    reference, totals, multiple = KnapsackAllocator(budget_unit="tokens"), [], varying_rows_multiple(run.config)
    for step in range(STEPS):
        batch, metrics = run.train()
        prompts, rewards, _ = run.outcome(batch)
        masks = run.queue.kv_batch_get(batch.keys, "train", ["response_mask"])["response_mask"]
        sizes, ids = Counter(prompts), sorted(set(prompts))
        if step:
            budget = MEAN * float(reference.predicted_lengths(ids).sum())
            planned = reference.allocate(ids, budget, multiple=multiple)
            assert [sizes[i] for i in ids] == planned.counts.tolist()
            assert metrics["knapsack/budget"] == planned.counts.sum()
        else:
            assert set(sizes.values()) == {MEAN}
        reference.observe(prompts, rewards, lengths=[float(mask.sum()) for mask in masks])
        totals.append(len(prompts))
        assert len(prompts) % multiple == 0
        assert metrics["knapsack/allocation_failures"] == 0
    assert len({*totals}) > 1, "the number of rollouts never varied"


def test_checkpoint_and_resume_by_verls_own_paths(tmp_path, monkeypatch):
    run = Run(configured(tmp_path, poll_interval=0.01), monkeypatch)
    for _ in range(3):
        run.train()
    folder = tmp_path / "global_step_3"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    run.callback.on_save(trainer=None, global_step=3, checkpoint_dir=str(folder), async_save=False)
    assert (folder / STATE_FILE).exists()
    resumed = Run(configured(tmp_path, poll_interval=0.01), monkeypatch)
    before, after = (r.manager.session.allocator.state_dict() for r in (run, resumed))
    assert before["header"] == after["header"]
    for name, array in before["arrays"].items():
        np.testing.assert_array_equal(array, after["arrays"][name])


def test_verls_own_defaults_are_checked(tmp_path):
    check_config(configured(tmp_path), VerlSettings())
    with pytest.raises(ValueError, match="pad to a multiple of"):
        check_config(configured(tmp_path, "sync", "actor_rollout_ref.actor.ppo_mini_batch_size=5"), VerlSettings())
    with pytest.raises(ValueError, match="use grpo"):
        check_config(configured(tmp_path, "sync", "algorithm.adv_estimator=gae"), VerlSettings())


def test_an_error_is_raised_when_verl_makes_its_replay_buffer(tmp_path, monkeypatch):
    """That is before it starts a worker."""
    train = material.make_data(tmp_path / "one.parquet", 4)
    there = f"data.train_files={train}"
    Run(configured(tmp_path, "sync", there), monkeypatch)
    for wrong, message in (
        ({"more": [there, "actor_rollout_ref.actor.ppo_mini_batch_size=5"]}, "pad to a multiple of"),
        ({"more": [f"data.train_files=[{train},{train}]"]}, "4 of 4 prompt ids are in several rows"),
        ({"more": [there], "prompt_id": "id"}, r"has no extra_info\.id; give every prompt"),
    ):
        config = configured(tmp_path, "sync", *wrong.pop("more"), **wrong)
        trainer = SimpleNamespace(config=config, trainer_mode="sync")
        trainer._add_prompts_to_generate = MethodType(lambda self, count: None, trainer)
        with pytest.raises(ValueError, match=message):
            PPOTrainer._build_replay_buffer(trainer)


def test_verl_knows_every_key_of_the_example_script(tmp_path):
    """Hydra refuses a key that verl's configuration does not have."""
    lines = example.launch_line(tmp_path / "bin")
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=lines)
    OmegaConf.resolve(config)
    settings = VerlSettings.from_mapping(pick(config, "trainer.v1.sampler.sampler_kwargs"))
    check_config(config, settings)
    assert settings.max_rollouts == 128
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == 2048


CONFIGS = Path(__file__).parent.parent / "configs" / "verl"


@pytest.mark.parametrize("machines", [1, 8])
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-7b"])
def test_launch_files_compose_with_the_configuration_of_verl(name, machines):
    """As ``main_ppo --config-path ... --config-name ...`` composes them; a key that verl lacks would be new in it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        stock = compose("ppo_trainer")
    OmegaConf.resolve(stock)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(name, overrides=[f"trainer.nnodes={machines}"])
    OmegaConf.resolve(config)
    settings = VerlSettings.from_mapping(pick(config, "trainer.v1.sampler.sampler_kwargs"))
    check_config(config, settings)
    assert not without_effect(config, settings)
    assert (settings.max_rollouts, config.algorithm.adv_estimator) == (128, "knapsack_posterior_mean")
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == 2048
    assert config.trainer.nnodes * config.trainer.n_gpus_per_node == 8 * machines
    own = {MANAGER_KEY, "trainer.v1.sampler.sampler_kwargs"}
    new = set(keys(OmegaConf.to_container(config))) - set(keys(OmegaConf.to_container(stock)))
    assert [key for key in new if not key.startswith(tuple(own))] == []


def keys(config, before=""):
    """Dotted paths of all values."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from keys(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def test_advantages_of_verl_pass_the_conformance_test():
    def engine(function):
        def advantages(groups, rewards):
            scores = torch.tensor(rewards)[:, None]
            found, _ = function(scores.clone(), torch.ones_like(scores), index=np.array([str(g) for g in groups]))
            return found[:, 0].numpy()

        return advantages

    kr.check_engine(engine(core_algos.compute_grpo_outcome_advantage), allow=("group of one",))
    with pytest.raises(AssertionError, match=r"1 of 9 checks(.|\n)*group of one"):
        kr.check_engine(engine(core_algos.compute_grpo_outcome_advantage))
