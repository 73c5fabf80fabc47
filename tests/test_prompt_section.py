"""The prompts that a page picks, against the rows of the log read one by one."""

from __future__ import annotations

import pytest

from knapsack_rl.report import write_report
from knapsack_rl.report.prompt_section import best, histories, lost, worst
from knapsack_rl.runs.log import RunLog
from knapsack_rl.runs.samples import SampleStore
from run_folders import write_rows, write_run


def row(step, **prompts):
    """Counts and successes by prompt, as a line of the log."""
    counts, successes = [pair[0] for pair in prompts.values()], [pair[1] for pair in prompts.values()]
    return {
        **{"step": step, "prompt_ids": list(prompts), "counts": counts, "successes": successes, "scored": counts},
        "arrived": counts,
        "effective": [0 < good < size for size, good in prompts.values()],
        **{"estimate": [0.5] * len(counts), "predicted": [0.5] * len(counts), "reason": "", "seconds": 0.1},
    }


@pytest.fixture(autouse=True)
def _plain_pages(monkeypatch):
    """Pages without plots: drawing takes most of the time."""
    monkeypatch.setattr("knapsack_rl.report.page.plot", lambda *_: "")


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path, steps=3)
    rows = [
        row(1, never=(8, 0), rises=(4, 0), falls=(4, 4), stays=(4, 4), flukes=(8, 1)),
        row(2, never=(20, 0), rises=(6, 3), falls=(4, 2), stays=(2, 2), flukes=(30, 0)),
        row(3, never=(2, 0), rises=(2, 2), falls=(4, 1), rarely=(4, 0)),
    ]
    write_rows(tmp_path / "allocations.jsonl", rows)
    return tmp_path


def ids(chosen):
    return [one.prompt_id for one in chosen]


def test_histories_add_up(folder):
    found = {one.prompt_id: one for one in histories(RunLog.load(folder))}
    assert set(found) == {"never", "rises", "falls", "stays", "flukes", "rarely"}
    assert (found["rises"].visits, found["rises"].rollouts, found["rises"].successes) == (3, 12, 5)
    assert (found["rises"].first, found["rises"].last) == (0.0, 1.0)
    assert (found["falls"].first, found["falls"].last) == (1.0, 0.25)


def test_the_lists_are_what_their_captions_say(folder):
    found = histories(RunLog.load(folder))
    assert ids(worst(found)) == ["never", "rarely", "flukes"]
    assert ids(worst(found, 1)) == ["never"]
    assert ids(best(found)) == ["rises"]
    assert ids(lost(found)) == ["falls"]


def test_a_page_shows_prompts_with_their_completions(folder):
    store = SampleStore(10)
    for prompt in ("never", "rises"):
        store.add(prompt, f"What is {prompt}?", "first words", reward=0.0, success=False, step=1, answer="seven")
    store.add("rises", "What is rises?", "last\nwords", reward=1.0, success=True, step=3, answer="seven")
    store.write(folder / "samples.jsonl")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Hardest prompts" in page and "Most improved prompts" in page
    assert "Prompts lost again" not in page  # of that prompt no completion was kept
    assert "Completions were kept for 2 of 6 prompts" in page
    assert page.count("first words") == 2  # once a prompt, though it is also the newest failure
    assert "last\nwords" in page and "What is never?" in page and "seven" in page
    assert "0 of 30 rollouts succeeded in 3 visits; 0% at the first, 0% at the last" in page


def test_a_page_without_samples_names_the_prompts(folder):
    page = write_report(folder).read_text(encoding="utf-8")
    assert "No completions were kept in this run." in page
    assert "Prompts lost again" in page


@pytest.mark.parametrize("dataset", ["arithmetic", "qa.jsonl"])
def test_a_page_tells_that_answers_are_reversed_where_they_are(tmp_path, dataset):
    write_run(tmp_path, steps=3, dataset=dataset)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("digits reversed") == (dataset == "arithmetic")


def test_a_page_lists_the_warnings(folder):
    warning = {"kind": "collapse", "seen": "Seen & done.", "cause": "The cause.", "remedy": "The remedy."}
    write_rows(folder / "warnings.jsonl", [{"step": 2} | warning], tail='{"step": 3, "ki')
    page = write_report(folder).read_text(encoding="utf-8")
    for text in ("Seen &amp; done.", "First seen at step 2.", "Likely cause: The cause.", "The remedy."):
        assert text in page
    assert RunLog.load(folder).warnings == ({"step": 2} | warning,)


def test_metrics_are_grouped_and_none_is_missing(folder):
    names = ["reward", "loss", "knapsack/budget_max", "knapsack/brier_score", "completions/mean_length", "mine/own"]
    write_rows(folder / "metrics.jsonl", [{"step": 1, "rollouts": 8} | dict.fromkeys(names, 0.5)])
    page = write_report(folder).read_text(encoding="utf-8")
    assert f"<summary>Training metrics ({len(names)})</summary>" in page
    table = page[page.index("Training metrics") :]
    order = ["Outcomes", "reward", "Allocation", "budget_max", "Predictions", "brier_score", "Completions"]
    order += ["mean_length", "Optimizer", "loss", "Others", "mine/own"]
    places = [table.index(f">{name}<") if f">{name}<" in table else table.index(name) for name in order]
    assert places == sorted(places)
