import contextlib
import dataclasses
import functools
import html
import json
import logging
import logging.handlers
import math
import os
import re
import shutil
import signal
import warnings
from collections import Counter
from itertools import product
from pathlib import Path

import datasets
import hypothesis
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

import knapsack_rl as kr
import tiny
from cases import message_of
from knapsack_rl.cli import main
from knapsack_rl.cli.display import Quiet
from knapsack_rl.metrics import PARTS
from knapsack_rl.report import RunLog
from knapsack_rl.runs.samples import read_samples
from knapsack_rl.runs.watch import WarningLog
from knapsack_rl.settings import AllocationSettings
from knapsack_rl.tasks import MAX_COMPLETION_TOKENS, base_model_path, make_splits
from knapsack_rl.training import evaluate
from knapsack_rl.training.data import load_task
from knapsack_rl.training.evaluate import held_out_accuracy
from knapsack_rl.training.noise import quiet_about_tied_weights, quiet_libraries
from knapsack_rl.training.run import train
from knapsack_rl.training.settings import TrainSettings, read_yaml, settings_from
from strategies import no_deadline

FIELDS = dataclasses.fields(TrainSettings)


@pytest.fixture(autouse=True)
def _on_the_cpu_and_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # equal to the last bit on the CPU only


@pytest.fixture
def plain_reports(monkeypatch):
    """Reports without plots, which take longer than the small runs."""
    monkeypatch.setattr("knapsack_rl.report.page.plot", lambda *_: "")


# -- Settings ----------------------------------------------------------------------------------------------------------

NO_NUMBERS = (math.nan, math.inf, -math.inf)
OUT_OF_RANGE = {
    "allocation": ["", "greedy", "Uniform"],
    "rollouts_per_prompt": [1, 0, -8, 129],
    "prompts_per_step": [0, -1, 2049],
    "steps": [0, -1],
    "rollout_limit": [-1],
    "success_threshold": ["inf", float("inf")],
    "seed": [-1],
    "train_prompts": [0, -1, 63],
    "held_out_prompts": [-1],
    "estimator": ["", "mean"],
    "estimator_settings": ["window", "prior=1", "window=x"],
    "value": ["", "gain"],
    "min_rollouts": [-1, 9],
    "max_rollouts": [3, 0, -1],
    "rounds": [0, 3, -1],
    "weighting": ["token"],
    "advantage": ["", "mean", "batch-std"],
    "budget_unit": ["", "seconds"],
    "replay": [-1],
    "skip_zero_advantages": ["", "yes"],
    "learning_rate": [0, -1e-3, *NO_NUMBERS],
    "updates_per_step": [0, -1, 3, 1024],
    "num_iterations": [0, -1],
    "loss_type": ["", "best"],
    "clip_low": [-0.1, *NO_NUMBERS],
    "clip_high": [-0.1, *NO_NUMBERS],
    "kl_coefficient": [-0.1, *NO_NUMBERS],
    "temperature": [0, -1, *NO_NUMBERS],
    "max_completion_tokens": [-1],
    "eval_every": [-1],
    "eval_samples": [0, -1],
    "save_every": [-1],
    "threads": [-1],
    "precision": ["", "float16", "bf16"],
    "lora_rank": [-1],
    "lora_alpha": [-1, 16],
    "rollouts_per_pass": [-1],
    "gradient_checkpointing": ["", "yes"],
    "vllm": ["", "on"],
    "vllm_memory": [0, -0.1, 1.1, *NO_NUMBERS],
    "verifier": ["", "sympy"],
    "prompt_template": ["Q:"],
    "chat": ["", "yes"],
}
ANY_VALUE = {
    *{"model", "dataset", "prompt_column", "answer_column", "report_to"},
    *{"vllm_server", "dataset_path", "dataset_config", "dataset_split", "feature_columns", "prior"},
}


def test_a_value_out_of_range_is_refused():
    for name, bad in OUT_OF_RANGE.items():
        for value in bad:
            message = message_of(ValueError, TrainSettings, **{name: value})
            shown = name if name != "updates_per_step" else "updates"
            assert shown in message and re.search(str(value), message), (name, value, message)


def test_a_value_of_another_type_is_refused():
    others = {
        "int": [1.0, "8", True, None, [8]],
        "float": ["1", True, None],
        "str": [1, None, True, b"a"],
        "NoneType": ["1", True, [1.0]],  # a number that need not be given
    }
    for spec in FIELDS:
        kind = type(spec.default).__name__
        for value in others[kind]:
            message = message_of(ValueError, TrainSettings, **{spec.name: value})
            wanted = "float" if kind == "NoneType" else kind
            assert message.startswith(f"{spec.name} must be {wanted}, got "), (spec.name, value, message)


def test_every_setting_was_given_a_bad_value():
    assert set(OUT_OF_RANGE) | ANY_VALUE == {spec.name for spec in FIELDS}


