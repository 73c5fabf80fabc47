"""Data sets by name: their rows and verifiers. Nothing is fetched; samples are in tests/data."""

import json
import re
import shutil
import sys
import time
from fractions import Fraction
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import hostile
from knapsack_rl.tasks import math_process
from knapsack_rl.tasks.countdown import MAX_EXPRESSION, arithmetic_value
from knapsack_rl.tasks.data import DataRequest
from knapsack_rl.tasks.gym_worker import value_of
from knapsack_rl.tasks.reasoning_gym import NO_PROBLEMS, PAID_FOR_ANY_TEXT, GymProcess
from knapsack_rl.tasks.registry import TASKS, load_data
from knapsack_rl.tasks.verifier import MAX_TEXT
from strategies import no_deadline

SAMPLES = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(name, train=4, held_out=2, **changes):
    return load_data(DataRequest(dataset=name, train_prompts=train, held_out_prompts=held_out, **changes))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewards(task, rows, completions):
    """The task's reward, called as a trainer calls it: with all columns of the rows."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return task.reward(prompts=[row["prompt"] for row in rows], completions=completions, **columns)


# -- What holds for every task -----------------------------------------------------------------------------------------

OFFLINE = {
    "arithmetic": {},
    "sums": {},
    "countdown": {},
    "gsm8k": {"path": str(SAMPLES / "gsm8k")},
    "math": {"path": str(SAMPLES / "math")},
    "reasoning-gym:chain_sum": {},
}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_task_gives_what_a_run_needs(name):
    pytest.importorskip("reasoning_gym") if name.startswith("reasoning") else None
    task = load(name, 6, 4, **OFFLINE[name])
    rows = [*task.train, *task.held_out]
    assert (len(task.train), len(task.held_out)) == (6, 4)
    assert all({"prompt", "answer", "prompt_id"} <= row.keys() for row in rows)
    assert len({row["prompt_id"] for row in rows}) == len({row["prompt"] for row in rows}) == 10
    datasets.Dataset.from_list(list(task.train))  # columns of one type each
    assert rewards(task, rows, [""] * 10) == [0.0] * 10
    assert task.max_completion_tokens > 0
    again = load(name, 6, 4, **OFFLINE[name])
    assert (again.train, again.held_out) == (task.train, task.held_out)


@pytest.mark.parametrize("name", ["arithmetic", "sums", "gsm8k", "math"])
def test_the_right_answer_of_a_task_is_right(name):
    if name == "math":
        pytest.importorskip("math_verify")
    task = load(name, 6, 4, **OFFLINE[name])
    wrap = {"math": "So it is \\boxed{%s}."}.get(name, "%s")
    completions = [wrap % row["answer"] for row in task.train]
    assert rewards(task, task.train, completions) == [1.0] * 6
    if name != "math":  # formulas that differ are compared in a worker process, see test_verifiers_by_name
        assert rewards(task, task.train, [text + "1" for text in completions]) == [0.0] * 6


def test_settings_that_mean_nothing_to_a_task_are_refused():
    for name in ("arithmetic", "sums", "countdown", "reasoning-gym:chain_sum"):
        for setting in ("config", "verifier", "answer_column"):
            spelled = {"config": "dataset_config"}.get(setting, setting)
            with pytest.raises(ValueError, match=rf"{spelled} does not apply to the data set '{name}', got 'number'"):
                load(name, **{setting: "number"})


def test_without_math_verify_a_data_set_that_needs_it_names_the_install_line(tmp_path, monkeypatch):
    (tmp_path / "qa.jsonl").write_text('{"prompt": "1?", "answer": "0.5"}\n')
    own = str(tmp_path / "qa.jsonl")
    monkeypatch.setattr(math_process.importlib.util, "find_spec", lambda name: None)
    for name, changes in [*((n, OFFLINE[n]) for n in ("gsm8k", "math")), (own, {"verifier": "number"})]:
        with pytest.raises(ImportError, match=r'pip install "knapsack-rl\[math\]"'):
            load(name, 1, 0, **changes)
    for name in ("arithmetic", "running-sums", "sums", "countdown", own):
        assert len(load(name, 1, 0).train) == 1, name


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_answer_that_nothing_can_match_is_named_with_its_row(tmp_path):
    pytest.importorskip("math_verify")
    own = write(tmp_path / "qa.jsonl", [{"prompt": "1?", "answer": "7"}, {"prompt": "2?", "answer": "none"}])
    assert load(own, 2, 0).train[1]["answer"] == "none"
    with pytest.raises(
        ValueError, match=r"holds 1 rows, .* 1 rows cannot be used: .*qa\.jsonl, row 2: gold must hold a "
    ):
        load(own, 2, 0, verifier="number")
    # what has digits and is no number is found by reading it
    own = write(tmp_path / "qa.jsonl", [{"prompt": "1?", "answer": "18 apples and 3 pears"}])
    with pytest.raises(ValueError, match=r"row 1: gold must be a number, got '18 apples and 3 pears' \(none of 1 rows"):
        load(own, 1, 0, verifier="number")


ODD_GOLDS = ["", None, " ", ["7"], {"is": 7}]


def test_rows_that_cannot_be_used_are_skipped_and_counted(tmp_path, caplog):
    pytest.importorskip("math_verify")
    odd = [{"problem": f"odd {k}?", "answer": gold, "solution": "none"} for k, gold in enumerate(ODD_GOLDS)]
    good = [{"problem": f"{k}?", "answer": str(k), "solution": "none"} for k in range(8)]
    mixed = [*good[:2], *odd[:2], *good[2:], *odd[2:]]
    path = write(tmp_path / "m.jsonl", mixed)
    task = load("math", 6, 2, path=path, template="{prompt}")
    assert sorted(row["prompt"] for row in [*task.train, *task.held_out]) == [f"{k}?" for k in range(8)]
    (record,) = caplog.records
    assert "5 of 13 rows of" in record.getMessage()
    assert [f"row {k}:" in record.getMessage() for k in (3, 4, 11, 12, 13)] == [True, True, True, False, False]
    with pytest.raises(
        ValueError, match=r"holds 8 rows, .* 5 rows cannot be used: .*row 3: the solution has no .*; \.\.\."
    ):
        load("math", 7, 2, path=path)
    with pytest.raises(ValueError, match=r"row 1: the solution has no .* \(none of 5 rows can be used\)"):
        load("math", 1, 0, path=write(tmp_path / "m.jsonl", odd))


def test_rows_of_a_file_that_cannot_be_used_are_skipped_and_counted(tmp_path, caplog):
    odd = [{"prompt": f"odd {k}?", "answer": gold} for k, gold in enumerate(ODD_GOLDS)]
    good = [{"prompt": f"{k}?", "answer": str(k)} for k in range(8)]
    path = write(tmp_path / "qa.jsonl", [*odd, {"answer": "5"}, {"prompt": " ", "answer": "5"}, *good])
    task = load(path, 3, 2)
    assert [(row["prompt"], row["prompt_id"]) for row in task.train] == [
        (f"{k}?", f"qa.jsonl:{k + 7}") for k in range(3)
    ]
    (record,) = caplog.records
    assert "7 of 12 rows of" in record.getMessage(), "rows after those that are used are not read"
    with pytest.raises(ValueError, match=r"no value in column 'answer'.*--answer-column.*none of 5 rows"):
        load(write(tmp_path / "odd.jsonl", odd), 1, 0)


def test_rows_of_dapo_math_that_cannot_be_used_are_skipped_and_counted(tmp_path, caplog):
    pytest.importorskip("math_verify")
    odd = [
        {"prompt": "1?", "reward_model": "{'ground_truth': '1'}"},
        {"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}},
        {"prompt": 5, "solution": "1"},
        {"prompt": "2?", "reward_model": {"ground_truth": None}},
    ]
    good = {"prompt": [{"role": "user", "content": "3?"}], "reward_model": {"ground_truth": 0}}
    (row,) = load("dapo-math-17k", 1, 0, path=write(tmp_path / "d.jsonl", [*odd, good]), template="{prompt}").train
    assert (row["prompt"], row["answer"]) == ("3?", "0")
    assert "4 of 5 rows of" in caplog.text


def test_rows_of_countdown_that_cannot_be_used_are_skipped_and_counted(tmp_path, caplog):
    good = {"nums": [44.0, "19", 35], "target": 98.0}
    odd = [{"nums": [1, "x"], "target": 3}, {"nums": [1.5, 2], "target": 3}, {"nums": 5, "target": 3}, {"nums": [1, 2]}]
    path = write(tmp_path / "c.jsonl", [*odd, good])
    (row,) = load("countdown", 1, 0, path=path).train
    assert (row["numbers"], row["answer"]) == ([44, 19, 35], "98")
    assert "4 of 5 rows of" in caplog.text
    assert "row 1: nums and target must be whole numbers, got [1, 'x'] and 3" in caplog.text


def test_boxes_without_braces_are_answers(tmp_path):
    pytest.importorskip("math_verify")
    solutions = {"a?": "It is $\\boxed 2$.", "b?": "So \\fbox{2}", "c?": "$\\boxed{2}$", "d?": "$\\boxed  {2}.$"}
    rows = [{"problem": problem, "solution": solution} for problem, solution in solutions.items()]
    task = load("math", 4, 0, path=write(tmp_path / "m.jsonl", rows))
    assert [row["answer"] for row in task.train] == ["2"] * 4
    assert rewards(task, task.train, ["\\boxed{2}", "\\boxed 2", "\\fbox{2}", "\\boxed{3}"]) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("verifier", "right"), [("exact", [1, 0, 1, 0, 1, 0]), ("math", [1, 0, 1, 1, 1, 0]), ("number", [1, 0, 1, 1, 1, 0])]
)
def test_answers_typed_as_numbers(tmp_path, verifier, right):
    """As JSON and CSV have them; 1 is 1.0 in a column that pandas made of floats."""
    pytest.importorskip("math_verify")
    golds = [0, 0, 1.0, 0.5, -3.0, 12]
    completions = ["0", "1", "1", "1/2", "-3", "-12"]
    for name in ("qa.jsonl", "qa.csv"):
        path = tmp_path / name
        if name == "qa.jsonl":
            write(path, [{"prompt": f"{k}?", "answer": gold} for k, gold in enumerate(golds)])
        else:
            path.write_text("prompt,answer\n" + "".join(f"{k}?,{gold}\n" for k, gold in enumerate(golds)))
        task = load(str(path), 6, 0, verifier=verifier)
        assert rewards(task, task.train, completions) == right, name
        datasets.Dataset.from_list(list(task.train))


def test_the_json_number_0_is_an_answer(tmp_path):
    pytest.importorskip("math_verify")
    for gold in (0, 0.0, "0"):
        path = write(tmp_path / "p.jsonl", [{"problem": "1-1?", "prompt": "1-1?", "answer": gold, "solution": ""}])
        for name in ("math", "dapo-math-17k"):
            task = load(name, 1, 0, path=path)
            assert task.train[0]["answer"] == "0", name
            assert rewards(task, task.train, ["\\boxed{0}"]) == [1.0], name


def test_only_reasoning_gym_takes_a_part_after_the_colon():
    with pytest.raises(ValueError, match="only reasoning-gym takes a part after the colon, got dataset 'gsm8k:easy'"):
        load("gsm8k:easy")


# -- GSM8K, MATH, DAPO: from a folder laid out as on the hub, or one file ----------------------------------------------


@pytest.mark.parametrize(("name", "question"), [("gsm8k", "question"), ("math", "problem")])
def test_a_folder_trains_on_its_training_split_and_holds_out_its_test_split(name, question):
    task = load(name, 20, 5, **OFFLINE[name], template="{prompt}")
    train = {row[question]: row["answer"] for row in lines(SAMPLES / name / "train.jsonl")}
    test = {row[question]: row["answer"] for row in lines(SAMPLES / name / "test.jsonl")}
    assert {row["prompt"] for row in task.train} <= train.keys()
    assert {row["prompt"] for row in task.held_out} <= test.keys()
    for row in task.train:
        mark, _, number = train[row["prompt"]].rpartition("#### ")
        assert row["answer"] == (f"#### {number}" if mark else number)
    # Mixed, in the same order for any number of prompts.
    assert [row["prompt"] for row in task.train] != list(train)[:20]
    assert load(name, 5, 2, **OFFLINE[name], template="{prompt}").train == task.train[:5]


def test_a_single_file_is_divided():
    task = load("gsm8k", 20, 10, path=str(SAMPLES / "gsm8k" / "train.jsonl"))
    assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.held_out}
    assert len(task.train) + len(task.held_out) == 30


def test_prompts_that_are_held_out_are_not_trained_on(tmp_path):
    rows = lines(SAMPLES / "gsm8k" / "train.jsonl")
    for split, kept in (("train", rows), ("test", rows[:10])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    task = load("gsm8k", 20, 10, path=str(tmp_path))
    assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.held_out}
    with pytest.raises(ValueError, match="gsm8k holds 20 rows for train_prompts, which is 21; lower it"):
        load("gsm8k", 21, 10, path=str(tmp_path))


def test_a_clone_of_a_hub_repository_has_configurations(tmp_path):
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            rows = lines(SAMPLES / "gsm8k" / f"{split}.jsonl")
            table = pa.Table.from_pylist([row | {"question": f"{config}: {row['question']}"} for row in rows])
            (tmp_path / config).mkdir(exist_ok=True)
            parquet.write_table(table, tmp_path / config / f"{split}-00000-of-00001.parquet")
    listed = [
        {"config_name": config, "data_files": [{"split": s, "path": f"{config}/{s}-*"} for s in ("train", "test")]}
        for config in ("main", "socratic")
    ]
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n# A card\n")
    for changes, config in (({}, "main"), ({"config": "socratic"}, "socratic")):
        task = load("gsm8k", 20, 5, path=str(tmp_path), **changes)
        assert all(row["prompt"].startswith(f"{config}: ") for row in [*task.train, *task.held_out])
        assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.held_out}


def test_the_template_is_put_around_the_prompt():
    plain = load("gsm8k", **OFFLINE["gsm8k"], template="{prompt}").train
    framed = load("gsm8k", **OFFLINE["gsm8k"], template="Q: {prompt}\nA:").train
    assert [row["prompt"] for row in framed] == [f"Q: {row['prompt']}\nA:" for row in plain]
    assert [row["prompt_id"] for row in framed] == [row["prompt_id"] for row in plain]


def test_math_takes_its_answer_from_the_solutions_last_box(tmp_path):
    pytest.importorskip("math_verify")
    rows = [
        {"problem": f"What is half of {k}?", "solution": rf"Not \boxed{{0}} but \boxed{{\frac{{{k}}}{{2}}}}."}
        for k in range(1, 7)
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load("math", path=str(tmp_path / "math.jsonl"))
    assert {row["answer"] for row in task.train} < {rf"\frac{{{k}}}{{2}}" for k in range(1, 7)}
    boxed = [f"\\boxed{{{row['answer']}}}" for row in task.train]
    assert rewards(task, task.train, boxed) == [1.0] * 4
    (tmp_path / "math.jsonl").write_text('{"problem": "?", "solution": "nothing boxed"}\n')
    with pytest.raises(ValueError, match=r"math\.jsonl, row 1: the solution has no \\boxed"):
        load("math", 1, 0, path=str(tmp_path / "math.jsonl"))


WRAPPED = [
    "Please solve the following math problem: {}. The assistant first thinks about the reasoning process step by step "
    "and then provides the user with the answer. Return the final answer in \\boxed{{}} tags, for example "
    "\\boxed{{1}}. Let's solve this step by step. ",
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".',
    "{}",
]


def test_dapo_math_is_unwrapped_and_rid_of_repetitions(tmp_path):
    pytest.importorskip("math_verify")
    problems = [f"Let $x = {k}$.\n\nFind $2x$." for k in range(8)]
    for wrapper in WRAPPED:
        rows = [
            {
                "prompt": [{"content": wrapper.format(problem), "role": "user"}],
                "reward_model": {"ground_truth": str(2 * k), "style": "rule"},
            }
            for k, problem in enumerate(problems)
        ]
        path = tmp_path / "train.parquet"
        parquet.write_table(pa.Table.from_pylist(rows + rows), path)
        task = load("dapo-math-17k", 6, 2, path=str(path), template="{prompt}")
        assert {row["prompt"] for row in [*task.train, *task.held_out]} == set(problems), wrapper
        boxed = [f"\\boxed{{{2 * problems.index(row['prompt'])}}}" for row in task.train]
        assert rewards(task, task.train, boxed) == [1.0] * 6, wrapper


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"openai/gsm8k could not be loaded: .*dataset_path"):
        load("gsm8k")
    with pytest.raises(OSError, match=r"somebody/questions could not be loaded"):
        load("somebody/questions")


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*nowhere"):
        load("gsm8k", path=str(tmp_path / "nowhere"))


def test_a_missing_column_is_named_with_its_row(tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n{"question": "2?", "reply": "2"}\n')
    with pytest.raises(
        ValueError, match=r"qa\.jsonl, row 2: no value in column 'answer'; columns are question, answer"
    ):
        load("gsm8k", 1, 1, path=str(tmp_path / "qa.jsonl"))


# -- Files and hub data sets with a column mapping ---------------------------------------------------------------------


def test_a_folder_in_hub_layout_is_a_data_set(tmp_path):
    shutil.copy(SAMPLES / "gsm8k" / "train.jsonl", tmp_path / "train.jsonl")
    task = load(str(tmp_path), prompt_column="question", verifier="number", template="{prompt} Answer:")
    rows = lines(SAMPLES / "gsm8k" / "train.jsonl")
    assert [row["prompt"] for row in task.train] == [f"{row['question']} Answer:" for row in rows[:4]]
    assert rewards(task, task.held_out, [f"It is {row['answer'].rpartition(' ')[2]}." for row in rows[4:6]]) == [
        1.0,
        1.0,
    ]


@pytest.mark.parametrize(
    ("verifier", "right"), [("auto", [1, 0, 0]), ("exact", [1, 0, 0]), ("number", [1, 1, 1]), ("math", [1, 1, 1])]
)
def test_verifiers_by_name(tmp_path, verifier, right):
    if verifier == "math":
        pytest.importorskip("math_verify")
    (tmp_path / "qa.jsonl").write_text('{"prompt": "1?", "answer": "0.5"}\n' * 3)
    task = load(str(tmp_path / "qa.jsonl"), 3, 0, verifier=verifier)
    assert rewards(task, task.train, ["0.5", "1/2", r"\boxed{\frac{2}{4}}"]) == right


def test_chat_messages_in_a_file_are_kept(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    (tmp_path / "qa.jsonl").write_text(json.dumps({"prompt": messages, "answer": "2"}) + "\n")
    assert load(str(tmp_path / "qa.jsonl"), 1, 0).train[0]["prompt"] == messages
    with pytest.raises(ValueError, match="prompt_template does not apply"):
        load(str(tmp_path / "qa.jsonl"), 1, 0, template="Q: {prompt}")


# -- sums --------------------------------------------------------------------------------------------------------------


def test_sums_are_right_and_differ():
    task = load("sums", 900, 100, template="{prompt}")
    found = {}
    for row in [*task.train, *task.held_out]:
        text = row["prompt"].removesuffix("=")
        operation = next(sign for sign in "+-*" if sign in text)
        left, right = (int(number) for number in text.split(operation))
        assert 1 <= left <= 99 and 1 <= right <= 99
        value = {"+": left + right, "-": left - right, "*": left * right}[operation]
        assert value >= 0
        found[text] = row["answer"]
        assert row["answer"] == str(value)
    assert len(found) == 1000
    assert load("sums", 900, 100).train[0]["prompt"] == "3+4=7\n12-5=7\n2*8=16\n" + task.train[0]["prompt"]
    with pytest.raises(ValueError, match="sums has 10000 problems"):
        load("sums", 10_000, 1)


def test_the_first_line_is_the_answer_to_a_sum():
    right = ["42", " 42\n5+5=10", "42.", [{"role": "assistant", "content": "42"}]]
    wrong = ["4 2", "42 43", "", "\n42", "forty-two", "٤٢", "9" * 5000, "-42", None]
    scores = load("sums").reward(completions=[*right, *wrong], answer=["42"] * 13)
    assert scores == [1.0] * len(right) + [0.0] * len(wrong)


# -- Countdown ---------------------------------------------------------------------------------------------------------


def _pairs(items):
    """All ways to join (value, text) items to one, by brute force."""
    if len(items) == 1:
        yield items[0]
        return
    for i in range(len(items)):
        for j in range(len(items)):
            if i != j:
                (a, s), (b, t) = items[i], items[j]
                rest = [items[k] for k in range(len(items)) if k not in (i, j)]
                joined = [(a + b, f"({s}+{t})"), (a - b, f"({s}-{t})"), (a * b, f"({s}*{t})")]
                if b:
                    joined.append((a / b, f"({s}/{t})"))
                for one in joined:
                    yield from _pairs([*rest, one])


def test_every_countdown_problem_can_be_solved_and_a_solution_is_right():
    task = load("countdown", 60, 0)
    assert {len(row["numbers"]) for row in task.train} == {2, 3, 4}
    for row in task.train:
        text = next(t for v, t in _pairs([(Fraction(n), str(n)) for n in row["numbers"]]) if v == int(row["answer"]))
        assert all(str(number) in row["prompt"] for number in [*row["numbers"], row["answer"]])
        given = [
            text,
            f"<answer> {text} = {row['answer']} </answer>",
            f"Let me see.\n{text}",
            f"{text}+0",
            row["answer"],
        ]
        scores = task.reward(completions=given, answer=[row["answer"]] * 5, numbers=[row["numbers"]] * 5)
        assert scores == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_countdown_from_a_file(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"nums": [44, 19, 35], "target": 98}\n')
    row = load("countdown", 1, 0, path=str(tmp_path / "c.jsonl")).train[0]
    assert (row["numbers"], row["answer"]) == ([44, 19, 35], "98")


def expressions():
    numbers = st.integers(0, 999).map(str)

    def grow(inner):
        return st.one_of(
            st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
            inner.map(lambda text: f"({text})"),
            inner.map(lambda text: f"(-{text})"),
        )

    return st.recursive(numbers, grow, max_leaves=12)


@no_deadline
@given(expressions())
def test_arithmetic_agrees_with_python(text):
    code = re.sub(r"[0-9]+", lambda number: f"F({int(number[0])})", text)
    try:
        expected = eval(code, {"F": Fraction, "__builtins__": {}})  # the oracle; the text is ours
    except ZeroDivisionError:
        expected = None
    assert arithmetic_value(text) == (expected if len(text) <= MAX_EXPRESSION else None)


def test_malformed_arithmetic_has_no_value():
    texts = [*("", "1+", "()", "(1", "1)", "2**3", "2//3", "1 2", "a", "__import__('os')", "1e3", "0x10", "1_000"),
             *("٣+1", "1.5+1", "5!", "+3", "1/0", "1/(2-2)", "(" * 5000 + "1" + ")" * 5000, "-" * 5000 + "1"),
             "9" * 5000]  # fmt: skip
    for text in texts:
        assert arithmetic_value(text) is None, text[:20]


def test_hostile_completions_cost_no_time():
    task = load("countdown", 1, 0)
    texts = ["(" * 10**6, "<answer>" * 10**5, "9" * (MAX_TEXT - 1), "<answer>" + "1+" * 40_000, "-" * 10**5]
    columns = {"answer": ["1"] * 5, "numbers": [[1]] * 5}
    assert task.reward(completions=texts, **columns) == [0.0] * 5


# -- reasoning-gym -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym")


def test_reasoning_gym_scores_with_its_own_verifier(gym):
    task = load("reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", 5, 1)
    rows = list(task.train)
    assert rewards(task, rows, [f"Well.<answer>{row['answer']}</answer>" for row in rows]) == [1.0] * 5
    assert rewards(task, rows, [row["answer"] for row in rows]) == [1.0] * 5
    near = [f"<answer>the sum is {row['answer']}</answer>" for row in rows]  # worth some hundredths to reasoning-gym
    assert rewards(task, rows, near) == [0.0] * 5
    for row in rows:
        left, sign, right = row["prompt"].partition(":")[2].partition("=")[0].split()
        assert len(left) == len(right) == 1
        assert int(row["answer"]) == int(left) + int(right) * (1 if sign == "+" else -1)


def test_reasoning_gym_refuses_unknown_tasks_and_knobs(gym):
    for name, message in [
        ("reasoning-gym:soduko", r"no task 'soduko'; name one as reasoning-gym:TASK: .*chain_sum"),
        ("reasoning-gym", r"no task ''"),
        ("reasoning-gym:chain_sum?terms=2", r"does not take the knobs 'terms=2'"),
        ("reasoning-gym:chain_sum?min_terms=0", r"does not take the knobs 'min_terms=0'"),
        ("reasoning-gym:chain_sum?seed=2", r"seed is not a knob"),
        ("reasoning-gym:chain_sum?min_terms", r"bad query field"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(name)


SILLY = [
    *("", " ", "abc", "1", "0", "-1", "2", "3", "10", "0.0", "0.5", "1/2", "1e400", "-1e400", "nan", "nan+nanj", "inf"),
    *("{}", "[]", "[[]]", "()", '""', '{"a": 1}', "[1, 2]", "[0]", "null", "None", "True", "False", "yes", "no", "N/A"),
    *(
        "A",
        "x",
        "I do not know.",
        ",",
        "-",
        "(",
        "0x0",
        "0 0",
        "0,0",
        "up",
        "²",
        "٣",
        "9" * 5000,
        "(" * 3000,
        "[" * 3000,
    ),
]


def share_paid(process, text):
    """The share of problems that an answer solves, of those whose own answer is another text."""
    others = [k for k, (_, answer) in enumerate(process.rows) if answer.lower() != text.lower()]
    return sum(process.holds(k, text) for k in others) / max(len(others), 1)


FAILING = ("prime_factorization", "boxnet", "game_of_life", "coin_flip", "complex_arithmetic", "string_insertion")


@pytest.mark.parametrize("name", [*FAILING, "puzzle24"])
def test_a_verifier_of_reasoning_gym_that_fails_gives_no_reward(gym, name):
    task = load(f"reasoning-gym:{name}", 4, 0)
    rows = task.train
    if name == "coin_flip":  # a probability below its tolerance is 0
        rows = [row for row in rows if float(row["answer"]) > 1e-4]
    for text in SILLY:
        scores = rewards(task, rows, [f"<answer>{text}</answer>"] * len(rows))
        own = [row["answer"] == text and name != "boxnet" for row in rows]
        assert scores == list(map(float, own)), (name, text)
    if name != "boxnet":  # which has many right answers and names none
        assert rewards(task, task.train, [row["answer"] for row in task.train]) == [1.0] * 4


def test_reasoning_gym_evaluates_no_answer(gym, tmp_path, monkeypatch):
    """Five tasks whose verifiers call eval on an answer, and one for each of sympy's evaluating parsers."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "string_insertion",
        "spiral_matrix",
        "binary_matrix",
        "n_queens",
        "countdown",
        "polynomial_multiplication",
    ):
        with GymProcess(name, 1, {}, seconds=60.0) as process:
            process.start()
            for text in hostile.CODE:
                assert not process.holds(0, text), (name, text)
            assert process.holds(0, process.rows[0][1]), name
    assert not list(tmp_path.iterdir())


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_judged(gym):
    with GymProcess("puzzle24", 1, {}) as process:
        process.start()
        started = time.monotonic()
        assert not process.holds(0, "9**9**9**9**9")
        assert not process.holds(0, "factorial(factorial(factorial(9)))")
        assert time.monotonic() - started < 20.0
        assert process.refused == 2
        assert process.holds(0, process.rows[0][1])


