"""Reading rewards of earlier runs: formats as their writers write them, and faulty files."""

from __future__ import annotations

import gzip
import json
import math
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from knapsack_rl.offline.reward_logs import RewardLog, read_reward_log
from knapsack_rl.offline.rollouts import READ_STEPS, ColumnNames, logged_again, read_rollouts
from knapsack_rl.report import read_run
from run_folders import write_rows, write_run
from strategies import no_deadline, ragged_groups

COLUMNS = ("step", "prompt", "totals", "successes", "effective")


def groups(log):
    """{(step, prompt id): (totals, successes, effective)}."""
    rows = zip(*(getattr(log, name).tolist() for name in COLUMNS), strict=True)
    return {(int(log.steps[s]), log.prompt_ids[p]): (n, k, e) for s, p, n, k, e in rows}


def table(path, columns):
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
        return path
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [",".join(columns), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


PLAIN = {"step": [2, 1, 1, 1, 2], "prompt_id": ["a", "a", "b", "a", "a"], "reward": [1, 0, 1, 1, 1]}


# -- summing up -------------------------------------------------------------------------------------------------------


@given(rows=ragged_groups(allow_nan=True))
def test_groups_are_those_of_a_dictionary(rows):
    """Row by row, with plain Python, against the arrays; the step is made from the row number."""
    steps = np.arange(rows.rewards.size) % 3
    if np.isnan(rows.rewards).all():
        with pytest.raises(ValueError, match=f"none of the {rows.rewards.size} rollouts has a reward"):
            RewardLog.from_rollouts(rows.groups.tolist(), steps.astype(float), rows.rewards)
        return
    log = RewardLog.from_rollouts(rows.groups.tolist(), steps.astype(float), rows.rewards)
    expected = {}
    for prompt, step, reward in zip(rows.groups.tolist(), steps.tolist(), rows.rewards.tolist(), strict=True):
        if not math.isnan(reward):
            expected.setdefault((step, prompt), []).append(reward)
    found = groups(log)
    assert found.keys() == expected.keys()
    for key, rewards in expected.items():
        assert found[key][:2] == (len(rewards), sum(reward > 0 for reward in rewards))
        assert found[key][2] == (not np.allclose(rewards, rewards[0], rtol=1e-6, atol=1e-12))
    assert log.unscored == int(np.isnan(rows.rewards).sum())
    assert log.graded == (len({r for rewards in expected.values() for r in rewards}) > 2)
    assert (np.diff(log.step) >= 0).all()
    assert (np.bincount(log.prompt) > 0).all()


def test_graded_rewards_go_through_the_threshold():
    log = RewardLog.from_rollouts(["a"] * 4, np.ones(4), np.array([0.2, 0.4, 0.6, 0.6]), success=0.5)
    assert groups(log) == {(1, "a"): (4, 2, True)}
    assert log.graded
    log = RewardLog.from_rollouts(["a"] * 4, np.ones(4), np.array([0.2, 0.4, 0.6, 0.6]), success=0.9)
    assert groups(log) == {(1, "a"): (4, 0, True)}  # differing rewards carry a gradient all the same


@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.1, 1 / 3, -0.2, 1e-3])
def test_a_reward_that_engines_hold_in_single_precision_is_not_above_its_own_threshold(threshold):
    """The truth is numpy's comparison of two float32, as engines hold rewards."""
    single = np.float32(threshold)
    near = [np.nextafter(single, np.float32(side)) for side in (-9, 9)]
    rewards = np.array([threshold, single, *near], dtype=np.float64)  # a log holds all digits
    log = RewardLog.from_rollouts(["a"] * 4, np.ones(4), rewards, success=threshold)
    assert log.successes.tolist() == [sum(np.float32(reward) > single for reward in rewards)] == [1]


def test_infinite_rewards_are_missing_ones_and_counted():
    rewards = np.array([1.0, -math.inf, math.inf, 0.0, math.nan])
    log = RewardLog.from_rollouts(list("aaabb"), np.ones(5), rewards)
    assert groups(log) == {(1, "a"): (1, 1, False), (1, "b"): (1, 0, False)}
    assert log.unscored == 3
    assert "2 infinite rewards were taken for missing" in log.notes


