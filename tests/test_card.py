"""The README of a run folder describes the run, and claims nothing else."""

from __future__ import annotations

import json

import pytest
import yaml

from knapsack_rl.report import RunLog
from knapsack_rl.training.card import write_card
from run_folders import write_rows, write_run


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_describes_the_run(tmp_path):
    write_run(tmp_path / "run", steps=10, dataset="sums", model="org/small", min_rollouts=2, max_rollouts=64)
    (tmp_path / "run" / "model").mkdir()
    warning = {"kind": "collapse", "seen": "Seen.", "cause": "C.", "remedy": "R."}
    write_rows(tmp_path / "run" / "warnings.jsonl", [{"step": 4} | warning])
    path = write_card(tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "README.md"
    assert (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8") == text
    assert header(text)["base_model"] == "org/small"
    run = RunLog.load(tmp_path / "run")
    accuracy = run.held_out[1]
    for part in (
        "`org/small`, trained on `sums` by GRPO with its rollouts allocated by a knapsack",
        f"10 of 10 steps, {int(run.rollouts.sum()):,} rollouts.",
        "| 2 to 64 rollouts of a prompt |",
        f"| {100 * accuracy[-1]:.1f} % (first: {100 * accuracy[0]:.1f} %) |",
        "| warning at step 4 | Seen. |",
        "knapsack-rl train --config config.yaml --output FOLDER",
    ):
        assert part in text, part
    assert "None" not in text and "Not finished" not in text and str(tmp_path) not in text


def test_uniform_unfinished_and_local_runs_are_called_so(tmp_path):
    write_run(tmp_path / "run", steps=3, planned=10, allocation="uniform", model="my-model", evaluate_every=100)
    text = write_card(tmp_path / "run").read_text(encoding="utf-8")
    assert "**Not finished:** 3 of 10 steps" in text
    assert "with the same number of rollouts for every prompt." in text
    assert "knapsack (arXiv" not in text
    assert "base_model" not in header(text)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        write_card(tmp_path)


def test_text_of_others_stays_text(tmp_path):
    name = "a|b`c\n# <script>x</script> [l](http://e.test)"
    write_run(tmp_path / "<b>[x](y)", steps=3, model=name, dataset=name)
    warning = {"kind": "k", "seen": name, "cause": "c", "remedy": "r"}
    write_rows(tmp_path / "<b>[x](y)" / "warnings.jsonl", [{"step": 1} | warning])
    text = write_card(tmp_path / "<b>[x](y)").read_text(encoding="utf-8")
    outside_code = "".join(text.split("`")[::2])
    assert "<" not in outside_code.replace("&lt;", "")
    assert "[x](y)" not in outside_code and "[l](" not in outside_code
    assert set(header(text)) == {"library_name", "tags"}
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))
    assert json.dumps(header(text)["tags"]) == '["grpo", "trl", "knapsack-rl"]'
