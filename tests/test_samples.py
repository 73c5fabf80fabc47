"""The store of sample completions: bounded, reproducible, and true to the completions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from knapsack_rl.runs.samples import SampleStore, read_samples


def add(store, prompt_id, text, *, success=False, step=1, prompt="q"):
    store.add(prompt_id, prompt, text, reward=float(success), success=success, step=step)


def test_of_each_prompt_the_first_and_the_newest_of_each_kind_are_kept(tmp_path):
    store = SampleStore(4)
    for step, (text, success) in enumerate([("a", False), ("b", True), ("c", False), ("d", False), ("e", True)], 1):
        add(store, "p", text, success=success, step=step)
    store.write(tmp_path / "samples.jsonl")
    (row,) = read_samples(tmp_path / "samples.jsonl")
    assert row == {
        "step": 5,
        "prompt_id": "p",
        "prompt": "q",
        "first": {"step": 1, "reward": 0.0, "text": "a", "success": False},
        "failure": {"step": 4, "reward": 0.0, "text": "d"},
        "success": {"step": 5, "reward": 1.0, "text": "e"},
    }


def ids_in(path):
    return {row["prompt_id"] for row in read_samples(path)}


def test_the_choice_of_prompts_is_bounded_and_depends_on_their_ids_alone(tmp_path):
    prompts = [f"prompt {k}" for k in range(300)]
    kept = []
    for seed in range(3):
        store = SampleStore(40)
        for prompt in np.random.default_rng(seed).permutation(prompts * 2):
            add(store, str(prompt), f"text {seed}")
        store.write(tmp_path / f"{seed}.jsonl")
        kept.append(ids_in(tmp_path / f"{seed}.jsonl"))
    assert len(kept[0]) == 40
    assert kept[0] == kept[1] == kept[2]


def test_a_resumed_store_goes_on(tmp_path):
    straight, first, second = SampleStore(10), SampleStore(10), SampleStore(10)
    prompts = [f"prompt {k}" for k in range(50)]
    for prompt in prompts[:30]:
        add(straight, prompt, "early")
        add(first, prompt, "early")
    first.write(tmp_path / "part.jsonl")
    second.read(tmp_path / "part.jsonl")
    for prompt in prompts[20:]:
        add(straight, prompt, "late", success=True, step=2)
        add(second, prompt, "late", success=True, step=2)
    straight.write(tmp_path / "straight.jsonl")
    second.write(tmp_path / "second.jsonl")
    assert (tmp_path / "second.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    second.read(tmp_path / "not there.jsonl")


def test_long_texts_lose_their_middle_and_the_file_stays_small(tmp_path):
    store = SampleStore(20, longest=100)
    for prompt in range(200):
        add(store, prompt, "start" + "x" * 5000 + "end", prompt="y" * 5000)
        add(store, prompt, "z" * 5000, success=True)
    path = tmp_path / "samples.jsonl"
    store.write(path)
    assert path.stat().st_size < 20 * 4 * (100 + 100)
    texts = [row["failure"]["text"] for row in read_samples(path)]
    assert all(text.startswith("start") and text.endswith("end") and len(text) <= 100 for text in texts)


def test_messages_become_text(tmp_path):
    store = SampleStore(3)
    question = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How much?"}]},
    ]
    reply = [{"role": "assistant", "content": "42"}]
    store.add("chat", question, reply, reward=1.0, success=True, step=1, answer=42)
    store.add("empty", [{"role": "user", "content": None}], "", reward=0.0, success=False, step=1)
    store.write(tmp_path / "samples.jsonl")
    chat, empty = sorted(read_samples(tmp_path / "samples.jsonl"), key=lambda row: row["prompt_id"])
    assert (chat["prompt"], chat["success"]["text"], chat["answer"]) == ("Be brief.\nHow much?", "42", "42")
    assert "answer" not in empty
    assert (empty["prompt"], empty["failure"]["text"]) == ("", "")


def test_rows_of_another_shape_are_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    good = {"step": 1, "prompt_id": "p", "prompt": "q", "first": {"text": "t"}}
    bad = [good | {"prompt": 7}, good | {"first": "text"}, good | {"failure": {"text": None}}, {"step": 1}]
    path.write_text("\n".join(json.dumps(row) for row in [good, *bad]) + '\n{"step": 1, "prom')
    assert read_samples(path) == [good]


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="prompts must be at least 1"):
        SampleStore(0)
    with pytest.raises(ValueError, match="longest at least 20"):
        SampleStore(1, longest=3)
