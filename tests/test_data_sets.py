"""Data sets by name: their rows and verifiers. Nothing is fetched; samples are in tests/data."""

import json
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from knapsack_rl.tasks import math_process
from knapsack_rl.tasks.countdown import MAX_EXPRESSION, arithmetic_value
from knapsack_rl.tasks.data import DataRequest
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


def test_an_answer_that_nothing_can_match_is_named_with_its_row(tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"prompt": "1?", "answer": "7"}\n{"prompt": "2?", "answer": "none"}\n')
    assert load(str(tmp_path / "qa.jsonl"), 2, 0).train[1]["answer"] == "none"
    with pytest.raises(ValueError, match=r"qa\.jsonl, row 2: gold must hold a number of .*, got 'none'"):
        load(str(tmp_path / "qa.jsonl"), 2, 0, verifier="number")


def test_the_json_number_0_is_an_answer(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "1-1?", "prompt": "1-1?", "answer": 0, "solution": ""}\n')
    for name in ("math", "dapo-math-17k"):
        assert load(name, 1, 0, path=str(tmp_path / "p.jsonl")).train[0]["answer"] == "0", name


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


def test_without_reasoning_gym_the_error_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r'pip install "knapsack-rl\[reasoning-gym\]"'):
        load("reasoning-gym:chain_sum")


def test_the_registry_names_what_the_help_names():
    from knapsack_rl.training.settings import TrainSettings

    text = TrainSettings.__dataclass_fields__["dataset"].metadata["help"]
    assert all(name in text for name in TASKS)
