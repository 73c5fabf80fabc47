"""The loop for an accelerator: sampling and updates against plain torch, and its dry run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from experiments import catalogue, rows_file  # noqa: E402
from experiments.accelerator import __main__ as command  # noqa: E402
from experiments.accelerator import train  # noqa: E402
from experiments.accelerator.evidence import ACCELERATOR  # noqa: E402
from experiments.accelerator.policy import Policy, Rollouts  # noqa: E402
from experiments.contract import Options, seeds_of, select  # noqa: E402

SHARED = [4, 7, 3, 9, 5]
PROMPTS = [[*SHARED, *rest] for rest in ([2, 12], [3, 6, 8, 12], [7, 12], [9, 9, 9, 9, 12])]
END = 1


def policy(**settings):
    """A tiny random model with larger logits, so that its answers are not all alike."""
    model = tiny.model(seed=3)
    with torch.no_grad():
        model.lm_head.weight *= 8
    ends = [token == END for token in range(model.config.vocab_size)]
    return Policy(model, PROMPTS, ends, max_tokens=5, **{"learning_rate": 1e-2, **settings})


def plain_log_probabilities(model, prompt, answer):
    """Without batch, padding or cache."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    return torch.log_softmax(logits, -1)[torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]


def answers(rollouts):
    return [row[:length] for row, length in zip(rollouts.tokens.tolist(), rollouts.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("share", [True, False])
def test_log_probabilities_are_those_of_single_rows(share):
    one = policy(share_prefix=share)
    assert one.shared.tolist() == ([SHARED] if share else [[]])
    rollouts = one.sample(PROMPTS)
    found = one.log_probabilities(PROMPTS, rollouts)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers(rollouts), strict=True)):
        expected = plain_log_probabilities(one.model, prompt, answer)
        torch.testing.assert_close(found[row, : len(answer)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_samples_follow_the_softmax_and_greedy_answers_its_largest(share):
    one = policy(share_prefix=share)
    rows = 4000
    rollouts = one.sample([PROMPTS[1]] * rows + PROMPTS, [1.0] * rows + [0.0] * len(PROMPTS))
    expected = torch.softmax(one.model(torch.tensor([PROMPTS[1]])).logits[0, -1], -1).detach().numpy()
    observed = np.bincount(rollouts.tokens[:rows, 0].numpy(), minlength=expected.size) / rows
    assert np.abs(observed - expected).max() < 5 * np.sqrt(0.25 / rows)
    assert expected.max() < 0.9  # the comparison says something
    for prompt, answer in zip(PROMPTS, answers(rollouts)[rows:], strict=True):
        sequence = list(prompt)
        for token in answer:
            assert int(one.model(torch.tensor([sequence])).logits[0, -1].argmax()) == token
            sequence.append(token)


def test_an_answer_ends_with_its_end():
    one = policy()
    rollouts = one.sample(PROMPTS * 50)
    ended = 0
    for row, length in zip(rollouts.tokens.tolist(), rollouts.lengths.tolist(), strict=True):
        assert END not in row[: length - 1]
        assert row[length - 1] == END or length == 5
        assert set(row[length:]) <= {one.padding}
        ended += length < 5
    assert 0 < ended < 200
    assert rollouts.sampled.sum(1).tolist() == rollouts.lengths.tolist()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 256])
def test_an_update_is_that_of_a_plain_loop(share, skip, rows):
    one = policy(share_prefix=share, skip_rows=skip, rows_per_pass=rows)
    rollouts = one.sample(PROMPTS)
    advantages = torch.tensor([1.2, 0.0, -0.7, 0.0])

    plain = policy().model
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    terms = [
        advantage * plain_log_probabilities(plain, prompt, answer).sum()
        for advantage, prompt, answer in zip(advantages, PROMPTS, answers(rollouts), strict=True)
    ]
    (-sum(terms) / rollouts.lengths.sum()).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()

    assert one.update(PROMPTS, rollouts, advantages) == (2 if skip else 4)
    for (name, weight), expected in zip(one.model.named_parameters(), plain.parameters(), strict=True):
        # Adam's first step is almost the sign of the gradient: where that is nearly 0, rounding decides.
        surely = expected.grad.abs() > 1e-6
        torch.testing.assert_close(weight[surely], expected[surely], atol=1e-4, rtol=0, msg=name)


