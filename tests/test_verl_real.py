"""verl itself, its own ``main_ppo`` with Ray and two training workers on a CPU; run by ``make test-verl``.

Everything is asserted on what verl computed: the recorder reads the rows of each step from verl's transfer queue.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed: make test-verl"),
]

if importlib.util.find_spec("verl") is not None:
    from knapsack_rl.allocator import KnapsackAllocator
    from knapsack_rl.runs.files import STATE_FILE, by_step
    from knapsack_rl.verl.launch import VerlSettings, overrides
    from verl_harness import launch
    from verl_harness.launch import MEAN, PROMPTS

STEPS = 6
DATA = 16  # prompts in two files: every prompt is seen three times in six steps
RECORDING = "trainer.checkpoint_callback_class=verl_harness.recorder.RecordingKnapsackCheckpoint"
EPSILON = 1e-6  # verl's, added to the deviation
MEMORY_OF_A_RUN = 9e9  # bytes; about twelve processes, each with torch and verl


def plugged_in(**settings):
    lines = overrides(VerlSettings(log_metrics="all", log_allocations=True, poll_interval=0.2, **settings))
    return [line for line in lines if "checkpoint_callback_class" not in line] + [RECORDING]


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    model = launch.material.make_model(folder / "model")
    # The two files number their prompts alike: only the source distinguishes them.
    train = [launch.material.make_data(folder / f"{name}.parquet", DATA // 2, source=name) for name in ("one", "two")]
    return model, train


def interrupted(folder, material):
    """Six steps with the plug-in, killed after the third and resumed, and the step of the kill."""
    pieces = "actor_rollout_ref.rollout.agent.num_workers=2"  # verl cuts each batch in two
    killed = launch.run(folder, *material, STEPS, *plugged_in(), pieces, kill_after=3)
    assert len(killed.recorded()) >= 3, killed.output[-6000:]
    before = killed.recorded()[-1]["step"]
    resumed = launch.run(folder, *material, STEPS, *plugged_in(), pieces)
    assert resumed.returncode == 0, resumed.output[-6000:]
    return resumed, before


def finished(folder, material, *more, steps=2):
    run = launch.run(folder, *material, steps, *more)
    assert run.returncode == 0, run.output[-6000:]
    assert len(run.recorded()) == steps
    return run


@pytest.fixture(scope="session")
def runs(material, tmp_path_factory):
    """All runs as futures, two at a time where memory allows: a run that starts its processes leaves a core idle."""
    import psutil  # comes with verl

    at_once = 2 if psutil.virtual_memory().available > 2 * MEMORY_OF_A_RUN else 1
    recording = "trainer.checkpoint_callback_class=verl_harness.recorder.RecordingCheckpoint"
    mode = ["trainer.v1.trainer_mode=colocate_async", "trainer.v1.colocate_async.num_warmup_batches=1"]
    small = [
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",  # of two GPUs; a mini-batch has 8 rows
    ]
    wrong = "actor_rollout_ref.actor.ppo_mini_batch_size=5"
    plans = {
        "knapsack": lambda folder: interrupted(folder, material),
        "stock": lambda folder: finished(folder, material, recording),
        "uniform": lambda folder: finished(folder, material, *plugged_in(allocation="uniform")),
        "asynchronous": lambda folder: finished(folder, material, *plugged_in(), *mode, steps=3),
        "tokens": lambda folder: finished(folder, material, *plugged_in(budget_unit="tokens"), *small, steps=4),
        "two rounds": lambda folder: finished(folder, material, *plugged_in(rounds=2), steps=3),
        "misconfigured": lambda folder: launch.run(folder, *material, 1, *plugged_in(), wrong),
    }
    with ThreadPoolExecutor(max_workers=at_once) as executor:
        yield {name: executor.submit(plan, tmp_path_factory.mktemp(name)) for name, plan in plans.items()}


@pytest.fixture(scope="session")
def knapsack(runs):
    return runs["knapsack"].result()


@pytest.fixture(scope="session")
def stock(runs):
    return runs["stock"].result()


@pytest.fixture(scope="session")
def uniform(runs):
    return runs["uniform"].result()


@pytest.fixture(scope="session")
def asynchronous(runs):
    return runs["asynchronous"].result()


@pytest.fixture(scope="session")
def tokens(runs):
    return runs["tokens"].result()


@pytest.fixture(scope="session")
def two_rounds(runs):
    return runs["two rounds"].result()


def by_prompt(line):
    groups = defaultdict(list)
    for row in line["rows"]:
        groups[row["prompt"]].append(row)
    return groups


def test_all_steps_ran_in_two_processes(knapsack):
    run, before = knapsack
    assert [line["step"] for line in run.recorded()] == list(range(1, STEPS + 1))
    assert len({line["pid"] for line in run.recorded()}) == 2
    assert 3 <= before < STEPS


def test_group_sizes_are_the_allocation_and_the_total_is_exact(knapsack):
    run, _ = knapsack
    # The killed process may have begun the step that the resumed one does again.
    for line, log in zip(run.recorded(), by_step(run.allocations()), strict=True):
        sizes = Counter(row["prompt"] for row in line["rows"])
        assert sizes == dict(zip(log["prompt_ids"], log["counts"], strict=True))
        assert sum(sizes.values()) == PROMPTS * MEAN
        assert min(sizes.values()) >= 2
        assert line["padding"] == 0
    assert len({tuple(sorted(Counter(row["prompt"] for row in line["rows"]).values())) for line in run.recorded()}) > 1


def test_the_allocation_is_that_of_an_allocator_that_saw_the_same_rewards(knapsack):
    """Also across the kill: an uninterrupted allocator, fed by what verl computed, gives the same counts."""
    run, _ = knapsack
    reference = KnapsackAllocator()
    for line in run.recorded():
        sizes = Counter(row["prompt"] for row in line["rows"])
        prompts = sorted(sizes)
        expected = reference.allocate(prompts, PROMPTS * MEAN).counts
        assert [sizes[prompt] for prompt in prompts] == expected.tolist(), line["step"]
        reference.observe([row["prompt"] for row in line["rows"]], [row["reward"] for row in line["rows"]])


def test_every_advantage_equals_an_independent_reference(knapsack, stock, asynchronous, tokens, two_rounds):
    ragged = 0
    runs = knapsack[0], stock, asynchronous, tokens, two_rounds
    for line in [line for run in runs for line in run.recorded()]:
        for rows in by_prompt(line).values():
            rewards = [row["reward"] for row in rows]
            mean = math.fsum(rewards) / len(rewards)
            spread = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
            for row in rows:
                expected = (row["reward"] - mean) / (spread + EPSILON)
                np.testing.assert_allclose(row["advantages"], expected, rtol=1e-5, atol=1e-6)
            ragged += spread > 0 and len(rows) != MEAN
    assert ragged > 3


def test_a_budget_in_tokens_varies_the_rollouts_and_pads_nothing(tokens):
    totals = []
    for line, log in zip(tokens.recorded(), tokens.allocations(), strict=True):
        sizes = Counter(row["prompt"] for row in line["rows"])
        assert sizes == dict(zip(log["prompt_ids"], log["counts"], strict=True))
        assert min(sizes.values()) >= 2 and line["padding"] == 0
        totals.append(sum(sizes.values()))
    assert totals[0] == PROMPTS * MEAN  # uniform until lengths are known
    assert all(total % 16 == 0 for total in totals)
    assert tokens.metrics()[-1]["knapsack/allocation_failures"] == 0
    assert any("knapsack/expected_tokens" in metrics for metrics in tokens.metrics())


def test_a_second_round_completes_the_groups_of_the_first(two_rounds):
    for line, log in zip(two_rounds.recorded(), two_rounds.allocations(), strict=True):
        sizes = Counter(row["prompt"] for row in line["rows"])
        assert sizes == dict(zip(log["prompt_ids"], log["counts"], strict=True))
        assert sum(sizes.values()) == PROMPTS * MEAN and line["padding"] == 0
        rounds = Counter((row["prompt"], ".2_" in row["key"]) for row in line["rows"])
        assert {rounds[prompt, False] for prompt in sizes} == {2}
        equal = {p for p in sizes if len({r["reward"] for r in by_prompt(line)[p] if ".2_" not in r["key"]}) == 1}
        assert {prompt for prompt, second in rounds if second} <= (equal or sizes.keys())
    assert max(max(log["counts"]) for log in two_rounds.allocations()) > MEAN
    assert two_rounds.metrics()[-1]["knapsack/allocation_failures"] == 0


def test_uniform_allocation_equals_verl_without_the_plug_in(uniform, stock):
    for ours, theirs in zip(uniform.recorded(), stock.recorded(), strict=True):
        mine, reference = by_prompt(ours), by_prompt(theirs)
        assert mine.keys() == reference.keys()
        for prompt, rows in mine.items():
            key = lambda row: (row["response"], row["reward"])  # noqa: E731
            for row, other in zip(sorted(rows, key=key), sorted(reference[prompt], key=key), strict=True):
                assert key(row) == key(other)
                np.testing.assert_allclose(row["advantages"], other["advantages"], rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(uniform.metrics(), stock.metrics(), strict=True):
        for name in (
            "actor/grad_norm",
            "actor/pg_loss",
            "actor/entropy",
            "critic/rewards/mean",
            "response_length/mean",
        ):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_metrics_reach_verls_loggers(knapsack):
    metrics = knapsack[0].metrics()
    for name in ("effective_gradient_ratio", "effective_prompt_ratio", "budget", "allocation_failures", "prompts_seen"):
        assert f"knapsack/{name}" in metrics[-1]
    assert metrics[-1]["knapsack/budget"] == PROMPTS * MEAN
    assert metrics[-1]["knapsack/allocation_failures"] == 0
    assert metrics[-1]["knapsack/prompts_seen"] == DATA
    assert "knapsack/budget:" in knapsack[0].output  # the console logger


def test_a_resumed_run_continues_with_the_same_state(knapsack):
    run, before = knapsack
    assert f"allocator restored from {run.folder / f'global_step_{before}' / STATE_FILE}" in run.output
    # Replaying what verl computed gives the state of the last checkpoint, as if nothing had been killed.
    reference = KnapsackAllocator()
    for line in run.recorded():
        prompts = list(dict.fromkeys(row["prompt"] for row in line["rows"]))
        reference.allocate(prompts, PROMPTS * MEAN)
        reference.observe([row["prompt"] for row in line["rows"]], [row["reward"] for row in line["rows"]])
    saved = KnapsackAllocator.load(run.folder / f"global_step_{STEPS}" / STATE_FILE)
    ids = sorted(reference.tracker.prompt_ids)
    assert sorted(saved.tracker.prompt_ids) == ids
    for column in ("successes", "failures", "visits", "rollouts"):
        ours, expected = (getattr(a.tracker.lookup(ids), column) for a in (saved, reference))
        np.testing.assert_allclose(ours, expected, err_msg=column)
    assert before < STEPS


def test_advantages_of_verl_pass_the_conformance_test():
    import torch
    from verl.trainer.ppo import core_algos

    import knapsack_rl as kr

    def grpo(groups, rewards, function=core_algos.compute_grpo_outcome_advantage):
        scores = torch.tensor(rewards)[:, None]
        advantages, _ = function(scores.clone(), torch.ones_like(scores), index=np.array([str(g) for g in groups]))
        return advantages[:, 0].numpy()

    kr.check_engine(grpo, allow=("group of one",))
    with pytest.raises(AssertionError, match="group of one"):
        kr.check_engine(grpo)


def test_an_asynchronous_run_counts_and_observes_what_verl_trained_on(asynchronous):
    run = asynchronous
    rows = [row for line in run.recorded() for row in line["rows"]]
    sizes = [Counter(row["key"].split("_")[0] for row in line["rows"]) for line in run.recorded()]
    assert [len(groups) for groups in sizes] == [PROMPTS] * 3
    assert min(min(groups.values()) for groups in sizes) >= 2
    assert run.metrics()[-1]["knapsack/allocation_failures"] == 0
    saved = KnapsackAllocator.load(run.folder / "global_step_3" / STATE_FILE)
    trained = Counter(row["prompt"] for row in rows)
    solved = Counter(row["prompt"] for row in rows if row["reward"] > 0)
    ids = sorted(trained)
    assert sorted(saved.tracker.prompt_ids) == ids
    records = saved.tracker.lookup(ids)
    assert records.rollouts.tolist() == [trained[i] for i in ids]
    assert [int(outcomes).bit_count() for outcomes in records.recent] == [solved[i] for i in ids]


def test_a_configuration_error_stops_verl_before_a_worker_starts(runs):
    run = runs["misconfigured"].result()
    assert run.returncode != 0
    assert "pad to a multiple of" in run.output
    assert "(WorkerDict pid=" not in run.output  # verl's training workers
    assert run.recorded() == []