def test_edges_of_the_ranges_are_allowed():
    edges = {
        **{"rollouts_per_prompt": 2, "prompts_per_step": 1, "steps": 1, "train_prompts": 1, "held_out_prompts": 0},
        **{"min_rollouts": 2, "max_rollouts": 2, "updates_per_step": 2, "eval_every": 0, "eval_samples": 1},
        **{"save_every": 0, "threads": 0, "seed": 0, "clip_low": 0, "clip_high": 0, "kl_coefficient": 0},
    }
    found = TrainSettings(**edges)
    assert found.budget == 2
    assert {name: getattr(found, name) for name in edges} == edges


def test_whole_numbers_are_taken_for_floats():
    found = TrainSettings(temperature=1, learning_rate=2)
    assert isinstance(found.temperature, float)
    assert found == TrainSettings(temperature=1.0, learning_rate=2.0)


def test_budget_and_label():
    found = TrainSettings(allocation="paper", rollouts_per_prompt=6, prompts_per_step=10, seed=3)
    assert (found.budget, found.label) == (60, "paper-n6-seed3")


def test_the_settings_of_the_estimator_reach_the_allocator():
    found = TrainSettings(allocation="paper", estimator_settings=" window=4, minimum=2 ").make_allocator()
    assert found.estimator_name == "window"
    assert found.estimator.settings() == {"window": 4, "minimum": 2, "fallback": True}
    plain = TrainSettings(
        allocation="paper", estimator_settings="fallback=false", min_rollouts=1, value="nonzero-gradient"
    )
    found = plain.make_allocator()
    assert not found.estimator.fallback
    assert (found.min_rollouts, found.value) == (1, "nonzero-gradient")
    found = TrainSettings(estimator="empirical-bayes", estimator_settings="discount=1.0").make_allocator()
    assert found.estimator.discount == 1.0


def test_settings_are_given_by_name():
    with pytest.raises(TypeError):
        TrainSettings("knapsack")


@st.composite
def all_settings(draw):
    text = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["yes", "1e3", "~", "- a", "#", "a: b"])
    low, middle, high = sorted(draw(st.tuples(*[st.integers(2, 500)] * 3)))
    prompts = draw(st.integers(1, 300))
    positive = st.floats(0, 1e300, exclude_min=True, allow_subnormal=False)
    free = {
        **dict.fromkeys(("model", "dataset", "prompt_column", "answer_column", "report_to"), text),
        **dict.fromkeys(("learning_rate", "temperature"), positive),
        **{name: st.floats(0, 1) for name in ("clip_low", "clip_high", "kl_coefficient")},
        **{name: st.integers(0, 10**6) for name in ("held_out_prompts", "max_completion_tokens", "eval_every")},
        **{name: st.integers(0, 2**31) for name in ("save_every", "threads", "seed")},
        **{name: st.integers(1, 10**6) for name in ("steps", "eval_samples", "num_iterations")},
        **{spec.name: st.sampled_from(spec.metadata["choices"]) for spec in FIELDS if spec.metadata["choices"]},
        "updates_per_step": st.sampled_from([k for k in range(1, 9) if middle * prompts % k == 0]),
        "train_prompts": st.integers(prompts, 10**6),
    }
    given = {"min_rollouts": low, "rollouts_per_prompt": middle, "max_rollouts": high, "prompts_per_step": prompts}
    drawn = {name: draw(values) for name, values in free.items()}
    if drawn["allocation"] != "paper" and drawn["estimator"] not in ("window", "beta"):  # the others need a grid
        drawn["value"] = draw(st.sampled_from(["knapsack", "nonzero-gradient", "likelihood", "power-0.5-2"]))
    if drawn["budget_unit"] == "tokens":
        drawn["allocation"] = "knapsack"
        if drawn["estimator"] == "window":  # its fallback counts rollouts
            drawn["estimator"] = "beta"
    if drawn["allocation"] == "paper" or drawn["estimator"] in ("window", "beta"):
        drawn["advantage"] = draw(st.sampled_from(["auto", "group-mean", "group-std"]))
    return TrainSettings(**given, **drawn)


