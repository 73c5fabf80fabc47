import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import knapsack_rl as kr
import verl_standins
from cases import message_of
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.cli import main
from knapsack_rl.ids import numbered
from knapsack_rl.offline.reward_logs import read_reward_log
from knapsack_rl.verl.launch import (
    VerlSettings,
    check_config,
    overrides,
    parse_overrides,
    pick,
    varying_rows_multiple,
)
from verl_harness import example
from verl_standins import Batch

RATES = (0.0, 0.1, 0.5, 1.0)


@pytest.fixture
def world(monkeypatch):
    world = verl_standins.World()
    verl_standins.install(monkeypatch, world)
    yield world
    for name in [name for name in sys.modules if name.startswith("knapsack_rl.verl.") or name == "knapsack_rl.verl"]:
        del sys.modules[name]


class Run:
    """A run of verl's loop on the stand-ins."""

    def __init__(self, folder, world, *, prompts=12, mode="sync", changes=None, **settings):
        from knapsack_rl.verl import KnapsackAgentLoopManager, KnapsackCheckpoint, KnapsackReplayBuffer

        settings = {"log_metrics": "all"} | settings
        self.world, self.prompts, self.folder, self.step = world, prompts, Path(folder), 0
        self.config = verl_standins.config(
            folder,
            **{"trainer.v1.trainer_mode": mode, "trainer.v1.sampler.sampler_kwargs": settings},
            **(changes or {}),
        )
        self.callback = KnapsackCheckpoint(config=self.config)
        self.buffer = KnapsackReplayBuffer(
            trainer_mode=mode,
            trainer_config={},
            max_off_policy_threshold=8,
            max_off_policy_strategy="drop",
            sampler_kwargs=settings,
            refill_fn=self.refill,
        )
        self.manager = KnapsackAgentLoopManager(config=self.config, llm_client=None)

    def refill(self, count):
        raise NotImplementedError

    def batch(self, *, rows=None, prefix="", validate=False, **columns):
        rows = self.prompts if rows is None else rows
        table = {
            "uid": [f"{prefix}u{self.step}-{k}" for k in range(rows)],
            "raw_prompt": [[{"role": "user", "content": f"prompt {k}"}] for k in range(rows)],
            "extra_info": [{"index": k, "rate": RATES[k % 4]} for k in range(rows)],
            "data_source": ["math"] * rows,
        } | columns
        return Batch(table, {"validate": True} if validate else {"global_steps": self.step})

    def train(self, **columns):
        """One step; (sizes of the groups by prompt, metrics)."""
        self.step += 1
        self.world.received.clear()
        self.manager.generate_sequences(self.batch(**columns))
        return self.sample()

    def sample(self):
        batch, metrics = self.buffer.sample(global_steps=self.step, partition_id="train", batch_size=self.prompts)
        uid_of = {prompt["uid"]: prompt["extra_info"].get("index") for prompt in self.world.received}
        sizes = Counter(uid_of[key.split("_")[0]] for key in batch.keys)
        self.world.queue.rows["train"].clear()
        return sizes, metrics

    def save(self):
        folder = self.folder / f"global_step_{self.step}"
        folder.mkdir(parents=True)
        (self.folder / "latest_checkpointed_iteration.txt").write_text(str(self.step))
        self.callback.on_save(trainer=None, global_step=self.step, checkpoint_dir=str(folder), async_save=False)


def test_counts_sum_to_the_budget_and_follow_what_was_learned(tmp_path, world):
    for mode in ("sync", "colocate_async"):
        run = Run(tmp_path / mode, world, mode=mode)
        oracle = KnapsackAllocator()
        for _ in range(6):
            expected = oracle.allocate([f"math/{k}" for k in range(12)], 48).counts
            sizes, metrics = run.train()
            assert [sizes[k] for k in range(12)] == expected.tolist(), mode
            assert sum(sizes.values()) == 48, mode
            assert metrics["stock"] == 1.0, mode
            assert metrics["knapsack/budget"] == 48, mode
            oracle = run.manager.session.allocator  # the next batch is allocated by its estimates
        assert min(sizes.values()) >= 2, mode
        assert len(set(sizes.values())) > 1, mode
        assert not any(name.startswith("knapsack/failures") for name in metrics), mode


def test_a_second_round_goes_to_groups_without_a_gradient(tmp_path, world):
    run = Run(tmp_path, world, rounds=2, log_allocations=True)
    followed = 0
    for step in range(1, 7):
        sizes, metrics = run.train()
        counts = [prompt["__rollout_n__"] for prompt in world.received]
        uids = [prompt["uid"] for prompt in world.received]
        assert counts[:12] == [2] * 12 and sum(counts) == 48 == sum(sizes.values())
        assert sorted(uids[:12]) == sorted(f"u{step}-{k}" for k in range(12))
        assert {uid.removesuffix(".2") for uid in uids[12:]} <= set(uids[:12])
        assert metrics["knapsack/rollouts"] == metrics["knapsack/budget"] == 48
        assert metrics["knapsack/allocation_failures"] == 0
        assert not any(name.startswith("knapsack/failures") for name in metrics)
        row = json.loads((tmp_path / "allocations.jsonl").read_text().splitlines()[-1])
        assert row["counts"] == row["arrived"] == [sizes[int(name.removeprefix("math/"))] for name in row["prompt_ids"]]
        mixed = [n for n, effective in zip(row["counts"], row["effective"], strict=True) if effective]
        followed += 2 in mixed and max(row["counts"]) > 4
    assert followed
    assert run.manager.session.first_round is None


