from collections import Counter

import numpy as np
import pytest

import tiny
from trl_worker import CASES

TOLERANCE = 3e-7
QUICK = ["default", "none rewards", "gdpo", "steps per generation", "tokens"]


def launch(folder, cases):
    """Return what each of two processes saw, by case."""
    return tiny.on_two_processes("trl_worker.py", folder, *cases)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("slow"), [case for case in CASES if case not in QUICK])


@pytest.fixture(params=[c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def seen(request):
    """(case, what rank 0 saw, what rank 1 saw)."""
    ranks = request.getfixturevalue("quick" if request.param in QUICK else "slow")
    return request.param, ranks[0][request.param], ranks[1][request.param]


def test_two_processes_train_uniformly_as_the_stock_trainer_bit_for_bit(seen):
    case, *ranks = seen
    for rank in ranks:
        assert rank["stock"]["world"] == rank["uniform"]["world"] == 2
        assert rank["uniform"]["start"] == rank["stock"]["start"] == ranks[0]["stock"]["start"]
        assert rank["uniform"]["start"] != rank["uniform"]["end"]
        if not CASES[case].keys() & {"weighting", "advantage"}:
            assert rank["uniform"]["end"] == rank["stock"]["end"] == ranks[0]["stock"]["end"]
        assert rank["ragged"]["end"] == ranks[0]["ragged"]["end"] != rank["stock"]["end"]


def steps_of(ranks):
    """Per generation batch of a ragged run: the rows of both processes in rank order."""
    first, second = (rank["ragged"] for rank in ranks)
    assert len(first["batches"]) == len(first["watched"]) == len(second["batches"]) > 0
    for pair, watched in zip(
        zip(first["batches"], second["batches"], strict=True),
        zip(first["watched"], second["watched"], strict=True),
        strict=True,
    ):
        rows = {name: pair[0][name] + pair[1][name] for name in pair[0]}
        yield rows, watched[0]["advantages"] + watched[1]["advantages"], [one["logged"] for one in watched]


def test_ragged_advantages_equal_the_reference_across_processes(seen):
    case, *ranks = seen
    settings = CASES[case]
    straddling = 0
    for rows, advantages, logged in steps_of(ranks):
        half = len(rows["prompts"]) // 2
        straddling += rows["prompts"][half - 1] == rows["prompts"][half]
        sizes = Counter(rows["prompts"])
        assert len(set(sizes.values())) > 1, "the batch is not ragged"
        functions = settings.get("rewards", (tiny.digit_sum,))
        expected = tiny.reference_advantages(
            rows["prompts"],
            [function(completions=rows["completions"]) for function in functions],
            weights=settings.get("reward_weights"),
            scale=settings.get("scale_rewards", "group"),
            gdpo="multi_objective_aggregation" in settings,
            weighting="prompt" if settings.keys() & {"weighting", "advantage"} else "rollout",
            over_mean="advantage" in settings,
        )
        assert max(map(abs, expected)) > 0.1
        np.testing.assert_allclose(advantages, expected, rtol=0, atol=TOLERANCE)
        for everyone in logged:
            # TRL logs no more rows of a generation than the stock trainer makes.
            assert len(everyone) == min(len(expected), 24 if case == "tokens" else len(expected))
            np.testing.assert_allclose(everyone, expected[-len(everyone) :], rtol=0, atol=TOLERANCE)
    assert straddling >= 1, "no group straddles the processes"


def test_rows_and_observations_add_up_over_processes(seen):
    _, *ranks = seen
    known = dict.fromkeys(tiny.informed_allocator().tracker.prompt_ids, 16)
    log = ranks[0]["log"]
    assert log == ranks[1]["log"]
    rollouts = Counter(known)
    for record, (rows, _, _) in zip(log, steps_of(ranks), strict=True):
        assert Counter(rows["prompt_id"]) == dict(zip(record["prompt_ids"], record["counts"], strict=True))
        assert rows["answer"] == [f"answer of {prompt}" for prompt in rows["prompts"]]
        scored = [i for i, reward in zip(rows["prompt_id"], rows["rewards"], strict=True) if reward is not None]
        rollouts.update(scored)
        assert sum(record["scored"]) == len(scored)
    assert ranks[0]["ragged"]["rollouts"] == ranks[1]["ragged"]["rollouts"] == dict(rollouts)


def test_processes_end_with_the_same_allocator_state(seen):
    _, first, second = seen
    for kind in ("uniform", "ragged"):
        assert first[kind]["state"] == second[kind]["state"]
    assert first["uniform"]["state"] != first["ragged"]["state"]


def test_metrics_are_those_of_all_processes(seen):
    _, *ranks = seen
    steps = [row for row in ranks[0]["ragged"]["history"] if "knapsack/budget" in row]
    for row, (rows, _, _) in zip(steps, steps_of(ranks), strict=True):
        sizes = Counter(rows["prompts"])
        by_prompt = {}
        assert row["knapsack/budget"] == len(rows["prompts"])
        assert row["knapsack/budget_min"] == min(sizes.values())
        assert row["knapsack/budget_max"] == max(sizes.values())
        for prompt, reward in zip(rows["prompts"], rows["rewards"], strict=True):
            by_prompt.setdefault(prompt, []).append(reward)
        mixed = {p for p, given in by_prompt.items() if len({r for r in given if r is not None}) > 1}
        scored = [p for p, given in by_prompt.items() for r in given if r is not None]
        share = sum(prompt in mixed for prompt in scored) / len(scored)
        assert row["knapsack/effective_gradient_ratio"] == pytest.approx(share)


def test_cases_cover_both_processes(quick):
    for case in QUICK:
        one, two = (rank[case]["ragged"]["batches"][0]["completions"] for rank in quick)
        assert one != two