@hypothesis.settings(no_deadline, max_examples=50)
@given(settings=all_settings())
def test_settings_survive_yaml(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(settings.to_yaml(), encoding="utf-8")
    assert settings_from(read_yaml(path), str(path)) == settings
    assert list(read_yaml(path)) == [spec.name for spec in FIELDS]


def test_settings_are_the_same_whether_or_not_weighting_and_value_are_named():
    grpo, over_mean = TrainSettings(advantage="group-std"), TrainSettings()
    assert grpo.trains_like(TrainSettings(advantage="group-std", weighting="rollout", value="knapsack"))
    assert over_mean.trains_like(TrainSettings(weighting="prompt", value="likelihood-0.5"))
    assert not grpo.trains_like(TrainSettings(advantage="group-std", weighting="prompt"))
    assert not over_mean.trains_like(TrainSettings(weighting="rollout"))
    assert not over_mean.trains_like(TrainSettings(value="knapsack"))
    assert not grpo.trains_like(over_mean)
    assert not over_mean.trains_like(TrainSettings(seed=1))


def test_the_value_fits_the_advantage_where_none_is_named():
    assert TrainSettings().chosen_value() == "likelihood-0.5"
    assert TrainSettings(advantage="group-std").chosen_value() == "knapsack"
    assert TrainSettings(allocation="paper", feature_columns="").chosen_value() == "knapsack"
    assert TrainSettings(value="power-1-1").chosen_value() == "power-1-1"
    assert AllocationSettings.of(TrainSettings()).make_allocator().value == "likelihood-0.5"
    assert AllocationSettings.of(object()).make_allocator().value == "knapsack"


def test_the_advantage_fits_the_estimator_where_none_is_named():
    assert TrainSettings().chosen_advantage == "posterior-mean"
    assert TrainSettings(estimator="empirical-bayes", feature_columns="").chosen_advantage == "posterior-mean"
    assert TrainSettings(estimator="beta", feature_columns="", value="knapsack").chosen_advantage == "group-mean"
    assert TrainSettings(allocation="paper").chosen_advantage == "group-mean"
    assert TrainSettings(advantage="group-std").chosen_advantage == "group-std"
    assert TrainSettings().trains_like(TrainSettings(advantage="posterior-mean"))
    with pytest.raises(ValueError, match=r"needs an estimator with a posterior on a grid .* got WindowEstimator"):
        TrainSettings(allocation="paper", advantage="posterior-mean")


def test_unknown_settings_are_named_with_their_source():
    with pytest.raises(
        ValueError, match=r"^here: unknown settings a, step; known are advantage, allocation, answer_.*"
    ):
        settings_from({"step": 3, "a": 1, "steps": 3}, "here")
    with pytest.raises(ValueError, match=r"^here: steps must be >= 1, got 0$"):
        settings_from({"steps": 0}, "here")


# -- Task --------------------------------------------------------------------------------------------------------------


def test_the_generated_task():
    task = load_task(TrainSettings(train_prompts=20, held_out_prompts=10, prompts_per_step=4))
    splits = make_splits(train=20, held_out=10)
    assert [row["prompt"] for row in task.train] == [problem.prompt for problem in splits.train]
    assert [row["prompt"] for row in task.held_out] == [problem.prompt for problem in splits.held_out]
    assert task.max_completion_tokens == MAX_COMPLETION_TOKENS
    answers = [row["answer"] for row in task.train]
    assert task.reward(completions=answers, answer=answers) == [1.0] * 20
    assert task.reward(completions=["x" + answer for answer in answers], answer=answers) == [0.0] * 20


def test_every_seed_has_the_same_prompts():
    small = {"train_prompts": 12, "held_out_prompts": 6, "prompts_per_step": 4}
    first, second = load_task(TrainSettings(seed=0, **small)), load_task(TrainSettings(seed=1, **small))
    assert (first.train, first.held_out) == (second.train, second.held_out)


def test_the_generated_task_may_hold_out_nothing():
    task = load_task(TrainSettings(train_prompts=12, held_out_prompts=0, prompts_per_step=4))
    assert (len(task.train), len(task.held_out)) == (12, 0)


def test_the_longest_answer_can_be_set(question_file):
    assert load_task(TrainSettings(max_completion_tokens=9)).max_completion_tokens == 9
    assert load_task(question_settings(question_file, max_completion_tokens=9)).max_completion_tokens == 9


QUESTIONS = [{"question": f"What is {k} + 1?", "solution": f"{k + 1} apples", "source": "school"} for k in range(6)]


def write_rows(path, rows):
    """Write a table in the format that the path's suffix names."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(params=["jsonl", "json", "csv", "parquet"])
def question_file(request, tmp_path):
    return write_rows(tmp_path / f"qa.{request.param}", QUESTIONS)


def question_settings(path, **changes):
    return TrainSettings(
        **{"dataset": str(path), "prompt_column": "question", "answer_column": "solution", "prompts_per_step": 2}
        | {"train_prompts": 4, "held_out_prompts": 1}
        | changes
    )


def test_a_file_gives_its_first_rows_for_training_and_the_next_for_evaluation(question_file):
    task = load_task(question_settings(question_file))
    rows = [
        {"prompt": row["question"], "answer": row["solution"], "prompt_id": f"{question_file.name}:{k}"}
        for k, row in enumerate(QUESTIONS[:5])
    ]
    assert list(task.train) == rows[:4]
    assert list(task.held_out) == rows[4:]
    assert task.max_completion_tokens == 256


def test_columns_of_features_are_kept_from_a_file(question_file):
    task = load_task(question_settings(question_file, feature_columns=["source", "lacking"]))
    assert {row["source"] for row in (*task.train, *task.held_out)} == {"school"}
    assert "lacking" not in task.train[0]


def test_ids_of_a_file_are_kept(tmp_path):
    rows = [row | {"prompt_id": f"{k:03}x"} for k, row in enumerate(QUESTIONS)]
    task = load_task(question_settings(write_rows(tmp_path / "qa.csv", rows)))
    assert [row["prompt_id"] for row in task.train] == ["000x", "001x", "002x", "003x"]


def test_numbers_in_a_file_are_answers_too(tmp_path):
    rows = [{"question": k, "solution": k + 1} for k in range(5)]
    task = load_task(question_settings(write_rows(tmp_path / "qa.jsonl", rows)))
    assert [(row["prompt"], row["answer"]) for row in task.train[:2]] == [("0", "1"), ("1", "2")]


def test_answers_of_a_file_are_taken_as_they_are_written(tmp_path):
    # Each column holds what a reader might take for numbers, dates or booleans.
    columns = {"a": ["0964", "007"], "b": ["1.50", "1e3"], "c": ["True", "false"], "d": ["2024-01-01", "2024-01-02"]}
    rows = [{"question": f"{k}?"} | {name: values[k] for name, values in columns.items()} for k in range(2)]
    few = {"train_prompts": 2, "held_out_prompts": 0, "prompts_per_step": 1}
    for kind, (name, values) in product(("jsonl", "csv", "parquet"), columns.items()):
        settings = question_settings(write_rows(tmp_path / f"qa.{kind}", rows), answer_column=name, **few)
        assert [row["answer"] for row in load_task(settings).train] == values, (kind, name)


def test_answers_of_a_file_may_be_any_text(tmp_path):
    longest = "a b " * 40 + "c"
    answers = ["Paris", "-3.5", "x = 2", "é", longest]
    rows = [{"question": f"{k}?", "solution": answer} for k, answer in enumerate(answers)]
    task = load_task(question_settings(write_rows(tmp_path / "qa.jsonl", rows)))
    assert task.reward(completions=[f" {answer}\n" for answer in answers], answer=answers) == [1.0] * 5
    wrong = ["paris", "-3.50", "x =2", "e", longest + "c"]
    assert task.reward(completions=wrong, answer=answers) == [0.0] * 5


def test_a_file_with_too_few_rows_is_refused(question_file):
    load_task(question_settings(question_file, held_out_prompts=2))
    with pytest.raises(ValueError, match=r"holds 6 rows, but train_prompts \+ held_out_prompts is 7; lower them"):
        load_task(question_settings(question_file, held_out_prompts=3))


def test_a_missing_column_of_a_file_is_named(question_file):
    for name in ("prompt_column", "answer_column"):
        found = message_of(ValueError, load_task, question_settings(question_file, **{name: "text"}))
        assert re.search(rf"row 1: no column 'text'; columns are .*\(name another with {name}, --", found), name


def test_a_row_without_an_answer_is_skipped(tmp_path):
    for value in (None, ""):
        rows = [*QUESTIONS[:3], QUESTIONS[3] | {"solution": value}, *QUESTIONS[4:]]
        path = write_rows(tmp_path / "qa.jsonl", rows)
        task = load_task(question_settings(path))
        assert [row["prompt_id"] for row in [*task.train, *task.held_out]] == [f"qa.jsonl:{k}" for k in (0, 1, 2, 4, 5)]
        found = message_of(ValueError, load_task, question_settings(path, train_prompts=5))
        assert "qa.jsonl holds 5 rows" in found
        assert "qa.jsonl, row 4: no value in column 'solution'" in found, value


def test_a_missing_file_is_named(tmp_path):
    for name in ("missing.csv", "missing.jsonl", "missing.parquet"):
        found = message_of(FileNotFoundError, load_task, question_settings(tmp_path / name))
        assert re.search(rf"there is no (data )?file .*{name}", found), name


def test_a_malformed_file_is_refused(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "1?", "solution": "1"}\n{"question": "2?", \n')
    with pytest.raises(ValueError, match=r"qa\.jsonl"):
        load_task(question_settings(path))


# -- Held-out accuracy -------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"{k}+{k % 3}=", "answer": f"{k + k % 3}"} for k in range(12)]


class Answering(torch.nn.Module):
    """Answers from a table: always when greedy, with a probability that the dice decide when sampling."""

    def __init__(self, rows, probability=1.0):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.dropout = torch.nn.Dropout()
        self.tokenizer = tiny.tokenizer()
        self.answers = {row["prompt"]: row["answer"] for row in rows}
        self.probability = probability
        self.calls = []

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, do_sample, **options):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert torch.equal(attention_mask, (input_ids != pad_token_id).long())
        prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        right = [not do_sample or float(torch.rand(())) < self.probability for _ in prompts]
        texts = [self.answers[prompt] if good else "b" for prompt, good in zip(prompts, right, strict=True)]
        self.calls.append({"prompts": prompts, "texts": texts, "sampled": do_sample, "options": options})
        ids = [self.tokenizer(text)["input_ids"][:max_new_tokens] for text in texts]
        padded = [row + [pad_token_id] * (max_new_tokens - len(row)) for row in ids]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def exact(completions, answer, **_):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def accuracy_of(model, rows=ROWS, reward=exact, **changes):
    settings = {"samples": 3, "temperature": 0.8, "max_new_tokens": 4} | changes
    return held_out_accuracy(model, model.tokenizer, rows, reward, **settings)


def test_a_model_that_is_always_right_has_accuracy_one():
    found = accuracy_of(Answering(ROWS))
    assert (found.sampled, found.greedy) == (1.0, 1.0)


def test_accuracy_agrees_with_scoring_by_hand():
    wrong = [row | {"answer": "b" if k % 4 == 0 else row["answer"]} for k, row in enumerate(ROWS)]
    model = Answering(wrong, probability=0.6)
    found = accuracy_of(model)
    sampled, greedy = model.calls
    key = {row["prompt"]: row["answer"] for row in ROWS}
    assert Counter(sampled["prompts"]) == dict.fromkeys(key, 3)
    assert Counter(greedy["prompts"]) == dict.fromkeys(key, 1)
    hits = [key[prompt] == text for prompt, text in zip(sampled["prompts"], sampled["texts"], strict=True)]
    assert 0 < sum(hits) < 27
    assert found.sampled == sum(hits) / 36
    assert found.greedy == 9 / 12
    assert sampled["sampled"]
    assert sampled["options"] == {"temperature": 0.8, "top_k": 0, "top_p": 1.0}
    assert not greedy["sampled"]


def test_answers_longer_than_allowed_are_cut():
    assert accuracy_of(Answering(ROWS), max_new_tokens=1).greedy == sum(len(r["answer"]) == 1 for r in ROWS) / 12


def test_any_reward_above_zero_is_a_success():
    graded = accuracy_of(
        Answering(ROWS), reward=lambda completions, **_: [k / 10 - 0.5 for k in range(len(completions))], samples=1
    )
    assert graded.sampled == graded.greedy == 6 / 12


def test_batches_do_not_change_the_accuracy(monkeypatch):
    whole = accuracy_of(Answering(ROWS, probability=0.5))
    monkeypatch.setattr(evaluate, "BATCH", 5)
    model = Answering(ROWS, probability=0.5)
    assert accuracy_of(model) == whole
    assert [len(call["prompts"]) for call in model.calls] == [5] * 7 + [1] + [5, 5, 2]


def test_evaluating_leaves_no_trace_and_repeats():
    for training in (True, False):
        model = Answering(ROWS, probability=0.5).train(training)
        torch.manual_seed(11)
        before = torch.get_rng_state()
        first = accuracy_of(model)
        assert torch.equal(torch.get_rng_state(), before), training
        assert (model.training, model.dropout.training) == (training, training)
        torch.rand(7)
        assert accuracy_of(model) == first, training
        assert model.calls[:2] == model.calls[2:], training


def test_a_failing_evaluation_leaves_no_trace():
    def broken(**_):
        raise RuntimeError("no verdict")

    model = Answering(ROWS).train()
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no verdict"):
        accuracy_of(model, reward=broken)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


# -- Runs --------------------------------------------------------------------------------------------------------------

TIMES = {"seconds", "training_seconds", "step_time", *(f"knapsack/{part}_seconds" for part in PARTS)}


def settings_of(**changes):
    return TrainSettings(
        **{"prompts_per_step": 4, "rollouts_per_prompt": 4, "train_prompts": 8, "held_out_prompts": 8, "steps": 3}
        | {"eval_every": 2, "save_every": 2, "eval_samples": 2, "threads": 1, "num_iterations": 1}
        | changes
    )


class Watching(Quiet):
    """Keeps the rows, and interrupts this process when the given ones are shown."""

    def __init__(self, interrupt_at="", *signals):
        self.rows, self.begun, self.stopped = [], [], 0
        self.interrupt_at, self.signals = interrupt_at, signals or (signal.SIGINT,)

    def start(self, settings, first_step):
        self.begun.append((settings, first_step))

    def row(self, row):
        self.rows.append(row)
        if self.interrupt_at == f"{'loss' if 'loss' in row else 'evaluation'} {row['step']}":
            for number in self.signals:
                os.kill(os.getpid(), number)

    def stop(self):
        self.stopped += 1


@dataclasses.dataclass
class Done:
    settings: TrainSettings
    folder: Path
    outcome: object
    display: Watching


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains with some changed settings, each set of them once a module."""

    @functools.cache
    def run(**changes):
        settings, display = settings_of(**changes), Watching()
        folder = tmp_path_factory.mktemp("runs") / settings.label
        return Done(settings, folder, train(settings, folder, display), display)

    return run


ALLOCATIONS = ("knapsack", "paper", "uniform")  # the others share the code of these


@pytest.fixture(params=ALLOCATIONS)
def done(request, trained):
    return trained(allocation=request.param)


def check_covers(folder, settings):
    """Metrics and allocations hold every step, and the allocator what the allocations add up to."""
    metrics, steps = lines(folder / "metrics.jsonl"), list(range(1, settings.steps + 1))
    assert [row["step"] for row in metrics if "loss" in row] == steps
    assert all(row["rollouts"] == row["step"] * settings.budget for row in metrics)
    assert all(value is None or math.isfinite(value) for row in metrics for value in row.values())
    due = [step for step in (0, *steps) if step % settings.eval_every == 0 or step == settings.steps]
    assert [row["step"] for row in metrics if "held_out/accuracy" in row] == due
    for row in metrics:
        if "loss" in row:
            assert row["knapsack/budget"] == settings.budget
            assert 0 <= row["knapsack/effective_prompt_ratio"] <= 1
        else:
            assert 0 <= row["held_out/accuracy"] <= 1
            assert 0 <= row["held_out/greedy_accuracy"] <= 1

    allocations = lines(folder / "allocations.jsonl")
    assert [row["step"] for row in allocations] == steps
    rollouts, successes = Counter(), Counter()
    for row in allocations:
        assert sum(row["counts"]) == settings.budget
        assert len(row["prompt_ids"]) == settings.prompts_per_step
        assert min(row["counts"]) >= settings.min_rollouts
        assert row["scored"] == row["counts"]
        rollouts.update(dict(zip(row["prompt_ids"], row["counts"], strict=True)))
        successes.update(dict(zip(row["prompt_ids"], row["successes"], strict=True)))
    allocator = kr.KnapsackAllocator.load(folder / "allocator.npz")
    records = allocator.tracker.records()
    assert dict(zip(allocator.tracker.prompt_ids, records.rollouts.tolist(), strict=True)) == rollouts
    outcomes = [recent.bit_count() for recent in records.recent.tolist()]
    assert dict(zip(allocator.tracker.prompt_ids, outcomes, strict=True)) == dict(successes)
    return metrics, allocations


def test_a_run_leaves_a_whole_folder(done):
    assert done.outcome.finished
    assert (done.outcome.folder, done.outcome.steps) == (done.folder, 3)
    assert yaml.safe_load((done.folder / "config.yaml").read_text()) == dataclasses.asdict(done.settings)
    metrics, allocations = check_covers(done.folder, done.settings)
    if done.settings.allocation == "uniform":
        assert all(row["counts"] == [4] * 4 for row in allocations)
    held_out = {problem.prompt_id for problem in make_splits(train=8, held_out=8).held_out}
    assert held_out.isdisjoint(prompt for row in allocations for prompt in row["prompt_ids"])
    assert done.display.rows == metrics
    assert done.display.begun == [(done.settings, 0)]
    assert done.display.stopped == 1


def test_the_grade_of_the_shipped_task_is_a_feature(done):
    shared = kr.KnapsackAllocator.load(done.folder / "allocator.npz").shared
    if done.settings.allocation == "paper":  # its window cannot share
        assert shared is None
        return
    assert shared.features.names == ["digits"]
    grade = {problem.prompt_id: problem.digits for problem in make_splits(train=8, held_out=8).train}
    rows = lines(done.folder / "allocations.jsonl")
    ids = list(dict.fromkeys(prompt_id for row in rows for prompt_id in row["prompt_ids"]))
    codes = shared.features.codes(ids)[:, 0].tolist()
    by_code = {}
    for prompt_id, code in zip(ids, codes, strict=True):
        assert by_code.setdefault(code, grade[prompt_id]) == grade[prompt_id]
    assert len(by_code) == len(set(by_code.values())) > 1


def test_a_feature_that_the_data_lack_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"columns of the data set, .*'digits'.*got \['topic'\]"):
        train(settings_of(feature_columns="topic"), tmp_path / "run", Watching())