def test_a_second_round_whose_outcomes_cannot_be_read_follows_the_estimates(tmp_path, world, monkeypatch, caplog):
    run = Run(tmp_path, world, rounds=2, outcome="accuracy")
    sizes, metrics = run.train()
    assert sum(sizes.values()) == 48 and set(sizes.values()) == {4}
    assert metrics == {"stock": 1.0}
    assert "returned no 'accuracy' beside its score" in caplog.text


def test_a_prompt_twice_in_a_batch_divides_its_second_round_over_its_rows(tmp_path, world):
    small = {"data.train_batch_size": 4, "actor_rollout_ref.actor": {"ppo_mini_batch_size": 4}}
    run = Run(tmp_path, world, prompts=4, rounds=2, changes=small)
    twice = [{"index": k, "rate": 0.0 if k else 0.5} for k in (0, 1, 1, 0)]
    run.train(extra_info=twice, raw_prompt=[[{"role": "user", "content": f"{row['index']}"}] for row in twice])
    got = Counter()
    for prompt in world.received:
        got[prompt["uid"].removesuffix(".2")] += prompt["__rollout_n__"]
    assert sum(got.values()) == 16 and abs(got["u1-1"] - got["u1-2"]) <= 1 and min(got.values()) >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer.v1.trainer_mode": "colocate_async"},
            r"rounds=2 needs trainer\.v1\.trainer_mode=sync .* got colocate_async",
        ),
        (
            {"trainer.v1.sync": {"parameter_sync_step": 2}, "actor_rollout_ref.actor": {"ppo_mini_batch_size": 6}},
            "got sync and 2",
        ),
        ({"skip": {"rollout_tq": {"enable": True}}}, r"which skip\.rollout_tq skips"),
        ({"trainer.v1.sampler.sync_refill_failed_groups": True}, "sends prompts between the rounds of rounds=2"),
        ({"actor_rollout_ref.rollout.n": 2}, r"rounds=2 needs actor_rollout_ref\.rollout\.n of at least 3"),
    ],
)
def test_two_rounds_that_cannot_work_on_verl_are_refused(tmp_path, changes, message):
    config = verl_standins.config(tmp_path, **changes)
    check_config(config, VerlSettings())
    with pytest.raises(ValueError, match=message):
        check_config(config, VerlSettings(rounds=2))


OVER_MEAN = {"algorithm.adv_estimator": "knapsack_group_mean"}
POSTERIOR = {"algorithm.adv_estimator": "knapsack_posterior_mean"}


def test_advantages_over_the_mean_are_those_of_the_learned_outcomes(tmp_path, world):
    torch = pytest.importorskip("torch")
    run = Run(tmp_path, world, changes=OVER_MEAN, log_metrics="all")
    estimator = world.estimators["knapsack_group_mean"]
    for low, high in ((0.0, 1.0), (-1.0, 3.0)):
        uid = np.array(["b", "a", "b", "b", "a", "c", "b", "c"], dtype=object)
        rewards = torch.tensor([[0.0, r] for r in (high, low, low, low, high, low, low, low)])
        if low:  # the rule has to be learned from what the run observes
            allocator = run.buffer.session.allocator
            allocator.observe(["x"] * 8 + ["y"] * 8, [high] * 7 + [low] + [low] * 8)
        mask = torch.tensor([[1.0, 1.0]] * 7 + [[1.0, 0.0]])
        found, returns = estimator(token_level_rewards=rewards, response_mask=mask, index=uid, config=None)
        # Eight rows in three groups: (r / mean - 1) x 8 / (3 x group size)
        wanted = np.array([3 * 8 / 12, -8 / 6, -8 / 12, -8 / 12, 8 / 6, 0, -8 / 12, 0])
        np.testing.assert_allclose(found.numpy(), wanted[:, None] * mask.numpy(), rtol=1e-6)
        assert found is returns and found.dtype == rewards.dtype
    run.train()


def test_advantages_over_the_mean_are_refused_where_rewards_are_not_outcomes(tmp_path, world, caplog):
    with pytest.raises(ValueError, match="knapsack_group_mean judges the reward, and outcome=acc"):
        Run(tmp_path / "outcome", world, changes=OVER_MEAN, outcome="acc")
    with pytest.raises(ValueError, match="use_kl_in_reward=True changes the reward"):
        Run(tmp_path / "kl", world, changes=OVER_MEAN | {"algorithm.use_kl_in_reward": True})
    run = Run(tmp_path / "turns", world, changes=OVER_MEAN)
    run.manager.generate_sequences(run.batch())
    rows = world.queue.rows["train"]
    first = next(iter(rows))
    rows[first.rpartition("_")[0] + "_1"] = dict(rows[first])
    run.sample()
    assert "use algorithm.adv_estimator=grpo for agents of several turns" in caplog.text
    with pytest.raises(ValueError, match=r"knapsack_posterior_mean: .* needs an estimator with a posterior on a grid"):
        Run(tmp_path / "beta", world, changes=POSTERIOR, estimator="beta")