def test_problems_of_reasoning_gym_are_the_same_in_every_process(gym, monkeypatch):
    """Some tasks draw from sets, whose order differs from process to process."""
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(load("reasoning-gym:word_ladder", 6, 2).train)
    assert found[0] == found[1]


def test_tasks_that_pay_for_any_text_are_refused(gym):
    for name in PAID_FOR_ANY_TEXT:
        with pytest.raises(ValueError, match=f"reasoning-gym:{name} gives any text the full score"):
            load(f"reasoning-gym:{name}")
    with GymProcess(PAID_FOR_ANY_TEXT[0], 4, {}) as process:
        process.start()
        assert share_paid(process, "abc") == 1.0, "it no longer does: take it from the list"
    with pytest.raises(ValueError, match="composite needs settings that are not knobs"):
        load("reasoning-gym:composite")


NAMES_NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks with many right answers, whose problems name none or one in another form."""


@pytest.mark.slow
def test_no_task_of_reasoning_gym_pays_for_any_text(gym):
    from reasoning_gym.factory import DATASETS

    for name in sorted(set(DATASETS) - {*PAID_FOR_ANY_TEXT, *NO_PROBLEMS}):
        with GymProcess(name, 12, {}, seconds=20.0) as process:
            process.start()
            for text in SILLY:
                assert share_paid(process, text) <= 0.5, (name, text)
            if name not in NAMES_NO_ANSWER:
                right = [
                    process.holds(k, answer) for k, (_, answer) in enumerate(process.rows) if "Integral" not in answer
                ]
                assert all(right), name


def test_arithmetic_on_a_syntax_tree_is_that_of_python():
    for text in ("1+2*3", "-(4-6)/2", "2**10", "7*(3-(2+1))", "[1, [2, 3]]", "(0x1f << 3) - (0x10 >> 1)", "1.5e1"):
        assert value_of(text, {}) == eval(text), text  # the oracle; the text is ours
    code = [text for text in hostile.CODE if not text.startswith("'")]  # a text in quotes is a constant
    other = ["().__class__", "[x for x in (1,)]", "a", "print(1)", "1 if 1 else 2", "f'{1}'", "x:=1", "1;2", "*[1]"]
    for text in [*code, *other]:
        with pytest.raises((ValueError, SyntaxError)):
            value_of(text, {})


def test_without_reasoning_gym_the_error_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r'pip install "knapsack-rl\[reasoning-gym\]"'):
        load("reasoning-gym:chain_sum")


def test_the_registry_names_what_the_help_names():
    from knapsack_rl.training.settings import TrainSettings

    text = TrainSettings.__dataclass_fields__["dataset"].metadata["help"]
    assert all(name in text for name in TASKS)