@pytest.mark.parametrize("step", [float("nan"), 1.5, float("inf")])
def test_a_step_is_a_whole_number(step):
    with pytest.raises(ValueError, match="the step of row 2 is"):
        RewardLog.from_rollouts(["a", "a"], np.array([1.0, step]), np.ones(2))


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_with_usual_names_are_read(suffix, tmp_path):
    log = read_reward_log(table(tmp_path / f"log.{suffix}", PLAIN))
    assert groups(log) == {(1, "a"): (2, 1, True), (1, "b"): (1, 1, False), (2, "a"): (2, 2, False)}
    assert log.steps.tolist() == [1, 2]
    assert log.notes == ("read prompt from column 'prompt_id', step from column 'step', reward from column 'reward'",)


def test_names_can_be_given(tmp_path):
    columns = {"t": [1, 1], "q": ["x", "x"], "good": [True, False], "reward": [9, 9]}
    log = read_reward_log(table(tmp_path / "log.jsonl", columns), ColumnNames("q", "t", "good"))
    assert groups(log) == {(1, "x"): (2, 1, True)}


def test_truth_in_a_csv_is_a_number(tmp_path):
    for text in ("True", "true", "TRUE"):
        columns = {"step": [1, 1], "id": ["x", "x"], "correct": [text, "False"]}
        assert groups(read_reward_log(table(tmp_path / "log.csv", columns))) == {(1, "x"): (2, 1, True)}, text


def test_empty_rewards_are_left_out(tmp_path):
    log = read_reward_log(table(tmp_path / "log.csv", PLAIN | {"reward": ["", 0, "nan", 1, 1]}))
    assert groups(log) == {(1, "a"): (2, 1, True), (2, "a"): (1, 1, False)}
    assert log.unscored == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "prompt_id",
            r"none of the usual columns for the prompt \(prompt_id, .*its columns are step, reward: .*--id-column",
        ),
        ("step", "none of the usual columns for the step .*its columns are prompt_id, reward: .*--step-column"),
        ("reward", "none of the usual columns for the reward .*its columns are step, prompt_id: .*--reward-column"),
    ],
)
def test_a_missing_column_is_named_with_those_found(missing, message, tmp_path):
    columns = {name: values for name, values in PLAIN.items() if name != missing}
    with pytest.raises(ValueError, match=message):
        read_reward_log(table(tmp_path / "log.jsonl", columns))


def test_a_wrong_name_is_named_with_those_found(tmp_path):
    path = table(tmp_path / "log.jsonl", PLAIN)
    with pytest.raises(ValueError, match="no column 'score'; its columns are step, prompt_id, reward"):
        read_reward_log(path, ColumnNames(reward="score"))


def test_text_for_a_reward_is_refused(tmp_path):
    with pytest.raises(ValueError, match="column 'reward', row 1: 'good' is not a number"):
        read_reward_log(table(tmp_path / "log.csv", PLAIN | {"reward": ["good"] * 5}))


def test_a_reward_named_by_its_function_is_found(tmp_path):
    """The columns of TRL's completions as a tracker exports them."""
    rows = {
        "step": [1, 1],
        "prompt": ["p", "p"],
        "completion": ["x", "y"],
        "accuracy_reward": [1, 0],
        "advantage": [1, -1],
    }
    assert groups(read_reward_log(table(tmp_path / "log.csv", rows))) == {(1, "p"): (2, 1, True)}
    both = table(tmp_path / "both.csv", rows | {"format_reward": [1, 1]})
    with pytest.raises(ValueError, match=r"none of the usual columns for the reward .*--reward-column"):
        read_reward_log(both)


def test_truth_values_and_messages_are_read_from_json(tmp_path):
    messages = [[{"role": "user", "content": "2+2"}], [{"content": "2+2", "role": "user"}]]
    columns = {"step": [1, 1], "prompt": messages, "correct": [True, False]}
    (total,) = read_reward_log(table(tmp_path / "log.jsonl", columns)).totals
    assert total == 2


def test_a_list_and_a_table_of_a_tracker_are_read_as_lines_are(tmp_path):
    lines = read_reward_log(table(tmp_path / "log.jsonl", PLAIN))
    rows = [dict(zip(PLAIN, row, strict=True)) for row in zip(*PLAIN.values(), strict=True)]
    exported = {"columns": list(PLAIN), "data": [list(row.values()) for row in rows], "ncols": 3}
    for content in (rows, exported):
        for indent in (None, 2):
            (tmp_path / "log.json").write_text(json.dumps(content, indent=indent))
            assert groups(read_reward_log(tmp_path / "log.json")) == groups(lines), (content, indent)


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv", "log.jsonl.gz", "log.jsonl", "log.parquet.gz"])
def test_compressed_files_are_known_by_their_content(name, tmp_path):
    plain = table(tmp_path / name.removesuffix(".gz"), PLAIN)
    expected = groups(read_reward_log(plain))
    content = plain.read_bytes()
    plain.unlink()
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert groups(read_reward_log(tmp_path / name)) == expected
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(content)  # some programs decompress a file and keep its name
        assert groups(read_reward_log(tmp_path / name)) == expected