def test_advantages_over_the_posterior_mean_go_by_what_was_known_before_the_batch(tmp_path, world):
    torch = pytest.importorskip("torch")
    run = Run(tmp_path, world, changes=POSTERIOR)
    run.train()
    run.step += 1
    run.manager.generate_sequences(run.batch())
    before = copy.deepcopy(run.manager.session.allocator)
    rows = dict(world.queue.rows["train"])
    run.sample()
    uid = [key.split("_")[0] for key in rows]
    rewards = [float(row["rm_scores"].sum()) for row in rows.values()]
    prompt = [f"math/{name.split('-')[1]}" for name in uid]
    groups = before.outcomes_of(numbered(prompt)[1], np.array(rewards), len(set(prompt)))
    expected = groups.by_outcome(before.expected_outcomes(numbered(prompt)[0], groups))
    wanted = kr.group_advantages(prompt, rewards, advantage="posterior-mean", baseline=expected)
    assert (wanted != 0).any()
    estimator, scores = world.estimators["knapsack_posterior_mean"], torch.tensor(rewards)[:, None]
    found, _ = estimator(token_level_rewards=scores, response_mask=torch.ones_like(scores), index=np.array(uid))
    np.testing.assert_allclose(found[:, 0].numpy(), wanted, rtol=1e-6)
    # Prompts of which nothing was expected, such as those of another batch: the rest of the group decides.
    found, _ = estimator(token_level_rewards=scores, response_mask=torch.ones_like(scores), index=np.array(prompt))
    alone = groups.by_outcome(groups.expected_alone)
    np.testing.assert_allclose(
        found[:, 0], kr.group_advantages(prompt, rewards, advantage="posterior-mean", baseline=alone), rtol=1e-6
    )


def test_rewards_and_lengths_are_observed_by_prompt(tmp_path, world):
    run = Run(tmp_path, world)
    run.train()
    records = run.manager.session.allocator.tracker.lookup([f"math/{k}" for k in range(12)])
    solved = records.successes / records.rollouts
    np.testing.assert_array_equal(solved[np.arange(12) % 4 == 0], 0.0)
    np.testing.assert_array_equal(solved[np.arange(12) % 4 == 3], 1.0)
    assert records.rollouts.tolist() == [4] * 12
    assert records.length_sum.tolist() == [1 + 2 + 3 + 1] * 12


def test_the_outcome_may_be_a_value_beside_the_reward(tmp_path, world):
    run = Run(tmp_path, world, outcome="acc")
    run.train()
    records = run.manager.session.allocator.tracker.lookup(["math/0", "math/3"])
    assert (records.successes / records.rollouts).tolist() == [1.0, 0.0]  # the stand-in returns acc = 1 - reward


def test_a_missing_outcome_is_warned_about_and_does_not_end_the_run(tmp_path, world, caplog):
    run = Run(tmp_path, world, outcome="accuracy")
    sizes, metrics = run.train()
    run.train()
    assert sum(sizes.values()) == 48
    assert metrics == {"stock": 1.0}
    assert caplog.text.count("returned no 'accuracy' beside its score but ['acc']") == 1


def test_a_session_of_several_turns_counts_once_with_all_of_its_tokens(world):
    from knapsack_rl.verl.replay_buffer import read_outcomes

    rows = world.queue.rows["train"]
    turns = {"u_0_1": (1.0, [0, 1, 1]), "u_0_0": (0.0, [1, 1, 0]), "u_1_0": (0.0, [1, 1])}
    for key, (reward, mask) in turns.items():
        rows[key] = {"knapsack_prompt_id": "p", "rm_scores": np.array([reward]), "response_mask": np.array(mask)}
    ids, outcomes, lengths = read_outcomes(verl_standins.KVBatchMeta(list(rows), [{}] * 3, "train"), "reward")
    assert (ids, outcomes.tolist(), lengths.tolist()) == (["p", "p"], [1.0, 0.0], [4.0, 2.0])


def test_validation_is_untouched(tmp_path, world):
    run = Run(tmp_path, world)
    run.train()
    before = run.manager.session.allocator.state_dict()
    world.received.clear()
    run.manager.generate_sequences(run.batch(validate=True, extra_info=[{}] * 12))
    assert all(
        set(prompt) == {"uid", "raw_prompt", "extra_info", "data_source", "validate"} for prompt in world.received
    )
    assert [prompt["uid"] for prompt in world.received] == [f"u1-{k}" for k in range(12)]
    assert len(world.queue.rows["val"]) == 12
    _, metrics = run.buffer.sample(global_steps=1, partition_id="val", batch_size=12)
    assert metrics == {"stock": 1.0}
    after = run.manager.session.allocator.state_dict()
    assert after["header"] == before["header"]


def test_uniform_allocation_adds_the_id_and_nothing_else(tmp_path, world):
    run = Run(tmp_path, world, allocation="uniform")
    for _ in range(3):
        sizes, metrics = run.train()
        assert set(sizes.values()) == {4}
        assert [prompt["extra_info"]["index"] for prompt in world.received] == list(range(12))
        assert all("__rollout_n__" not in prompt for prompt in world.received)
    assert metrics["knapsack/budget_max"] == 4
    assert 0 < metrics["knapsack/effective_prompt_ratio"] < 1


