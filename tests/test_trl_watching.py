"""Files of the trainer beside the allocations: sample completions, and warnings of the callback."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

import tiny
from knapsack_rl.runs.files import SAMPLES_FILE, WARNINGS_FILE, read_rows
from knapsack_rl.runs.samples import read_samples
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer, WatchCallback
from test_trl import observed, trainer_of


def test_samples_are_the_first_and_newest_completions(tmp_path):
    _, batches = observed(tmp_path, log_samples=100, save_strategy="no")
    expected = {}
    for step, batch in enumerate(batches, 1):
        columns = (batch["prompt_id"], batch["prompts"], batch["completions"], batch["rewards"])
        for key, prompt, completion, reward in zip(*columns, strict=True):
            shown = {"step": step, "reward": reward, "text": completion}
            start = {"prompt_id": key, "prompt": prompt, "first": shown | {"success": reward > 0}}
            row = expected.setdefault(key, start | {"answer": f"answer of {prompt}"})
            row |= {"step": step, "success" if reward > 0 else "failure": shown}
    found = {row["prompt_id"]: row for row in read_samples(tmp_path / SAMPLES_FILE)}
    assert found == expected
    assert len(found) == 6 and any("success" in row for row in found.values())


def test_samples_continue_after_a_resume_and_are_bounded(tmp_path):
    def make(steps):
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "log_samples": 5}
        return trainer_of(KnapsackGRPOTrainer, tmp_path, data=tiny.dataset(24), **settings)

    make(2).train()
    early = {row["prompt_id"]: row["first"] for row in read_samples(tmp_path / SAMPLES_FILE)}
    make(6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    late = {row["prompt_id"]: row["first"] for row in read_samples(tmp_path / SAMPLES_FILE)}
    assert len(late) == 5
    assert any(early.get(key) == first for key, first in late.items())


def test_without_the_setting_there_are_no_samples(tmp_path):
    observed(tmp_path)
    assert not (tmp_path / SAMPLES_FILE).exists()
    with pytest.raises(ValueError, match="log_samples must be >= 0, got -1"):
        KnapsackGRPOConfig(**tiny.arguments(tmp_path, log_samples=-1))


def test_a_folder_that_refuses_samples_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / SAMPLES_FILE).mkdir()
    trainer, _ = observed(tmp_path, log_samples=3)
    assert trainer.state.global_step == 8
    assert f"{SAMPLES_FILE} could not be written" in caplog.text


def never(completions, **_):
    return [0.0] * len(completions)


def test_a_run_that_learns_nothing_is_reported_once(tmp_path):
    reported = []
    callback = WatchCallback(reported.append, window=3)
    trainer = trainer_of(KnapsackGRPOTrainer, tmp_path, rewards=(never,), max_steps=5, extra={"callbacks": [callback]})
    trainer.train()
    collapse = [finding for finding in reported if finding.kind == "collapse"]
    assert [finding.step for finding in collapse] == [3]
    assert "verifier" in collapse[0].cause
    assert [row["kind"] for row in read_rows(tmp_path / WARNINGS_FILE)] == [finding.kind for finding in reported]


def test_only_the_main_process_warns(tmp_path, caplog):
    args, row = SimpleNamespace(output_dir=str(tmp_path)), {"knapsack/effective_prompt_ratio": 0.0}
    for main in (False, True):
        callback = WatchCallback(window=1)
        with caplog.at_level(logging.WARNING):
            callback.on_log(args, SimpleNamespace(is_world_process_zero=main, global_step=7), None, logs=dict(row))
        assert (tmp_path / WARNINGS_FILE).exists() is main
        assert ("step 7: Only 0% of the prompts" in caplog.text) is main