def test_without_an_advantage_nothing_changes():
    one = policy()
    before = [weight.clone() for weight in one.model.parameters()]
    assert one.update(PROMPTS, one.sample(PROMPTS), torch.zeros(4)) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))


def test_small_updates_of_short_weights_add_up():
    """A step of 1e-4 is lost in a bfloat16 weight near 1, twenty of them are not."""
    model = tiny.model(seed=3).to(torch.bfloat16)
    one = Policy(model, PROMPTS, [t == END for t in range(model.config.vocab_size)], max_tokens=5, learning_rate=1e-4)
    scale = model.model.norm.weight
    start = scale.clone()
    rollouts = one.sample(PROMPTS)
    one.update(PROMPTS, rollouts, torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert torch.equal(scale, start)
    for _ in range(40):
        one.update(PROMPTS, rollouts, torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert scale.dtype == torch.bfloat16
    assert (scale != start).any()


def test_rows_chosen_from_rollouts_lose_empty_columns():
    rollouts = Rollouts(torch.tensor([[5, 1, 1, 1], [5, 6, 7, 1]]), torch.tensor([2, 4]))
    assert rollouts.rows(torch.tensor([0])).tokens.tolist() == [[5, 1]]


# -- Runs --------------------------------------------------------------------------------------------------------------


def test_every_arm_of_a_seed_sees_the_same_batches():
    def first(arm, seed):
        trainer = train.Trainer(replace(train.QUICK, arm=arm, seed=seed), None, "cpu")
        batches = trainer.batches()
        return [[row["prompt_id"] for row in next(batches)] for _ in range(4)]

    one = first("uniform", 0)
    assert one == first("knapsack", 0) != first("uniform", 1)
    # 16 prompts, 8 a step: each once in two steps.
    assert sorted(one[0] + one[1]) == sorted(one[2] + one[3])
    assert len(set(one[0] + one[1])) == 16


def test_the_dry_run_measures_every_piece_and_nothing_twice(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--rows", str(file), "--workers", "1"]
    assert command.main(arguments) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["throughput"] * 4 + ["tuning"] * 4 + ["training"] * 5
    for row in rows:
        assert row["machine"]["device"] == "CPU"
        assert {"torch", "transformers", "knapsack_rl", "date"} <= set(row["machine"])
        assert set(row["seconds"]) == set(train.PARTS)
        assert min(row["seconds"].values()) >= 0 < max(row["seconds"].values())  # in milliseconds
    for row in rows[-5:]:
        curve, mean = row["evaluations"], {"uniform-2n": 8}.get(row["arm"], 4)
        assert curve["step"] == [0, 2, 4]
        assert curve["rollouts"] == [0, 2 * 8 * mean, 4 * 8 * mean]  # M N a step, whatever the allocation
        assert curve["seconds"][0] == 0 < curve["seconds"][-1]
        assert row["finished"]
        mixed = round(sum(r * 8 * mean for r in row["series"]["rollout_ratio"]))
        # Against what is expected, groups of equal outcomes have a gradient too.
        assert row["rows_updated"] == mixed or (row["arm"] == "recommended-plain-twice" and row["rows_updated"] > mixed)
    assert [row["arm"] for row in rows[-5:]] == list(command.ARMS)
    shared, all_rows = rows[3], rows[0]
    assert (all_rows["rows_updated"], shared["settings"]["share_prefix"]) == (1.0, True)
    assert shared["rows_updated"] < 1
    before = file.read_text()
    assert command.main(arguments) == 0
    assert file.read_text() == before
    assert capsys.readouterr().out.endswith("0 pieces left\n")


def test_what_does_not_fit_into_the_time_is_left(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert command.main(["--quick", "--rows", str(file), "--workers", "1", "--seconds", "0"]) == 1
    assert not file.exists()
    assert capsys.readouterr().out == "13 pieces left\n"
    row = train.train(train.QUICK, None, "cpu", until=0.0)
    assert (row["finished"], row["steps"]) == (False, 1)


def test_runs_that_were_cut_short_do_not_count(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    real, cut = command.train, []

    def sometimes_cut(settings, **rest):
        row = real(settings, **rest)
        if settings.arm == "knapsack" and not cut:
            cut.append(settings)
            row["finished"] = False
        return row

    monkeypatch.setattr(command, "train", sometimes_cut)
    monkeypatch.setattr(command, "measure_throughput", lambda settings, **rest: {
        "settings": vars(settings), "seconds_per_step": 1.0, "rollouts_per_second": 1.0})  # fmt: skip
    arguments = ["--quick", "--rows", str(file), "--workers", "1"]
    assert command.main(arguments) == 1
    assert '"arm": "knapsack"' not in file.read_text()
    assert '"arm": "knapsack"' in file.with_suffix(".unfinished").read_text()
    assert command.main(arguments) == 0
    assert file.read_text().count('"arm": "knapsack", "seed"') == 2  # of the row and of its settings


def test_a_piece_that_cannot_end_in_time_is_not_started(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(rows_file.time, "time", lambda: clock[0])
    measurement = command.Measurement(tmp_path / "rows.jsonl", None, "cpu", until=25.0, workers=1)

    def work(settings):
        clock[0] += 10.0
        return {"settings": vars(settings), "seconds_per_step": 1.0, "rollouts_per_second": 1.0}

    wanted = [replace(train.QUICK, seed=seed) for seed in range(4)]
    assert measurement.measure("throughput", wanted, work) == 2
    assert [row["settings"]["seed"] for row in measurement.rows("throughput")] == [0, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_piece_that_fails_leaves_the_others(tmp_path, capsys, workers):
    measurement = command.Measurement(tmp_path / "rows.jsonl", None, "cpu", float("inf"), workers)
    wanted = [replace(train.QUICK, seed=seed) for seed in range(3)]
    assert measurement.measure("throughput", wanted, fails_with_seed_1) == 1
    assert {row["settings"]["seed"] for row in measurement.rows("throughput")} == {0, 2}
    assert "out of memory" in capsys.readouterr().err


def fails_with_seed_1(settings):
    if settings.seed == 1:
        raise RuntimeError("out of memory")
    return {"settings": vars(settings), "seconds_per_step": 1.0, "rollouts_per_second": 1.0}


def test_the_plan_has_whole_seeds_first_and_tunes_on_another():
    plan = command.Plan()
    tuned = [
        run_row(run.arm, run.learning_rate, run.learning_rate * (3e-5 - run.learning_rate)) for run in plan.tuning()
    ]
    runs = plan.training(tuned)
    assert [(run.seed, run.arm) for run in runs[: len(command.ARMS) + 1]] == [(0, arm) for arm in command.ARMS] + [
        (1, "uniform")
    ]
    assert {run.mean for run in runs if run.arm == "uniform-2n"} == {16}
    assert {run.seed for run in plan.tuning()}.isdisjoint(plan.seeds)
    assert [(run.arm, run.learning_rate) for run in plan.tuning()] == [
        (arm, rate) for arm in ("uniform", "recommended-plain-twice") for rate in command.LEARNING_RATES
    ]
    assert len(plan.throughput()) == len(set(plan.throughput())) == 5
    assert {run.learning_rate for run in plan.throughput()} == {0.0}


def run_row(arm, rate, *accuracy):
    rollouts = [*range(1 + len(accuracy))]
    evaluations = {"rollouts": rollouts, "accuracy": [0.1, *accuracy]}
    return {"arm": arm, "settings": {"learning_rate": rate}, "evaluations": evaluations}


def test_the_learning_rate_is_the_one_that_was_best_on_the_way():
    uniform = {1e-5: (0.2, 0.5), 2e-5: (0.5, 0.4), 4e-5: (0.2, 0.1)}
    rows = [run_row("uniform", rate, *accuracy) for rate, accuracy in uniform.items()]
    last = [run_row("recommended-plain-twice", rate, value, value) for rate, value in ((1e-5, 0.6), (2e-5, 0.2))]
    assert command.chosen_rate(rows + last) == 2e-5
    assert command.chosen_rate(rows + last, "recommended-plain-twice") == 1e-5
    rates = {run.arm: run.learning_rate for run in command.Plan(learning_rates=(1e-5, 2e-5)).training(rows + last)}
    assert rates == dict.fromkeys(command.ARMS, 2e-5) | {"recommended-plain-twice": 1e-5}


def test_bad_arguments_are_named(tmp_path, capsys):
    rows = ["--rows", str(tmp_path / "rows.jsonl")]
    for more, message in (
        ([], "--model must name the folder"),
        (["--quick", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["--quick", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ):
        assert command.main([*rows, *more]) == 2
        assert message in capsys.readouterr().err


# -- Evidence ----------------------------------------------------------------------------------------------------------

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"


def test_rows_on_record_are_read_and_the_dry_run_needs_none(tmp_path, capsys):
    done = []
    record = Options(record=EVIDENCE, runs=tmp_path)
    rows = ACCELERATOR.measure(record, done.append)
    assert rows == catalogue.read("accelerator", EVIDENCE)
    with pytest.raises(FileNotFoundError, match="python -m experiments\\.accelerator --model FOLDER"):
        ACCELERATOR.measure(Options(record=tmp_path), done.append)
    dry = ACCELERATOR.measure(Options(quick=True, runs=tmp_path), done.append)
    assert len(done) == 2 * ACCELERATOR.pieces(record)
    assert {row["machine"]["device"] for row in dry} == {"CPU"}
    assert ACCELERATOR.findings(dry)
    assert set(ACCELERATOR.tables(dry)) == set(ACCELERATOR.tables(rows))


def test_tables_hold_whole_seeds_only():
    rows = catalogue.read("accelerator", EVIDENCE)
    assert seeds_of(rows) == 3
    compared = [row for row in rows if row["part"] == "training"]
    assert {(row["arm"], row["seed"]) for row in compared} == {(a, s) for a in ACCELERATOR.arms for s in range(3)}
    assert all(row["finished"] and row["steps"] == row["settings"]["steps"] for row in compared)
    assert {row["settings"]["learning_rate"] for row in compared} == {command.chosen_rate(select(rows, part="tuning"))}
    ends = [np.mean(row["evaluations"]["accuracy"][-3:]) for row in select(compared, arm="uniform")]
    assert ACCELERATOR.figures(rows)("uniform, accuracy at the end").startswith(f"{100 * np.mean(ends):.1f} % [")


def test_a_seed_that_was_cut_is_compared_where_both_runs_were():
    def row(arm, accuracy):
        return {"part": "cut", "arm": arm, "machine": {"device": "x"}, "evaluations": {"accuracy": accuracy}}

    rows = [row("uniform", [0.0, 0.1, 0.2, 0.3, 0.9]), row("knapsack", [0.0, 0.1, 0.1, 0.1])]
    assert ACCELERATOR.figures(rows)("cut seed") == "−10.0"
    assert ACCELERATOR.figures(rows[:1])("cut seed") == "–"
    assert ACCELERATOR.figures(rows)("learning rate") == "–"