def test_a_prompt_gets_no_rollouts_or_at_least_two(tmp_path, world):
    run = Run(tmp_path, world, min_rollouts=0)
    for _ in range(12):
        sizes, _ = run.train()
        assert sum(sizes.values()) == 48
        assert 1 not in sizes.values()
    assert len(sizes) < 12


def test_each_worker_sends_its_longest_rollouts_first(tmp_path, world):
    run = Run(tmp_path, world)
    ids = [f"math/{k}" for k in range(12)]
    lengths = np.array([5, 90, 20, 70, 30, 60, 10, 80, 40, 50, 3, 1], float)
    run.manager.session.allocator.observe(np.repeat(ids, 4).tolist(), [0, 1] * 24, np.repeat(lengths, 4))
    run.train()
    sent = [[int(uid.split("-")[1]) for uid in piece] for piece in world.sent]
    assert [lengths[piece].tolist() for piece in sent] == [[90, 60, 30, 5], [80, 50, 20, 3], [70, 40, 10, 1]]


def test_priority_is_set_where_the_engine_schedules_by_it(tmp_path, world):
    run = Run(tmp_path, world, changes={"actor_rollout_ref.rollout.scheduling_policy": "priority"})
    run.manager.session.allocator.observe(["math/3"] * 4 + ["math/5"] * 4, [0, 1] * 4, [9] * 4 + [4] * 4)
    run.train()
    priority = {prompt["extra_info"]["index"]: prompt["priority"] for prompt in world.received}
    assert sorted(priority.values()) == list(range(12))
    assert priority[3] == 0
    assert priority[5] == 11