def test_metrics_and_allocations_agree(done):
    metrics = [row for row in lines(done.folder / "metrics.jsonl") if "loss" in row]
    for row, step in zip(metrics, lines(done.folder / "allocations.jsonl"), strict=True):
        assert row["reward"] == pytest.approx(sum(step["successes"]) / done.settings.budget)
        assert row["knapsack/effective_prompt_ratio"] == pytest.approx(np.mean(step["effective"]))
        assert row["knapsack/budget_max"] == max(step["counts"])


def test_the_trained_model_and_the_report_are_there(done):
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    task = load_task(done.settings)
    found = held_out_accuracy(
        model, tokenizer, task.held_out, task.reward, samples=2, temperature=1.0, max_new_tokens=MAX_COMPLETION_TOKENS
    )
    last = [row for row in lines(done.folder / "metrics.jsonl") if "held_out/accuracy" in row][-1]
    assert found.greedy == last["held_out/greedy_accuracy"]
    assert found.sampled == last["held_out/accuracy"]
    assert done.outcome.report == done.folder / "report.html"
    assert f"Training run {done.folder.name}" in done.outcome.report.read_text(encoding="utf-8")
    log = RunLog.load(done.folder)
    assert log.finished
    assert log.cumulative_rollouts.tolist() == [16, 32, 48]


