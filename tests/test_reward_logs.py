"""Reading rewards of earlier runs: formats as their writers write them, and faulty files."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from pyarrow import parquet

from knapsack_rl.offline.reward_logs import ColumnNames, RewardLog, read_reward_log
from run_folders import write_run
from strategies import ragged_groups

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


# -- folders without a log --------------------------------------------------------------------------------------------


def test_other_folders_are_refused_with_what_is_in_them(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a run folder .*found weights\.bin"):
        read_reward_log(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_reward_log(tmp_path / "nowhere")