def test_the_order_is_a_permutation_that_deals_in_turn(world):
    from knapsack_rl.verl.manager import longest_first

    for case in product((1, 5, 12, 13), (1, 3, 8, 20)):
        rows, workers = case
        lengths = np.random.default_rng(rows).permutation(rows).astype(float)
        order = longest_first(lengths, workers)
        assert sorted(order.tolist()) == list(range(rows)), case
        size = -(-rows // workers)
        pieces = [lengths[order[start : start + size]].tolist() for start in range(0, rows, size)]
        assert all(piece == sorted(piece, reverse=True) for piece in pieces), case
        firsts = sorted((piece[0] for piece in pieces), reverse=True)
        assert firsts == sorted(lengths, reverse=True)[: len(pieces)], case


# -- identity -------------------------------------------------------------------------------------------------------


def test_the_id_includes_the_source(world):
    from knapsack_rl.verl.identity import prompt_ids

    rows = {"extra_info": [{"index": 7}, {"index": np.int64(7)}, {"index": "7a"}], "data_source": ["a", "b", "a"]}
    assert prompt_ids(rows, "index") == ["a/7", "b/7", "a/7a"]
    assert prompt_ids({"extra_info": [{"id": 3}], "data_source": ["a"]}, "id") == ["a/3"]


def test_a_hash_identifies_prompts_by_their_text(world):
    from knapsack_rl.verl.identity import prompt_ids

    same, other = [{"role": "user", "content": "1+1"}], [{"role": "user", "content": "1+2"}]
    one, two, three = prompt_ids({"raw_prompt": [same, other, [dict(same[0])]]}, "hash")
    assert one == three != two
    picture = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    with pytest.raises(ValueError, match=r"images or sounds cannot be hashed.*extra_info\.index"):
        prompt_ids({"raw_prompt": [picture]}, "hash")


def test_a_missing_index_is_refused_with_the_fix(tmp_path, world):
    for extra in ({}, None, {"index": None}, {"index": 1.5}, {"index": True}):
        found = message_of(ValueError, Run(tmp_path, world).train, extra_info=[extra] * 12)
        assert re.search(r"unique within its data_source.*sampler_kwargs\.prompt_id=hash", found), extra
        assert world.received == [], extra  # before anything was generated


def test_one_index_for_all_prompts_is_refused(tmp_path, world):
    run = Run(tmp_path, world)
    with pytest.raises(ValueError, match="all 12 prompts of the first batch have the id 'math/0'"):
        run.train(extra_info=[{"index": 0}] * 12)


def test_a_missing_index_in_a_later_batch_is_warned_about(tmp_path, world, caplog):
    run = Run(tmp_path, world)
    run.train()
    run.step += 1
    run.manager.generate_sequences(run.batch(extra_info=[{}] * 12))
    run.manager.generate_sequences(run.batch(prefix="again", extra_info=[{}] * 12))
    assert caplog.text.count("the batch gets rollout.n for every prompt") == 1
    assert len(world.queue.rows["train"]) == 96
    run.world.queue.rows["train"].clear()
    assert run.train()[1]["knapsack/failures/identification"] == 2


def test_a_repeated_prompt_in_a_batch_divides_one_number_of_rollouts_over_its_rows(tmp_path, world, caplog):
    run = Run(tmp_path, world)
    run.train()
    extra = [{"index": k % 11, "rate": RATES[k % 11 % 4]} for k in range(12)]
    prompts = [[{"role": "user", "content": f"prompt {k % 11}"}] for k in range(12)]
    sizes, _ = run.train(extra_info=extra, raw_prompt=prompts)
    assert sum(sizes.values()) == 48
    given = {p["uid"]: p["__rollout_n__"] for p in world.received}
    assert sizes[0] == given["u2-0"] + given["u2-11"]
    assert 1 not in given.values() and given["u2-0"] - given["u2-11"] in (0, 1, sizes[0])
    assert "a batch holds a prompt more than once" in caplog.text
    assert run.manager.session.allocator.metrics()["budget"] == 48


def test_rows_of_one_id_that_differ_are_kept_apart(tmp_path, world, caplog):
    """As in files that cannot be checked before the run."""
    run = Run(tmp_path, world)
    run.train()
    answers = [{"ground_truth": str(k // 2)} for k in range(12)]
    extra = [{"index": k % 3, "rate": RATES[k % 4]} for k in range(12)]
    same = [[{"role": "user", "content": "play the game"}]] * 12
    run.train(extra_info=extra, raw_prompt=same, reward_model=answers)
    ids = [prompt["knapsack_prompt_id"] for prompt in world.received]
    assert len(set(ids)) == 12 and sum("/" in prompt_id.removeprefix("math/") for prompt_id in ids) == 9
    assert caplog.text.count("kept apart by a hash") == 1


def test_a_hash_covers_what_the_reward_sees(world):
    from knapsack_rl.verl.identity import prompt_ids

    def row(**columns):
        table = {
            "raw_prompt": [{"role": "user", "content": "play"}],
            "data_source": "a",
            "uid": str(len(seen)),
        } | columns
        seen.append(prompt_ids({name: [value] for name, value in table.items()}, "hash")[0])

    seen = []
    row()
    for columns in (
        {"reward_model": {"ground_truth": "1"}},
        {"reward_model": {"ground_truth": "2"}},
        {"extra_info": {"secret": "x"}},
        {"extra_info": {"secret": np.arange(3)}},
        {"data_source": "b"},
        {"tools_kwargs": {"create": {"word": "y"}}},
    ):
        row(**columns)
    assert len(set(seen)) == len(seen)
    row(extra_info={"index": 5})
    assert seen[-1] == seen[0]


def test_images_in_files_are_refused_with_hashes_at_the_start(tmp_path, world):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kind = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    for images, refused in (([[{"bytes": b"x"}], []], True), ([[], None], False)):
        table = pyarrow.table({"prompt": ["a", "b"], "images": pyarrow.array(images, type=kind)})
        parquet.write_table(table, tmp_path / "train.parquet")
        lines = write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "videos": ["a.mp4"] if refused else []}])
        for file in (str(tmp_path / "train.parquet"), lines):
            settings = {"changes": {"data.train_files": file}, "prompt_id": "hash"}
            if refused:
                assert "images or sounds cannot be hashed" in message_of(ValueError, Run, tmp_path, world, **settings)
            else:
                Run(tmp_path, world, **settings)


def test_uniform_allocation_needs_no_ids(tmp_path, world, caplog):
    file = write_rows(tmp_path / "bare.jsonl", [{"data_source": "a", "extra_info": {}}] * 2)
    run = Run(tmp_path, world, allocation="uniform", changes={"data.train_files": file})
    for _ in range(2):
        run.step += 1
        run.manager.generate_sequences(run.batch(extra_info=[{}] * 12))
        _, metrics = run.buffer.sample(global_steps=run.step, partition_id="train", batch_size=12)
        assert metrics == {"stock": 1.0}
    assert [set(prompt) for prompt in world.received] == [set(world.received[0])] * 24
    assert "knapsack_prompt_id" not in world.received[0]
    assert caplog.text.count("Uniform allocation works without") == 1


def test_a_run_in_which_nothing_can_happen_says_so_once(tmp_path, world, caplog, capsys):
    cases = [
        ({"data.train_batch_size": 1, "actor_rollout_ref.actor.ppo_mini_batch_size": 1}, {}, "has one prompt"),
        ({}, {"min_rollouts": 4}, "n=4 equals min_rollouts.*min_rollouts to 2"),
        ({}, {"max_rollouts": 4}, "n=4 equals max_rollouts.*raise .*max_rollouts"),
        ({"trainer.total_epochs": 1}, {}, "total_epochs=1"),
    ]
    for changes, settings, message in cases:
        for allocation in ("knapsack", "uniform"):
            caplog.clear()
            one_gpu = {"trainer.n_gpus_per_node": 1} | changes
            Run(tmp_path, world, changes=one_gpu, allocation=allocation, **settings)
            found = [record.getMessage() for record in caplog.records if "stock verl" in record.getMessage()]
            assert len(found) == (allocation == "knapsack"), (message, found)
            assert all(re.search(message, text) for text in found)
    caplog.clear()
    Run(tmp_path, world)
    assert "stock verl" not in caplog.text
    launch = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8", "trainer.total_epochs=1"]
    assert main(["verl-args", *launch]) == 0
    printed = capsys.readouterr()
    assert "total_epochs=1" in printed.err and "total_epochs" not in printed.out


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_files_that_repeat_an_id_are_refused_before_anything_is_generated(tmp_path, world):
    rows = [{"data_source": "a", "extra_info": {"index": k}} for k in range(3)]
    one, two = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "two.jsonl", rows[1:])
    with pytest.raises(ValueError, match=r"2 of 3 prompt ids are in several rows.*'a/1' in 2.*Keep one row") as caught:
        Run(tmp_path, world, changes={"data.train_files": [one, two]})
    assert "prompt_id=hash" in str(caught.value)
    other = write_rows(tmp_path / "other.jsonl", [row | {"data_source": "b"} for row in rows])
    Run(tmp_path, world, changes={"data.train_files": [one, other]})  # the id includes the source
    Run(tmp_path, world, changes={"data.train_files": [one, two]}, prompt_id="hash")
    Run(tmp_path, world, changes={"data.train_files": "hdfs://far/away.parquet"})
    bare = write_rows(tmp_path / "bare.jsonl", [{"data_source": "a", "extra_info": {}}])
    with pytest.raises(ValueError, match=r"bare\.jsonl: a prompt of data_source 'a' has no extra_info\.index"):
        Run(tmp_path, world, changes={"data.train_files": bare})