def test_training_changes_the_model(done):
    stages = [base_model_path(), done.folder / "checkpoint-2", done.folder / "model"]
    assert len({tiny.fingerprint(AutoModelForCausalLM.from_pretrained(stage)) for stage in stages}) == 3


@pytest.mark.usefixtures("plain_reports")
def test_the_same_seed_gives_the_same_metrics(trained, tmp_path):
    first = trained(allocation="knapsack")
    display = Watching()
    train(first.settings, tmp_path / "again", display)
    assert without_times(display.rows) == without_times(first.display.rows)


@pytest.fixture(params=["updates_per_step", "num_iterations"])
def two_updates(request, trained, plain_reports):
    return trained(allocation="knapsack", **{request.param: 2})


def test_several_updates_on_a_steps_rollouts_are_one_step(two_updates):
    check_covers(two_updates.folder, two_updates.settings)
    assert (two_updates.outcome.steps, two_updates.outcome.finished) == (3, True)
    state = json.loads((two_updates.folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert sorted(path.name for path in two_updates.folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_folder_that_holds_a_run_is_refused(trained, capsys):
    run = trained(allocation="uniform")
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with pytest.raises(FileExistsError, match="already holds a run; delete it, or choose another folder"):
        train(run.settings, run.folder, Quiet())
    assert main(["train", "--quiet", "--output", str(run.folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


@pytest.mark.usefixtures("plain_reports")
@pytest.mark.parametrize(
    ("updates", "interrupt_at", "save_every", "signals"),
    [
        ({}, "loss 1", 2, ["SIGINT"]),
        ({"updates_per_step": 2}, "loss 1", 0, ["SIGINT"]),
        ({"updates_per_step": 2}, "evaluation 0", 0, ["SIGTERM", "SIGTERM"]),  # before the first of two updates
        ({"num_iterations": 2}, "loss 1", 0, ["SIGTERM"]),
    ],
)
def test_an_interrupted_run_continues_as_if_nothing_had_happened(
    trained, tmp_path, updates, interrupt_at, save_every, signals
):
    straight = trained(allocation="knapsack", **updates)
    settings = dataclasses.replace(straight.settings, save_every=save_every)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    display = Watching(interrupt_at, *(signal.Signals[name] for name in signals))
    outcome = train(settings, tmp_path, display)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (outcome.finished, outcome.steps, display.stopped) == (False, 1, 1)
    assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{settings.updates}"]
    assert "unfinished" in outcome.report.read_text(encoding="utf-8")

    display = Watching()
    outcome = train(settings, tmp_path, display, resume=True)
    assert (outcome.finished, outcome.steps) == (True, 3)
    assert display.begun == [(settings, 1)]
    metrics, _ = check_covers(tmp_path, settings)
    assert without_times(metrics) == without_times(straight.display.rows)
    assert "unfinished" not in outcome.report.read_text(encoding="utf-8")


def test_the_command_line_interrupts_and_resumes(trained, tmp_path, monkeypatch, capsys):
    straight = trained(allocation="knapsack")
    monkeypatch.setattr("knapsack_rl.cli.display.make_display", lambda quiet: Watching("loss 2"))
    (tmp_path / "mine.yaml").write_text(straight.settings.to_yaml())
    folder = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "mine.yaml"), "--output", str(folder)]) == 130
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == (f"interrupted after step 2; continue with: knapsack-rl train --resume {folder}")
    monkeypatch.undo()
    assert main(["train", "--resume", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "knapsack-n4-seed0: 3 steps of 16 rollouts"
    assert out[-2].startswith("trained 3 steps in ")
    assert out[-1] == f"report: {folder / 'report.html'}"
    check_covers(folder, straight.settings)


def test_a_second_interruption_stops_at_once_and_leaves_nothing_to_resume(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    settings, display = (
        settings_of(allocation="uniform", held_out_prompts=1),
        Watching("loss 1", signal.SIGINT, signal.SIGINT),
    )
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path, display)
    assert display.stopped == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert [row["step"] for row in display.rows] == [0, 1]
    (tmp_path / "checkpoint-1").mkdir()  # begun, but without the file that is written last
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint to resume from"):
        train(settings, tmp_path, Quiet(), resume=True)


@pytest.mark.usefixtures("plain_reports")
def test_a_run_whose_model_was_not_saved_is_finished_by_resuming(trained, tmp_path):
    run = trained(allocation="uniform")
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "model")
    display = Watching()
    outcome = train(run.settings, folder, display, resume=True)
    assert (outcome.finished, outcome.steps, display.rows) == (True, 3, [])
    ends = [AutoModelForCausalLM.from_pretrained(path / "model") for path in (run.folder, folder)]
    assert tiny.fingerprint(ends[0]) == tiny.fingerprint(ends[1])


@pytest.mark.usefixtures("plain_reports")
def test_your_own_model_and_file(tmp_path):
    tiny.model().save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    rows = [{"prompt": f"{k}+{k % 7}=", "answer": str(k % 10), "prompt_id": k} for k in range(10)]
    settings = settings_of(
        **{"model": str(tmp_path / "start"), "dataset": str(write_rows(tmp_path / "qa.jsonl", rows))},
        **{"train_prompts": 8, "held_out_prompts": 0, "max_completion_tokens": 1, "save_every": 0, "steps": 2},
    )
    outcome = train(settings, tmp_path / "run", Quiet())
    assert outcome.finished
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    allocations = lines(tmp_path / "run" / "allocations.jsonl")
    assert sorted(prompt for row in allocations for prompt in row["prompt_ids"]) == list(range(8))


def test_without_matplotlib_there_is_no_report(tmp_path, monkeypatch, caplog):
    def missing(folder):
        raise ImportError("plots need matplotlib")

    monkeypatch.setattr("knapsack_rl.training.run.write_report", missing)
    outcome = train(settings_of(steps=1, held_out_prompts=1), tmp_path, Quiet())
    assert outcome.finished
    assert outcome.report is None
    assert "no report was written: plots need matplotlib" in caplog.text


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    missing = tmp_path / "no-model"
    assert main(["train", "--quiet", "--model", str(missing), "--output", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("knapsack-rl: ")
    assert str(missing) in err
    assert "Traceback" not in err


# -- Files of a run for its readers -----------------------------------------------------------------------------------


def test_a_run_keeps_samples_of_its_prompts(done):
    samples = read_samples(done.folder / "samples.jsonl")
    seen = {prompt for row in lines(done.folder / "allocations.jsonl") for prompt in row["prompt_ids"]}
    assert {row["prompt_id"] for row in samples} == seen
    for row in samples:
        for kind, success in (("success", True), ("failure", False)):
            if kind in row:
                assert (row[kind]["text"] == row["answer"]) is success


def test_the_card_of_a_run_is_its_own(done):
    for folder in (done.folder, done.folder / "model"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "`arithmetic-base`, trained on `arithmetic` by GRPO" in text
        assert "3 of 3 steps" in text
        assert "fine-tuned version of" not in text


@pytest.mark.usefixtures("plain_reports")
def test_an_unfinished_run_has_a_card_that_says_so(trained, tmp_path):
    settings = trained(allocation="knapsack").settings
    train(settings, tmp_path, Watching("loss 2"))
    assert "**Not finished:** 2 of 3 steps" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("plain_reports")
def test_warnings_go_to_the_display_and_into_the_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("knapsack_rl.runs.watch.FEW_PROMPTS", 1.1)  # every share of prompts is below it
    monkeypatch.setattr(WarningLog.__init__, "__kwdefaults__", {"window": 2})

    class Warned(Watching):
        findings = ()

        def warn(self, finding):
            self.findings = (*self.findings, finding)

    display = Warned()
    train(trained(allocation="knapsack").settings, tmp_path / "run", display)
    rows = lines(tmp_path / "run" / "warnings.jsonl")
    assert [finding.kind for finding in display.findings] == [row["kind"] for row in rows]
    assert ("collapse", 2) in [(row["kind"], row["step"]) for row in rows]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(html.escape(row["remedy"]) in page for row in rows)


def test_the_output_of_libraries_is_turned_off_and_on_again():
    def state():
        return transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()

    before = state()
    with quiet_libraries():
        assert state() == (False, True)
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        with pytest.warns(FutureWarning, match="something else"):
            warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert state() == before
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)


def test_a_warning_of_the_hub_comes_once(caplog):
    hub = logging.getLogger("huggingface_hub")
    before = hub.propagate
    with quiet_libraries():
        hub.warning("shown by its own handler")
        assert caplog.records == []
    assert hub.propagate is before


def test_tied_weights_are_not_reported_as_missing():
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(3, 3, bias=False), "head": torch.nn.Linear(3, 3, bias=False)})
    trainer = logging.getLogger("transformers.trainer")

    def warnings_of(
        names, text="There were missing keys in the checkpoint model loaded: ", quiet=quiet_about_tied_weights
    ):
        heard = logging.handlers.BufferingHandler(capacity=10)  # caplog hears it once or twice, by release of pytest
        trainer.addHandler(heard)
        try:
            with quiet(model):
                trainer.warning(f"{text}{names}.")
        finally:
            trainer.removeHandler(heard)
        return len(heard.buffer)

    assert warnings_of(["head.weight"]) == 1  # a separate weight
    model["head"].weight = model["embed"].weight
    assert warnings_of(["head.weight"]) == 0
    assert warnings_of(["head.weight", "other.weight"]) == 1
    assert warnings_of(["head.weight"], "There were unexpected keys in the checkpoint model loaded: ") == 1
    assert warnings_of(["head.weight"], quiet=contextlib.nullcontext) == 1  # only while the body runs