def test_a_long_field_is_read(tmp_path):
    columns = PLAIN | {"completion": ["x" * 131_073] * 5}
    assert read_reward_log(table(tmp_path / "log.csv", columns)).totals.sum() == 5


def test_memory_is_bounded_by_the_chunk_and_not_by_the_log(tmp_path):
    import tracemalloc

    with (tmp_path / "log.jsonl").open("w") as file:
        for step in range(20):
            for row in range(1_000):
                entry = {"step": step, "prompt": f"{row % 10} {'p' * 1_000}", "reward": 1, "completion": "c" * 2_000}
                file.write(json.dumps(entry) + "\n")
    tracemalloc.start()
    log = read_reward_log(tmp_path / "log.jsonl")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert log.totals.sum() == 20_000
    assert most < 20_000_000  # the file has 62 million bytes


def test_reading_reports_its_progress(tmp_path):
    for step in range(7):
        verl_dump(tmp_path / "v", step, [(f"p{step % 2}", 1.0, True)] * (step + 1) * 40)
    shown = []
    read_reward_log(tmp_path / "v", done=shown.append)
    assert len(shown) == READ_STEPS


# -- what a killed writer leaves ---------------------------------------------------------------------------------------


def torn(path, expected, content):
    """Cut a log within its last row, at every byte; all other rows must be read, and the loss be said."""
    start = content.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start + 2, len(content.rstrip(b"\n"))):
        path.write_bytes(content[:end])
        log = read_rollouts(path)
        assert log.rewards.tolist() == expected, content[start:end]
        assert any("1 incomplete row was skipped" in note for note in log.notes), content[start:end]


def test_a_torn_last_line_is_skipped_and_said(tmp_path):
    rows = {"step": [1, 1, 2], "reward": [1, 0, 1], "prompt": ["é€", "é€", "é€ 😀"]}
    path = table(tmp_path / "log.jsonl", rows)
    lines = path.read_text(encoding="utf-8").splitlines()
    # json.dumps escapes; what other programs write does not
    content = "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in lines).encode()
    torn(path, [1.0, 0.0], content)


def test_a_torn_last_row_of_a_csv_is_skipped_and_said(tmp_path):
    path = tmp_path / "log.csv"
    content = "step,reward,prompt,completion\n1,1,é€,x\n1,0,é€,y\n2,1,é€ 😀,"
    torn(path, [1.0, 0.0], content.encode())