def test_parquet_files_are_checked(tmp_path, world):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"data_source": "a", "prompt": "x", "extra_info": {"index": k // 2}} for k in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="2 of 2 prompt ids are in several rows"):
        Run(tmp_path, world, changes={"data.train_files": str(tmp_path / "twice.parquet")})


# -- state ----------------------------------------------------------------------------------------------------------


def arrays_of(run):
    return run.manager.session.allocator.state_dict()["arrays"]


def test_a_resumed_run_continues_with_the_same_state(tmp_path, world):
    run = Run(tmp_path, world)
    for _ in range(3):
        run.train()
    run.save()
    saved = arrays_of(run)
    upcoming = run.manager.session.allocator.allocate([f"math/{k}" for k in range(12)], 48).counts
    resumed = Run(tmp_path, world)
    for name, array in arrays_of(resumed).items():
        np.testing.assert_array_equal(array, saved[name])
    sizes, _ = resumed.train()
    assert [sizes[k] for k in range(12)] == upcoming.tolist()


def test_the_state_is_that_of_the_checkpoint_that_verl_loads(tmp_path, world, monkeypatch):
    from knapsack_rl.verl import STATE_FILE
    from knapsack_rl.verl.checkpoint import state_to_resume

    run = Run(tmp_path, world)
    for _ in range(2):
        run.train()
        run.save()
    monkeypatch.chdir(tmp_path)
    by_path = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": "global_step_1"}
    for changes, folder in (
        ({}, "global_step_2"),
        ({"trainer.resume_mode": "disable"}, None),
        (by_path, "global_step_1"),
    ):
        state = state_to_resume(verl_standins.config(tmp_path, **changes))
        assert state == (folder and tmp_path / folder / STATE_FILE), changes


def test_a_checkpoint_killed_before_its_state_resumes_from_an_older_one(tmp_path, world, caplog):
    from knapsack_rl.verl import STATE_FILE
    from knapsack_rl.verl.checkpoint import state_to_resume

    run = Run(tmp_path, world)
    for _ in range(3):
        run.train()
        run.save()
    (tmp_path / "global_step_3" / STATE_FILE).unlink()
    assert state_to_resume(run.config) == tmp_path / "global_step_2" / STATE_FILE
    assert "global_step_3 has no knapsack_allocator.npz" in caplog.text


def test_a_state_of_another_estimator_is_refused_at_the_start(tmp_path, world):
    run = Run(tmp_path, world)
    run.train()
    run.save()
    with pytest.raises(ValueError, match="the state belongs to estimator"):
        Run(tmp_path, world, estimator="beta")


def test_allocations_are_logged(tmp_path, world):
    run = Run(tmp_path, world, log_allocations=True)
    for _ in range(3):
        sizes, _ = run.train()
    rows = [json.loads(line) for line in (tmp_path / "allocations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert dict(zip(rows[-1]["prompt_ids"], rows[-1]["counts"], strict=True)) == {
        f"math/{k}": n for k, n in sizes.items()
    }
    assert rows[-1]["arrived"] == rows[-1]["counts"]


def test_the_log_is_read_by_every_reader(tmp_path, world):
    """One schema: verl's adapter writes the rows that TRL's writes."""
    run = Run(tmp_path, world, log_allocations=True)
    for _ in range(8):
        run.train()
    log = read_reward_log(tmp_path / "allocations.jsonl")
    assert log.steps.tolist() == list(range(1, 9)) and log.totals.sum() == 8 * 48
    assert sorted(log.prompt_ids) == sorted(f"math/{k}" for k in range(12))
    assert main(["allocate", str(tmp_path), "--rollouts-per-prompt", "4"]) == 0
    assert main(["replay", str(tmp_path), "--no-page", "--quiet", "--seeds", "1"]) == 0
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_budget_in_tokens_needs_no_padding(tmp_path, world):
    run = Run(
        tmp_path, world, changes={"actor_rollout_ref.actor.ppo_mini_batch_size": 2}, budget_unit="tokens",
        max_rollouts=32,
    )  # fmt: skip
    totals = [sum(run.train()[0].values()) for _ in range(8)]
    assert totals[0] == 48 and len(set(totals)) > 1
    assert all(total % 8 == 0 for total in totals)  # 2 ranks, mini-batches of 2 x 4


# -- a run does not die ---------------------------------------------------------------------------------------------


def test_a_failing_allocator_gives_uniform_groups_and_one_warning(tmp_path, world, monkeypatch, caplog):
    run = Run(tmp_path, world)
    run.train()
    monkeypatch.setattr(run.manager.session.allocator, "allocate", lambda *_: 1 / 0)
    monkeypatch.setattr(run.manager.session.allocator, "record", lambda *_: 1 / 0)
    for _ in range(2):
        sizes, metrics = run.train()
        assert set(sizes.values()) == {4}
    assert metrics["knapsack/failures/allocation"] == metrics["knapsack/failures/observation"] == 2
    assert caplog.text.count("allocation failed; the run continues without it") == 1


def test_a_failing_prediction_does_not_end_a_uniform_run(tmp_path, world, monkeypatch, caplog):
    run = Run(tmp_path, world, allocation="uniform")
    monkeypatch.setattr(run.manager.session.allocator, "adopt", lambda *_: 1 / 0)
    for _ in range(2):
        sizes, _ = run.train()
        assert set(sizes.values()) == {4}
    assert caplog.text.count("prediction failed; the run continues without it") == 1


def test_rewards_that_are_not_finite_count_as_unscored(tmp_path, world):
    run = Run(tmp_path, world)
    run.step = 1
    run.manager.generate_sequences(run.batch())
    first = next(iter(world.queue.rows["train"].values()))
    first["rm_scores"] = np.array([np.inf])
    assert run.sample()[1]["knapsack/unscored_rollouts"] == 1


def test_a_lost_group_is_not_an_error(tmp_path, world):
    run = Run(tmp_path, world)
    run.step = 1
    run.manager.generate_sequences(run.batch())
    for key in [key for key in world.queue.rows["train"] if key.startswith("u1-3_") or key == "u1-5_2_0"]:
        del world.queue.rows["train"][key]
    sizes, metrics = run.sample()
    assert sum(sizes.values()) == 43
    assert metrics["knapsack/prompts"] == 11


# -- configuration --------------------------------------------------------------------------------------------------


def test_a_varying_number_of_rows_fits_micro_batches_too():
    config = {
        "trainer": {"n_gpus_per_node": 4},
        "actor_rollout_ref": {
            "actor": {"ppo_mini_batch_size": 3},
            "rollout": {"n": 4, "log_prob_micro_batch_size_per_gpu": 8},
            "ref": {"log_prob_micro_batch_size_per_gpu": 5},
        },
    }
    assert varying_rows_multiple(config) == 480  # mini-batches of 12, micro-batches of 32 and 20
    config["actor_rollout_ref"]["ref"]["log_prob_use_dynamic_bsz"] = True
    assert varying_rows_multiple(config) == 96
    config["actor_rollout_ref"]["rollout"]["log_prob_use_dynamic_bsz"] = True
    assert varying_rows_multiple(config) == 12


def test_a_configuration_that_cannot_work_is_refused_early(tmp_path):
    cases = [
        ({"actor_rollout_ref.rollout.n": 1}, "rollout.n is 1"),
        ({"actor_rollout_ref.rollout.n": 500}, "max_rollouts=128"),
        ({"algorithm.adv_estimator": "gae"}, "use grpo"),
        ({"algorithm.filter_groups": {"enable": True}}, "in place of those without a gradient"),
        ({"trainer.use_v1": False}, "legacy trainer"),
        ({"reward": {"reward_model": {"enable": True}}}, "enable_resource_pool=True"),
        ({"data.train_batch_size": 13}, "an update has 52 rollouts .*pad to a multiple of 48"),
        ({"trainer.n_gpus_per_node": 5}, "lcm of 5 data-parallel ranks"),
        (
            {"trainer.n_gpus_per_node": 3, "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2},
            "3 GPUs cannot be divided into model replicas of 2",
        ),
        (
            {"trainer.v1.trainer_mode": "separate_async", "data.train_batch_size": 13},
            "multiple of parameter_sync_step=4",
        ),
        ({"actor_rollout_ref.rollout.agent": {"num_workers": 1}}, "agent_loop_manager_class is not set"),
        ({"trainer.checkpoint_callback_class": None}, "a resumed run knows nothing of its prompts"),
    ]
    for changes, message in cases:
        found = message_of(ValueError, check_config, verl_standins.config(tmp_path, **changes), VerlSettings())
        assert re.search(message, found), (changes, found)


def test_the_configuration_is_checked_before_workers_start(tmp_path, world):
    from knapsack_rl.verl import KnapsackReplayBuffer

    class Trainer:
        config = verl_standins.config(tmp_path, **{"algorithm.adv_estimator": "gae"})

        def refill(self, count): ...

    with pytest.raises(ValueError, match="use grpo"):
        KnapsackReplayBuffer(trainer_mode="sync", sampler_kwargs={}, refill_fn=Trainer().refill)
    bare = write_rows(tmp_path / "bare.jsonl", [{"extra_info": {}}])
    Trainer.config = verl_standins.config(tmp_path, **{"data.train_files": bare})
    with pytest.raises(ValueError, match=r"has no extra_info\.index; give every prompt"):
        KnapsackReplayBuffer(trainer_mode="sync", sampler_kwargs={}, refill_fn=Trainer().refill)
    with pytest.raises(ValueError, match=r"no setting 'max_rollout'; did you mean max_rollouts\?"):
        KnapsackReplayBuffer(trainer_mode="sync", sampler_kwargs={"max_rollout": 3})


def test_a_plug_in_half_switched_on_is_refused(tmp_path, world):
    from knapsack_rl.verl import KnapsackAgentLoopManager, KnapsackReplayBuffer, session

    session._open.clear()
    with pytest.raises(RuntimeError, match=r"custom_sampler\.path and \.name too"):
        KnapsackAgentLoopManager(config=verl_standins.config(tmp_path))
    buffer = KnapsackReplayBuffer(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs={},
    )
    with pytest.raises(ValueError, match=r"agent_loop_manager_class=knapsack_rl\.verl\.KnapsackAgentLoopManager"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=1)


def test_the_mode_picks_the_replay_buffer_and_settings_reach_it(tmp_path, world):
    sync, later = Run(tmp_path, world, poll_interval=0.1).buffer, Run(tmp_path, world, mode="colocate_async").buffer
    names = [[base.__name__ for base in type(buffer).__mro__] for buffer in (sync, later)]
    assert "ReplayBufferAsync" not in names[0]
    assert "ReplayBufferAsync" in names[1]
    assert (sync.poll_interval, later.poll_interval) == (0.1, 2.0)


def test_settings_out_of_range_are_refused():
    cases = [
        {"min_rollouts": 1},
        {"max_rollouts": 1},
        {"min_rollouts": -1},
        {"allocation": "fair"},
        {"estimator": "oracle"},
        {"success_threshold": float("nan")},
        {"max_rollouts": 8.5},
        {"max_rollouts": True},
        {"poll_interval": 0},
        {"log_allocations": "yes"},
    ]
    for wrong in cases:
        assert "got" in message_of(ValueError, VerlSettings.from_mapping, wrong), wrong


# -- command line ---------------------------------------------------------------------------------------------------


def test_the_printed_overrides_pass_the_checks(tmp_path, capsys):
    assert main(["verl-args", "--max-rollouts", "64", "--log-allocations", "--one-line"]) == 0
    given = parse_overrides(capsys.readouterr().out.split())
    launch = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8", "trainer.save_freq=5"]
    own = pick(given, "trainer.v1.sampler.sampler_kwargs")
    settings = VerlSettings.from_mapping(own)
    assert settings == VerlSettings(max_rollouts=64, log_allocations=True)
    everything = parse_overrides([*launch, *overrides(settings)])
    check_config(everything, settings)
    with pytest.raises(ValueError, match="the plug-in is only partly switched on"):
        check_config(parse_overrides(launch), settings)


def test_a_launch_is_checked_without_verl(capsys):
    launch = ["algorithm.adv_estimator=grpo", "data.train_batch_size=256", "actor_rollout_ref.rollout.n=8"]
    assert main(["verl-args", *launch, "actor_rollout_ref.actor.ppo_mini_batch_size=32"]) == 0
    assert main(["verl-args", *launch, "actor_rollout_ref.actor.ppo_mini_batch_size=48"]) == 2
    assert "pad to a multiple of 384" in capsys.readouterr().err
    assert main(["verl-args", "nonsense"]) == 2


def test_the_example_script_is_the_papers_setting(tmp_path):
    line = example.launch_line(tmp_path / "bin", "trainer.test_freq=-1", RUN="there", NODES="2")
    config = parse_overrides(line)
    settings = VerlSettings.from_mapping(pick(config, "trainer.v1.sampler.sampler_kwargs"))
    check_config(config, settings)
    found = {
        "prompts": pick(config, "data.train_batch_size"),
        "mean": pick(config, "actor_rollout_ref.rollout.n"),
        "most": settings.max_rollouts,
        "model": pick(config, "actor_rollout_ref.model.path"),
        "nodes": pick(config, "trainer.nnodes"),
        "own override": pick(config, "trainer.test_freq"),
        "run": pick(config, "trainer.default_local_dir"),
    }
    assert found == {
        "prompts": 256,
        "mean": 8,
        "most": 128,
        "model": "Qwen/Qwen2.5-Math-7B",
        "nodes": 2,
        "own override": -1,
        "run": "there",
    }
    uniform = parse_overrides(example.launch_line(tmp_path / "bin", VERL_ARGS="--allocation uniform"))
    assert pick(uniform, "trainer.v1.sampler.sampler_kwargs.allocation") == "uniform"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        example.launch_line(tmp_path / "bin", "actor_rollout_ref.actor.ppo_mini_batch_size=48")
    assert "pad to a multiple of" in caught.value.stderr


def test_the_example_script_keeps_one_row_of_each_prompt(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"prompt": [{"role": "user", "content": f"{k % 3}+1"}], "extra_info": {"index": f"id{k}"}} for k in range(9)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "raw.parquet")
    subprocess.run(
        ["bash", str(example.SCRIPT), "prepare", str(tmp_path / "raw.parquet")],
        env=os.environ
        | {"DATA": str(tmp_path / "made" / "unique.parquet")}
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    kept = parquet.read_table(tmp_path / "made" / "unique.parquet").to_pylist()
    assert kept == rows[:3]


def test_without_verl_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['verl'] = None\n"
        "try:\n    from knapsack_rl.verl import KnapsackCheckpoint\nexcept ImportError as error:\n    print(error)\n"
        "import knapsack_rl.verl.launch"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "knapsack-rl[verl]"' in done.stdout