def test_compressed_data_that_end_early_lose_their_last_rows_only(tmp_path):
    dice = random.Random(0)
    rows = [{"step": k, "prompt": f"{dice.random()}", "reward": dice.randrange(2)} for k in range(2_000)]
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "log.jsonl.gz").write_bytes(content[: len(content) // 2])
    log = read_rollouts(tmp_path / "log.jsonl.gz")
    assert 400 < log.rewards.size < 1_600
    assert log.rewards.tolist() == [row["reward"] for row in rows][: log.rewards.size]
    assert any("compressed data end early" in note for note in log.notes)
    for damaged in (content[:20] + b"????" + content[24:], content[:-6] + b"??????"):
        (tmp_path / "log.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"log\.jsonl\.gz is damaged"):
            read_rollouts(tmp_path / "log.jsonl.gz")


def test_a_file_of_broken_lines_is_refused(tmp_path):
    good = json.dumps({"step": 1, "prompt": "p", "reward": 1}) + "\n"
    (tmp_path / "log.jsonl").write_text(good * 3 + "{'step': 1}\n" * 2)
    with pytest.raises(ValueError, match="line 4 is not valid JSON"):
        read_rollouts(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text(good * 200 + '{"step": 2, "pro' + good + good + '{"st')  # killed twice
    log = read_rollouts(tmp_path / "log.jsonl")
    assert log.rewards.size == 201
    assert any("2 incomplete rows were skipped: log.jsonl, line 201" in note for note in log.notes)


# -- a resumed run that appends to its log ----------------------------------------------------------------------------


@st.composite
def appended_logs(draw):
    """(rows as logged, rows of the run as if it had never been stopped); a row is (step, prompt, serial number)."""
    dice = random.Random(draw(st.integers(0, 2**32)))
    steps, prompts, group = draw(st.integers(4, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    batches = [[dice.randrange(12) for _ in range(prompts)] for _ in range(steps)]
    serial = iter(range(10**9))
    logged, kept, step, resumes = [], [], 1, draw(st.integers(0, 1 + steps // 10))
    for life in range(resumes + 1):
        last = steps if life == resumes else dice.randrange(max(step, 3), steps + 1)
        for now in range(step, last + 1):
            rows = [(now, prompt, next(serial)) for prompt in batches[now - 1] for _ in range(group)]
            logged += rows
            kept = [row for row in kept if row[0] < now] + rows
        step = dice.randrange(2, last)  # from a checkpoint before the last step
    return logged, kept


@no_deadline
@given(case=appended_logs())
def test_after_a_resume_the_later_rows_count(case):
    logged, kept = case
    steps, prompt, serial = (np.array(column) for column in zip(*logged, strict=True))
    assert serial[~logged_again(prompt, steps)].tolist() == [row[2] for row in kept]


def test_a_resumed_run_is_said(tmp_path):
    rows = [{"step": step, "prompt": p, "reward": 0} for step in range(1, 9) for p in "ab"]
    rows += [{"step": step, "prompt": p, "reward": 1} for step in range(6, 12) for p in "ab"]
    write_rows(tmp_path / "log.jsonl", rows)
    log = read_reward_log(tmp_path / "log.jsonl")
    assert log.totals.tolist() == [1] * 22
    assert log.successes.tolist() == [0] * 10 + [1] * 12
    assert any(
        "steps from 6 on were logged again after a resume: the later rows count, and 6 earlier rollouts were left out"
        in n
        for n in log.notes
    )


@pytest.mark.parametrize(
    "order",
    [
        lambda rows: random.Random(0).sample(rows, len(rows)),
        lambda rows: sorted(rows, key=lambda row: (row[1], row[0])),  # by prompt
        lambda rows: sorted(rows, key=lambda row: (row[2], row[0])),  # by number of the rollout, or by process
        lambda rows: sorted(rows, key=lambda row: row[0] + random.Random(str(row)).random() * 2),  # overtaking
        lambda rows: sorted(rows, key=lambda row: row[0] + (0.6 + row[2] / 9 if row[0] % 9 == 0 else 0) * 2),
        lambda rows: rows[::-1],
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_in_another_order_all_count(order, shuffled):
    dice = random.Random(1)
    rows = []
    for epoch in range(6):
        prompts = dice.sample(range(24), 24) if shuffled else list(range(24))
        for part in range(4):
            rows += [(4 * epoch + part + 1, p, k) for p in prompts[6 * part : 6 * part + 6] for k in range(4)]
    steps, prompt, _ = (np.array(column) for column in zip(*order(rows), strict=True))
    assert not logged_again(prompt, steps).any()


# -- verl -------------------------------------------------------------------------------------------------------------


def verl_dump(folder, step, rows):
    """One file as verl's trainer dumps it: N.jsonl with input, output, gts, score, step and extra reward fields."""
    folder.mkdir(exist_ok=True)
    lines = []
    for prompt, score, acc in rows:
        entry = {"input": prompt, "output": "so 4", "gts": "4", "score": score, "step": step, "acc": acc}
        lines.append(json.dumps(entry, ensure_ascii=False))
    (folder / f"{step}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_verl_dumps_are_read_in_order_of_step(tmp_path):
    verl_dump(tmp_path / "v", 10, [("user\n2+2=é?", 1.0, True), ("user\n2+2=é?", -1.0, False)])
    verl_dump(tmp_path / "v", 9, [("user\n2+2=é?", -1.0, True), ("other", -0.5, True)])
    log = read_reward_log(tmp_path / "v")
    assert log.steps.tolist() == [9, 10]
    assert groups(log) == {
        (9, "user\n2+2=é?"): (1, 0, False),
        (9, "other"): (1, 0, False),
        (10, "user\n2+2=é?"): (2, 1, True),
    }
    by_accuracy = read_reward_log(tmp_path / "v", ColumnNames(reward="acc"))
    assert by_accuracy.successes.tolist() == [1, 1, 1]


def test_a_dump_without_a_step_has_that_of_its_name(tmp_path):
    for step in (9, 10):
        rows = [{"input": "p", "output": "so 4", "score": float(step == 10)}] * 2
        write_rows(tmp_path / f"{step}.jsonl", rows)
    log = read_reward_log(tmp_path)
    assert groups(log) == {(9, "p"): (2, 0, False), (10, "p"): (2, 2, False)}
    assert "step from the names of the files" in log.notes[0]


@pytest.mark.parametrize("name", ["train_{}.jsonl", "step_{:04d}.csv", "completions_{}_5f3bda2c4108.table.json"])
def test_numbered_files_of_other_programs_are_one_log(name, tmp_path):
    for step in (2, 10):
        path, columns = tmp_path / name.format(step), {"prompt": ["p", "q"], "reward": [1, 0]}
        if path.suffix == ".json":
            data = [list(row) for row in zip(*columns.values(), strict=True)]
            path.write_text(json.dumps({"columns": list(columns), "data": data}))
        else:
            table(path, columns)
    assert groups(read_reward_log(tmp_path)) == {
        (step, prompt): (1, int(prompt == "p"), False) for step in (2, 10) for prompt in "pq"
    }


def test_compressed_dumps_are_read(tmp_path):
    verl_dump(tmp_path / "v", 3, [("p", 1.0, True), ("p", 0.0, True)])
    path = tmp_path / "v" / "3.jsonl"
    (tmp_path / "v" / "3.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert groups(read_reward_log(tmp_path / "v")) == {(3, "p"): (2, 1, True)}


# -- TRL --------------------------------------------------------------------------------------------------------------


def trl_file(folder, step, prompts, completions, rewards):
    """One file with the columns of TRL's GRPOTrainer.log: step, prompt, completion, reward functions, advantage."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"step": [step] * len(prompts), "prompt": prompts, "completion": completions}
    columns |= rewards | {"advantage": [0.0] * len(prompts)}
    parquet.write_table(pa.table(columns), folder / f"completions_{step:05d}.parquet")


@pytest.mark.parametrize("below", [".", "completions"])
def test_trl_completions_are_read(below, tmp_path):
    trl_file(tmp_path / below, 1, ["p", "p", "q", "q"], list("wxyz"), {"accuracy_reward": [1.0, 0.0, None, 1.0]})
    trl_file(tmp_path / below, 2, ["q", "q"], list("uv"), {"accuracy_reward": [1.0, 1.0]})
    log = read_reward_log(tmp_path)
    assert groups(log) == {(1, "p"): (2, 1, True), (1, "q"): (1, 1, False), (2, "q"): (2, 2, False)}
    assert log.unscored == 1


def test_conversations_are_prompts(tmp_path):
    one, other = [{"role": "user", "content": "2+2"}], [{"role": "user", "content": "3+3"}]
    answers = [[{"role": "assistant", "content": text}] for text in "abc"]
    trl_file(tmp_path, 1, [one, other, one], answers, {"reward": [1.0, 0.0, 0.0]})
    log = read_reward_log(tmp_path)
    assert log.totals.tolist() == [2, 1]
    assert json.loads(log.prompt_ids[0]) == one


def test_a_generation_that_trl_logs_again_counts_once(tmp_path):
    rewards = {"accuracy_reward": [1.0, 0.0]}
    trl_file(tmp_path, 2, ["p", "p"], ["a", "b"], rewards)
    trl_file(tmp_path, 4, ["p", "p"], ["a", "b"], rewards)
    trl_file(tmp_path, 6, ["p", "p"], ["a", "c"], rewards)
    log = read_reward_log(tmp_path)
    assert log.steps.tolist() == [2, 6]
    assert any(note.startswith("1 files repeat") for note in log.notes)
    assert any("every 4th step" in note for note in log.notes)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_files_with_missing_rewards_only_are_unscored_rollouts(missing, tmp_path):
    trl_file(tmp_path, 1, ["p", "p"], ["a", "b"], {"accuracy": [missing] * 2})
    with pytest.raises(ValueError, match="none of the 2 rollouts has a reward"):
        read_reward_log(tmp_path)
    trl_file(tmp_path, 2, ["p", "p"], ["c", "d"], {"accuracy": [1.0, 0.0]})
    trl_file(tmp_path, 3, ["p", "p"], ["e", "f"], {"accuracy": [missing] * 2})
    log = read_reward_log(tmp_path)
    assert groups(log) == {(2, "p"): (2, 1, True)}
    assert log.unscored == 4


def test_a_reward_function_that_skips_the_first_file_is_not_overlooked(tmp_path):
    """Functions for other tasks return None, so that their column starts empty."""
    trl_file(tmp_path, 1, ["p", "p"], ["a", "b"], {"maths": [1.0, 0.0], "code": [None, None]})
    trl_file(tmp_path, 2, ["q", "q"], ["c", "d"], {"maths": [None, None], "code": [1.0, 1.0]})
    with pytest.raises(ValueError, match=r"several columns may hold it \(maths, code\)"):
        read_reward_log(tmp_path)


def test_a_file_that_cannot_be_read_is_left_out_and_said(tmp_path):
    for step in (1, 2, 3):
        trl_file(tmp_path, step, ["p", "p"], [f"{step}", "b"], {"accuracy": [1.0, 0.0]})
    torn_file = tmp_path / "completions_00003.parquet"
    torn_file.write_bytes(torn_file.read_bytes()[:-30])  # killed while it was written
    log = read_reward_log(tmp_path)
    assert log.steps.tolist() == [1, 2]
    (note,) = [note for note in log.notes if note.startswith("not read: ")]
    assert "completions_00003.parquet is not a readable parquet file" in note
    parquet.write_table(pa.table({"text": ["x"]}), torn_file)
    assert any("no column 'prompt'; its columns are text" in note for note in read_reward_log(tmp_path).notes)
    with pytest.raises(ValueError, match=r"completions_00001\.parquet has no column 'mine'"):
        read_reward_log(tmp_path, ColumnNames(reward="mine"))


def test_the_other_files_of_a_folder_are_named(tmp_path):
    trl_file(tmp_path / "completions", 1, ["p", "p"], ["a", "b"], {"accuracy": [1.0, 0.0]})
    table(tmp_path / "rewards.csv", PLAIN)
    for other in ("config.json", "trainer_state.json", "metrics.jsonl", "README.md"):  # of a model or a run
        (tmp_path / other).write_text("{}")
    log = read_reward_log(tmp_path)
    assert log.notes[1] == "read completions_00001.parquet; other files of the folder were not read: rewards.csv"
    write_run(tmp_path, steps=3)
    assert read_reward_log(tmp_path).notes == (
        "read allocations.jsonl; other files of the folder were not read: completions/, rewards.csv",
    )


def test_a_folder_with_several_logs_is_refused_with_their_names(tmp_path):
    for kind in ("train", "eval"):
        for step in (1, 2):
            table(tmp_path / f"{kind}_{step}.jsonl", PLAIN)
    with pytest.raises(
        ValueError, match=r"several logs: eval_\*\.jsonl \(2 files\), train_\*\.jsonl \(2 files\); name one"
    ):
        read_reward_log(tmp_path)


def test_a_folder_with_one_table_is_that_table(tmp_path):
    path = table(tmp_path / "rewards.csv", PLAIN)
    (tmp_path / "config.json").write_text("{}")
    assert groups(read_reward_log(tmp_path)) == groups(read_reward_log(path))


def test_several_reward_functions_need_a_choice(tmp_path):
    trl_file(tmp_path, 1, ["p", "p"], ["a", "b"], {"format": [1.0, 1.0], "accuracy": [0.0, 1.0]})
    with pytest.raises(
        ValueError, match=r"unclear: several columns may hold it \(format, accuracy\); name it with --reward-column"
    ):
        read_reward_log(tmp_path)
    assert read_reward_log(tmp_path, ColumnNames(reward="accuracy")).successes.tolist() == [1]


def test_completions_without_a_number_are_refused(tmp_path):
    trl_file(tmp_path, 1, ["p"], ["a"], {"remark": ["fine"]})
    with pytest.raises(ValueError, match="none of step, prompt, completion, remark, advantage holds numbers"):
        read_reward_log(tmp_path)


def test_what_trl_itself_writes_is_read(tmp_path):
    """The stock trainer with log_completions=True; its reward function keeps the truth."""
    pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    import tiny

    batches = []
    trainer = trl.GRPOTrainer(
        model=tiny.model(),
        reward_funcs=tiny.recording(tiny.has_digit_five, batches),
        args=trl.GRPOConfig(**tiny.arguments(tmp_path, log_completions=True, num_completions_to_print=1, max_steps=3)),
        train_dataset=tiny.dataset(4),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    expected = {}
    for step, batch in enumerate(batches, start=1):
        for prompt, reward in zip(batch["prompts"], batch["rewards"], strict=True):
            total, good = expected.get((step, prompt), (0, 0))
            expected[step, prompt] = (total + 1, good + int(reward > 0))
    assert len(expected) > 4
    assert {key: row[:2] for key, row in groups(read_reward_log(tmp_path)).items()} == expected


# -- run folders ------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_read(tmp_path):
    rows = write_run(tmp_path / "run", steps=6)
    (tmp_path / "run" / "config.yaml").unlink()  # your own training loop writes none
    log = read_reward_log(tmp_path / "run")
    expected = {
        (row["step"], prompt): (row["scored"][k], row["successes"][k], row["effective"][k])
        for row in rows
        for k, prompt in enumerate(row["prompt_ids"])
    }
    assert groups(log) == expected


def test_a_run_folder_knows_its_columns(tmp_path):
    write_run(tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match="is an allocation log, which fixes columns and successes"):
        read_reward_log(tmp_path / "run", success=0.5)


@pytest.mark.parametrize("name", ["allocations.jsonl.gz", "verl-run-3.jsonl", "seed0.jsonl.gz", "rows.json"])
def test_an_allocation_log_is_known_by_its_rows(name, tmp_path):
    expected = write_run(tmp_path / "run", steps=6)
    content = (tmp_path / "run" / "allocations.jsonl").read_bytes()
    path = tmp_path / "elsewhere" / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    log, folder = read_reward_log(path), read_reward_log(tmp_path / "run")
    assert groups(log) == groups(folder)
    rollouts = read_rollouts(path)
    assert rollouts.rewards.sum() == sum(sum(row["successes"]) for row in expected)
    assert rollouts.rewards.size == sum(sum(row["arrived"]) for row in expected)
    assert groups(RewardLog.of(rollouts)) == groups(log)
    run, whole = read_run(path), read_run(tmp_path / "run")
    assert run.rollouts.tolist() == whole.rollouts.tolist()
    assert (run.config, run.metrics) == ({}, ())
    if name.startswith("allocations"):
        assert groups(read_reward_log(path.parent)) == groups(folder)
        assert read_run(path.parent).page == path.parent / "report.html"
    else:
        assert run.page == path.parent / f"{name.split('.')[0]}-report.html"


def test_what_a_resume_made_invalid_in_an_allocation_log_is_said(tmp_path):
    rows = write_run(tmp_path / "run", steps=8)
    write_rows(tmp_path / "run" / "allocations.jsonl", rows + rows[4:6])
    log = read_reward_log(tmp_path / "run")
    assert log.steps.tolist() == [1, 2, 3, 4, 5, 6]  # the run is at step 6 again
    assert log.notes == ("steps were logged again after a resume: the later rows count, and 4 rows were left out",)
    assert read_run(tmp_path / "run").notes == log.notes


def test_a_compressed_run_folder_is_the_same_run(tmp_path):
    write_run(tmp_path / "run", steps=4)
    plain = read_run(tmp_path / "run")
    for name in ("allocations.jsonl", "metrics.jsonl"):
        path = tmp_path / "run" / name
        path.with_name(name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = read_run(tmp_path / "run")
    assert packed.rollouts.tolist() == plain.rollouts.tolist()
    assert packed.metrics == plain.metrics


# -- as a run, for the report ------------------------------------------------------------------------------------------


def test_a_log_of_rewards_is_a_run_without_estimates(tmp_path):
    path = table(tmp_path / "log.jsonl", PLAIN | {"reward": [1, 0, 1, math.nan, 1]})
    run = read_run(path)
    assert run.steps.tolist() == [1, 2]
    assert run.rollouts.tolist() == [2, 2]
    assert run.visits.successes.tolist() == [0, 1, 2]
    assert run.effective_prompt_ratio.tolist() == [0, 0]
    assert np.isnan(run.visits.estimate).all() and run.calibration().visits.size == 0
    assert run.notes[-1] == "1 rollout without a reward was left out"


# -- folders without a log --------------------------------------------------------------------------------------------


def test_other_folders_are_refused_with_what_is_in_them(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a run folder .*found weights\.bin"):
        read_reward_log(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_reward_log(tmp_path / "nowhere")
