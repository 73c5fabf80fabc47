"""Which rows are one prompt: for the TRL trainer, on the data sets that people have."""

from __future__ import annotations

import io
import logging
import pickle
import re
import threading
import time
import warnings
from collections import Counter, defaultdict

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from PIL import Image as Pictures
from trl import GRPOTrainer

import tiny
from cases import message_of
from knapsack_rl import KnapsackAllocator
from knapsack_rl import ids as ids_module
from knapsack_rl.ids import hash_of
from knapsack_rl.trl import ALLOCATION_LOG, KnapsackGRPOTrainer
from knapsack_rl.trl import trainer as trainer_module
from knapsack_rl.trl.data_checks import check_dataset, prompt_keys
from knapsack_rl.trl.drawn import draw
from knapsack_rl.trl.equal_rows import equal_values, rows_of
from knapsack_rl.trl.identity import Identity, prompt_key, prompt_name
from knapsack_rl.trl.rewards import RewardError, watched


def seen_by_rewards(kind, folder, data, column, **settings):
    """Train, and return the values of a column that the reward function saw in each step."""
    batches = []
    trainer = tiny.trainer(kind, folder, tiny.recording(tiny.has_digit_five, batches), data=data, **settings)
    trainer.train()
    return trainer, [batch[column] for batch in batches]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- rows are one prompt only if all that rewards see is the same ------------------------------------------------------

ONE_PROMPT = {
    "secret": [{"prompt": "1+1=", "secret": f"word{k}"} for k in range(16)],
    "environment": [{"prompt": "1+1=", "environment": f"world{k}"} for k in range(16)],
    "target": [{"prompt": "1+1=", "target": k} for k in range(16)],
    "task_dir": [{"prompt": "1+1=", "task_dir": f"/tasks/{k}", "gold": None} for k in range(16)],
    "task_index": [
        {"prompt": "1+1=", "task_index": k, "task_spec": {"seed": k, "tags": ["a", "b"]}} for k in range(16)
    ],
}


@pytest.mark.parametrize("column", ONE_PROMPT)
def test_rows_with_one_prompt_and_different_tasks_are_different_prompts(column, tmp_path):
    data = Dataset.from_list(ONE_PROMPT[column])
    settings = {"max_steps": 4}  # an epoch
    _, stock = seen_by_rewards(GRPOTrainer, tmp_path / "stock", data, column, **settings)
    trainer, ours = seen_by_rewards(KnapsackGRPOTrainer, tmp_path / "ours", data, column, **settings)
    assert [Counter(map(str, step)) for step in ours] == [Counter(map(str, step)) for step in stock]
    assert all(sorted(Counter(map(str, step)).values()) == [4] * 4 for step in ours)
    assert len(trainer.allocator.tracker) == 16


def test_no_task_is_dropped_where_allocation_is_uneven(tmp_path):
    data = Dataset.from_list(ONE_PROMPT["secret"])
    _, steps = seen_by_rewards(KnapsackGRPOTrainer, tmp_path, data, "secret", max_steps=12)
    assert Counter(secret for step in steps for secret in set(step)) == {f"word{k}": 3 for k in range(16)}
    assert any(max(Counter(step).values()) > 4 for step in steps[4:])


def test_rows_of_equal_content_are_one_prompt_whatever_the_format(tmp_path):
    data = Dataset.from_list([{"prompt": "1+1=", "answer": [1.5, 2.0], "meta": {"a": k % 2}} for k in range(16)])
    for kind in (None, "numpy", "pandas"):
        trainer, _ = seen_by_rewards(KnapsackGRPOTrainer, tmp_path / str(kind), data.with_format(kind), "meta")
        assert len(trainer.allocator.tracker) == 2, kind


def test_a_batch_of_one_prompt_is_the_stock_step(tmp_path):
    """As with an environment that chooses its task when it is reset: nothing tells the groups apart."""
    data = Dataset.from_list([{"prompt": "1+1="}] * 16)
    ends = []
    for kind in (GRPOTrainer, KnapsackGRPOTrainer):
        trainer = tiny.trainer(kind, tmp_path, tiny.digit_sum, data=data, **tiny.AS_STOCK)
        trainer.train()
        ends.append(tiny.fingerprint(trainer.model))
    assert ends[0] == ends[1]
    assert trainer.allocator.tracker.records().rollouts.tolist() == [48]


def test_the_hash_covers_everything_and_refuses_what_has_no_stable_text():
    row = {"prompt": "a", "data": np.arange(3000), "more": b"x", "day": pd.Timestamp("2020-01-01"), "nan": float("nan")}
    changed = row["data"].copy()
    changed[1500] = 7  # str() of a long array leaves its middle out
    others = [{"data": changed}, {"more": b"y"}, {"day": pd.Timestamp("2020-01-02")}, {"nan": 1.0}, {"prompt": "b"}]
    keys = [hash_of(row | other) for other in [{}, *others]]
    assert len(set(keys)) == len(keys)
    assert hash_of(row | {"data": torch.arange(3000)}) == hash_of(row | {"data": list(range(3000))}) == keys[0]
    for odd in (object(), Pictures.new("RGB", (2, 2)), {"a": {1, 2}}, 1j):
        with pytest.raises(ValueError, match="no stable hash"):
            hash_of([odd])


# -- ids --------------------------------------------------------------------------------------------------------------


def test_an_id_that_names_rows_with_different_answers_is_refused(tmp_path):
    rows = [{"prompt_id": "same", "prompt": "1+1=", "answer": str(k // 2)} for k in range(16)]
    found = message_of(ValueError, tiny.trainer, KnapsackGRPOTrainer, tmp_path, data=Dataset.from_list(rows))
    assert "'same' names different prompts (rows 0 and 2), which differ in column 'answer'" in found
    assert "putting the source in front" in found
    # The order of a shuffled data set counts, and rows without an id are not compared.
    shuffled = Dataset.from_list([*rows, rows[0] | {"prompt_id": None}]).select([16, 3, 2, 0])
    assert "(rows 1 and 3)" in message_of(ValueError, check_dataset, shuffled, "prompt_id")
    assert check_dataset(Dataset.from_list(rows[:2] * 3), "prompt_id")  # equal rows


def test_the_type_of_ids_is_checked_at_construction(tmp_path):
    for given in ([0.0, 1.0], [True, False], [b"a", b"b"], [[1], [2]], [1.5, None]):
        data = Dataset.from_dict({"prompt": ["1+1=", "2+2="] * 8, "prompt_id": given * 8})
        found = message_of(ValueError, tiny.trainer, KnapsackGRPOTrainer, tmp_path, data=data)
        assert re.search(r"column 'prompt_id' must hold strings or whole numbers, got .*dataset.map", found), given


def test_whole_numbers_of_numpy_torch_and_pandas_are_ids(tmp_path):
    data = Dataset.from_dict({"prompt": [f"{k}+1=" for k in range(8)], "prompt_id": list(range(8))})
    for kind in ("numpy", "torch", "pandas", None):
        formatted = data.with_format(kind)
        for stream in (False, True):
            if stream and kind in ("pandas", "torch"):
                continue  # the stream itself cannot be read, or warns
            trainer = tiny.trainer(
                KnapsackGRPOTrainer,
                tmp_path / f"{kind} {stream}",
                data=formatted.to_iterable_dataset() if stream else formatted,
                max_steps=4,
            )
            trainer.train()
            known = trainer.allocator.tracker.prompt_ids
            assert sorted(known) == list(range(8)) and {*map(type, known)} == {int}, (kind, stream)
    labels = data.cast_column("prompt_id", ClassLabel(names=list("abcdefgh")))
    assert check_dataset(labels, "prompt_id")
    assert prompt_keys(labels, Identity("prompt_id")) == set(range(8))


def test_an_allocator_takes_the_integers_of_torch_and_pandas():
    for given in (torch.tensor([3, 5]), [torch.tensor(3), np.int8(5)], pd.Series([3, 5]), pd.Index([3, 5]), (3, 5)):
        allocator = KnapsackAllocator("beta")
        allocator.allocate(given, 8)
        allocator.observe(given, [1, 0])
        assert allocator.tracker.prompt_ids == [3, 5] and {*map(type, allocator.tracker.prompt_ids)} == {int}
    for given in (torch.tensor([3.0, 5.0]), pd.Series([True, False]), [np.float64(3)], [np.bytes_(b"a")]):
        with pytest.raises(ValueError, match="a prompt id is a string or a whole number"):
            KnapsackAllocator("beta").allocate(given, 8)
    for given in (torch.tensor(3), np.array(3)):
        with pytest.raises(ValueError, match="must be a sequence"):
            KnapsackAllocator("beta").allocate(given, 8)


def test_rows_without_an_id_among_rows_with_one_are_hashed(tmp_path):
    data = Dataset.from_list([{"prompt": "1+1=", "answer": k, "prompt_id": k if k < 4 else None} for k in range(8)])
    trainer, _ = seen_by_rewards(KnapsackGRPOTrainer, tmp_path, data, "answer", max_steps=4)
    known = set(trainer.allocator.tracker.prompt_ids)
    assert len(known) == 8 and set(range(4)) < known
    assert known == prompt_keys(data, Identity("prompt_id"))


# -- images -----------------------------------------------------------------------------------------------------------

PICTURE = Pictures.new("RGB", (4, 4), (1, 2, 3))
MESSAGE = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what?"}]}]
NESTED = Features(
    {
        "prompt": [
            {"role": Value("string"), "content": [{"type": Value("string"), "image": Image(), "text": Value("string")}]}
        ]
    }
)


def stored_message():
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    parts = [{"type": "image", "image": {"bytes": buffer.getvalue(), "path": None}, "text": None}]
    return [{"role": "user", "content": parts}]


def test_images_without_ids_are_refused_at_construction(tmp_path):
    rows = {
        "one": Dataset.from_list([{"prompt": "1+1=", "image": PICTURE}] * 16),
        "several": Dataset.from_list([{"prompt": "1+1=", "images": [PICTURE]}] * 16),
        "other name": Dataset.from_list([{"prompt": "1+1=", "picture": PICTURE}] * 16),
        "in messages": Dataset.from_dict({"prompt": [stored_message()] * 16}, features=NESTED),
        "some ids": Dataset.from_list(
            [{"prompt": "1+1=", "image": PICTURE, "prompt_id": k or None} for k in range(16)]
        ),
        "stream": Dataset.from_list([{"prompt": "1+1=", "image": PICTURE}] * 16).to_iterable_dataset(),
    }
    for case, data in rows.items():
        found = message_of(ValueError, tiny.trainer, KnapsackGRPOTrainer, tmp_path, data=data)
        assert "images need an id: add a column 'prompt_id'" in found, case
    dropped = rows["one"].add_column("prompt_id", list(range(16)))
    assert check_dataset(dropped, "prompt_id")
    with pytest.raises(ValueError, match="images need an id"):
        tiny.trainer(KnapsackGRPOTrainer, tmp_path, data=dropped, remove_unused_columns=True)


def test_an_image_inside_a_message_of_a_stream_gets_the_advice(tmp_path):
    def rows():
        for _ in range(64):
            yield {"prompt": MESSAGE}

    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, data=IterableDataset.from_generator(rows))
    with pytest.raises(ValueError, match="images need an id: add a column 'prompt_id'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_construction_and_resume_decode_no_image(tmp_path, monkeypatch):
    data = Dataset.from_list([{"prompt": "1+1=", "image": PICTURE, "prompt_id": f"p{k % 8}"} for k in range(16)])
    tiny.trainer(KnapsackGRPOTrainer, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, data=data)
    trainer.restore_progress(tmp_path / "checkpoint-1")
    other = concatenate_datasets([data, data.map(lambda _: {"image": Pictures.new("RGB", (4, 4))}).select([0])])
    with pytest.raises(ValueError, match=r"rows 0 and 16\), which differ in column 'image'"):
        check_dataset(other, "prompt_id")


def test_a_fault_of_a_reward_function_is_named_where_the_prompt_has_an_image():
    columns = {"prompts": [MESSAGE], "completions": ["x"], "completion_ids": [[1]], "environments": [object()]}
    with pytest.raises(RewardError, match=r"mine returned 'a' .* for prompt 'without id'"):
        watched(lambda **_: ["a"], "mine", "prompt_id")(**columns)
    plain = columns | {"prompts": ["1+1="], "answer": ["2"]}
    assert prompt_name(plain, 0, "prompt_id") == prompt_key({"prompt": "1+1=", "answer": "2"}, "prompt_id")


# -- uniform allocation needs no identity -----------------------------------------------------------------------------


def test_uniform_allocation_neither_hashes_nor_gathers_nor_needs_ids(tmp_path, monkeypatch, caplog):
    def never(*_, **__):
        raise AssertionError("uniform allocation does not need this")

    cases = {
        "none": {},
        "float": {"prompt_id": [float(k) for k in range(24)]},
        "clash": {"prompt_id": ["same"] * 24},
        "image": {"images": [[] for _ in range(24)]},
        "object": {},
    }
    for case, columns in cases.items():
        data = Dataset.from_dict({"prompt": tiny.dataset(24)["prompt"][:]} | columns)
        if case == "object":
            data = data.with_transform(lambda batch: batch | {"thing": [object() for _ in batch["prompt"]]})
        stock = tiny.trainer(GRPOTrainer, tmp_path / "stock", tiny.digit_sum, data=data)
        stock.train()
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "gather_object", never)
            patch.setattr(ids_module.hashlib, "blake2b", never)
            trainer = tiny.trainer(
                KnapsackGRPOTrainer, tmp_path / case, tiny.digit_sum, data=data, allocation="uniform"
            )
            trainer.train()
        assert tiny.fingerprint(trainer.model) == tiny.fingerprint(stock.model), case
        row = trainer.state.log_history[-2]
        assert (row["knapsack/budget_min"], row["knapsack/budget_max"]) == ((16, 16) if case == "clash" else (4, 4)), (
            case
        )
        assert row["knapsack/prompts"] == (1 if case == "clash" else 4), case
        assert len(trainer.allocator.tracker) == (1 if case == "clash" else 0), case
    assert warnings_of(caplog) == []


def test_uniform_allocation_names_prompts_in_the_log_that_it_is_asked_for(tmp_path):
    settings = {"allocation": "uniform", "log_allocations": True}
    data = tiny.dataset(24, ids=False)
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, data=data, **settings)
    trainer.train()
    assert set(trainer.allocator.tracker.prompt_ids) < prompt_keys(data, Identity("prompt_id"))
    assert len((tmp_path / ALLOCATION_LOG).read_text().splitlines()) == 3


# -- no data set ------------------------------------------------------------------------------------------------------


class Game:
    """An environment that chooses its own tasks."""

    made = 0

    def reset(self, **_):
        type(self).made += 1
        return f"{self.made}+1="


def conversational_tokenizer():
    found = tiny.tokenizer()
    found.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}{% endfor %}"
    )
    return found


def first_digit(completions, **_):
    return [float("5" in completion[0]["content"]) for completion in completions]


def played(kind, folder, factory, data, **settings):
    extra = {"environment_factory": factory, "processing_class": conversational_tokenizer(), "train_dataset": data}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'environment_factory'")
        trainer = tiny.trainer(kind, folder, first_digit, extra=extra, **settings)
    Game.made = 0
    trainer.train()
    return trainer


def test_without_a_data_set_training_is_that_of_the_stock_trainer(tmp_path, caplog):
    stock = played(GRPOTrainer, tmp_path / "stock", Game, None)
    trainer = played(KnapsackGRPOTrainer, tmp_path / "ours", Game, None, **tiny.AS_STOCK)
    assert tiny.fingerprint(trainer.model) == tiny.fingerprint(stock.model)
    assert len(trainer.allocator.tracker) == 0
    assert trainer.state.log_history[-2]["knapsack/prompts"] == 4
    found = warnings_of(caplog)
    assert len(found) == 1 and "there is no data set" in found[0] and "train_dataset" in found[0]


def test_tasks_of_an_environment_are_told_apart(tmp_path):
    opened = []

    class Rooms:
        def reset(self, task, **_):
            opened.append(task)
            return f"{task}+1="

    data = Dataset.from_list([{"prompt": [{"role": "user", "content": ""}], "task": k} for k in range(16)])
    trainer = played(KnapsackGRPOTrainer, tmp_path, Rooms, data, max_steps=4)
    assert Counter(opened) == dict.fromkeys(range(16), 4)
    assert len(trainer.allocator.tracker) == 16


# -- streams ----------------------------------------------------------------------------------------------------------


def stream_of(rows):
    return IterableDataset.from_generator(lambda: (row for row in rows))


def test_a_stream_whose_ids_clash_later_keeps_its_prompts_apart(tmp_path, caplog):
    rows = [{"prompt": f"{k}+1=", "answer": k, "prompt_id": f"p{k % 4}" if k < 8 else f"p{k}"} for k in range(16)]
    batches = []
    trainer = tiny.trainer(
        KnapsackGRPOTrainer,
        tmp_path,
        tiny.recording(tiny.has_digit_five, batches),
        data=stream_of(rows),
        shuffle_dataset=False,
        max_steps=4,
    )
    trainer.train()
    assert {answer for batch in batches for answer in batch["answer"]} == set(range(16))
    assert len(trainer.allocator.tracker) == 16
    assert sum("names different prompts of the stream" in text for text in warnings_of(caplog)) == 1
    assert {"p0", "p9"} < set(trainer.allocator.tracker.prompt_ids)
    with pytest.raises(ValueError, match="'p0' names different prompts of the stream; make ids unique"):
        tiny.trainer(KnapsackGRPOTrainer, tmp_path, data=stream_of([row | {"prompt_id": "p0"} for row in rows])).train()


def test_a_later_batch_without_identity_is_the_stock_step(tmp_path, caplog):
    good = [{"prompt": f"{k}+1=", "prompt_id": k} for k in range(4)]
    rows = [*good, *({"prompt": f"{k}+2=", "prompt_id": 1.5} for k in range(4)), *good]
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, data=stream_of(rows), shuffle_dataset=False)
    trainer.train()
    assert trainer.state.global_step == 3
    assert sum("every prompt of the batch gets num_generations rollouts" in t for t in warnings_of(caplog)) == 1
    assert trainer.state.log_history[-2]["knapsack/failures/identification"] == 1
    assert trainer.allocator.tracker.records().rollouts.sum() == 32
    with pytest.raises(ValueError, match="must hold strings or whole numbers"):
        tiny.trainer(KnapsackGRPOTrainer, tmp_path, data=stream_of(rows[4:]), shuffle_dataset=False).train()


# -- several processes ------------------------------------------------------------------------------------------------


def on_ranks(processes, work):
    """Run ``work(rank, gather)`` for each rank in a thread; return the results and the bytes that each call sent."""
    slots, sent, results = [None] * processes, defaultdict(list), [None] * processes
    barrier = threading.Barrier(processes, timeout=60)

    def run(rank):
        def gather(items):
            slots[rank] = pickle.dumps(items)
            sent[rank].append(len(slots[rank]))
            barrier.wait()
            joined = [item for slot in slots for item in pickle.loads(slot)]
            barrier.wait()
            return joined

        try:
            results[rank] = work(rank, gather)
        except ValueError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, [sent[rank] for rank in range(processes)]


def drawn_on(rows, size, processes, **options):
    share = len(rows) // processes

    def work(rank, gather):
        return draw(
            rows[rank * share : (rank + 1) * share],
            size,
            Identity("prompt_id", **options),
            rank=rank,
            processes=processes,
            gather=gather,
            warn=lambda text: None,
        )

    return on_ranks(processes, work)


def brought_on(drawn, group_R):
    processes = len(drawn)
    return on_ranks(processes, lambda rank, gather: drawn[rank].bring(range(6), group_R, rank, processes, gather))


def test_keys_are_gathered_once_per_prompt_and_rows_only_where_they_move():
    big = "x" * 1_000_000
    rows = [{"prompt": f"{k}", "prompt_id": k, "text": f"{k}{big}"} for k in range(6) for _ in range(4)]
    for processes in (1, 2, 3, 4):
        drawn, sent = drawn_on(rows, 4, processes)
        assert all(found.keys == list(range(6)) for found in drawn), processes
        assert all(sum(calls) < 2_000 for calls in sent), (processes, sent)
        for counts in ([4] * 6, [9, 3, 3, 3, 3, 3], [2, 2, 2, 2, 2, 14], [2, 10, 2, 6, 2, 2]):
            group_R = np.repeat(np.arange(6), counts)
            brought, sent = brought_on(drawn, group_R)
            expected = [rows[4 * group] for group in group_R]
            assert [row for part in brought for row in part] == expected, (processes, counts)
            # By definition: a process lacks the rows that are in its share and were not drawn there.
            share = 24 // processes
            parts = [(set(group_R[p * share : (p + 1) * share]), p) for p in range(processes)]
            here = [{row["prompt_id"] for row in rows[p * share : (p + 1) * share]} for p in range(processes)]
            moved = {group for wanted, p in parts for group in wanted if group not in here[p]}
            total = sum(sum(calls) for calls in sent)
            assert len(moved) * 1e6 <= total <= len(moved) * 1.001e6 + 1e3, (processes, counts, total)
            assert bool(moved) == any(sent) or processes == 1


def test_every_process_knows_the_features_of_all_prompts():
    rows = [{"prompt": f"{k}", "prompt_id": k, "grade": f"g{k % 2}"} for k in range(6) for _ in range(4)]
    for processes in (1, 2, 4):
        drawn, _ = drawn_on(rows, 4, processes, features=["grade", "lacking"])
        for found in drawn:
            assert found.features == {"grade": ["g0", "g1"] * 3, "lacking": [None] * 6}


def test_one_process_gathers_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "gather_object", lambda rows: pytest.fail("nothing has to be gathered"))
    extra = {"allocator": tiny.informed_allocator()}
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, extra=extra, per_device_train_batch_size=32)
    trainer.train()
    assert max(row.get("knapsack/budget_max", 0) for row in trainer.state.log_history) > 4


def rows_with(*ids, size=4):
    return [{"prompt": f"{k}+1=", "prompt_id": f"p{k}"} for k in ids for _ in range(size)]


def test_data_sets_of_processes_are_compared(caplog):
    def compare(mine, other):
        caplog.clear()
        data = [Dataset.from_list(rows) for rows in (mine, other)]
        found, sent = on_ranks(2, lambda rank, gather: check_dataset(data[rank], "prompt_id", gather))
        assert len(sent[0]) == len(sent[1]), "a process would wait for the other"
        return [str(one) for one in found], sorted({*warnings_of(caplog)})

    rows = rows_with(1, 2)
    assert compare(rows, rows) == (["True"] * 2, [])
    assert compare(rows, rows_with(2, 3)) == (
        ["False"] * 2,
        ["the processes have different data sets, together 3 prompts; all train on rows of all"],
    )
    # Other answers to the same prompts are seen when rows are compared as they come.
    assert compare(rows, [row | {"answer": "2"} for row in rows]) == (["False"] * 2, [])
    for other, message in (
        ([row | {"prompt": "9+9="} for row in rows_with(2, 3)], "id 'p2' names different prompts on two processes"),
        ([row | {"prompt_id": 0.5} for row in rows], "must hold strings or whole numbers"),
    ):
        found, _ = compare(rows, other)
        assert all(message in one for one in found), other


def test_a_process_that_sees_other_data():
    found, _ = drawn_on(rows_with(1, 2, 5, 6), 4, 2)
    assert [drawn.keys for drawn in found] == [["p1", "p2", "p5", "p6"]] * 2
    # A group that straddles processes and is broken there, and one that is broken inside a process.
    straddling = rows_with(1) + rows_with(2, size=2) + rows_with(3, size=2) + rows_with(4)
    for broken in (straddling, rows_with(1, 2, 5) + rows_with(6, size=3) + rows_with(7, size=1)):
        found, _ = drawn_on(broken, 4, 2)
        assert all("rows holds different prompts" in str(error) for error in found)
    # Two processes use one id for different prompts: both prompts are trained on.
    clash = [*rows_with(1, 2), *(row | {"prompt": "9+9="} for row in rows_with(1, 3))]
    found, _ = drawn_on(clash, 4, 2, proven=False)
    for drawn in found:
        assert drawn.keys[0] == "p1" and re.fullmatch("p1/[0-9a-f]{32}", drawn.keys[2])
    odd = [*rows_with(1, 2, 3), *({"prompt": "1", "prompt_id": 0.5} for _ in range(4))]
    found, _ = drawn_on(odd, 4, 2)
    assert all("must hold strings or whole numbers" in str(error) for error in found)


# -- the cost of checks -----------------------------------------------------------------------------------------------


def random_arrays(rng, depth):
    """Two lists of random nested values, equal in most places."""

    def value(kind):
        if rng.random() < 0.2:
            return None
        if kind == "struct":
            return {"a": value("number"), "b": value("list") if depth else None}
        if kind == "list":
            return [value("struct" if depth else "number") for _ in range(rng.integers(0, 3))]
        return {"number": float(rng.choice([0.5, 1.5, np.nan])), "text": str(rng.choice(["", "a", "b"]))}[kind]

    kind = str(rng.choice(["struct", "list", "number", "text"]))
    one = [value(kind) for _ in range(30)]
    return one, [value(kind) if rng.random() < 0.3 else kept for kept in one]


def test_rows_are_compared_in_arrow_as_in_python():
    rng = np.random.default_rng(0)
    outcomes = Counter()
    for _ in range(300):
        one, other = random_arrays(rng, int(rng.integers(0, 2)))
        both = pa.array([*one, *other])
        left, right = both.slice(0, 30), both.slice(30, 30)
        # repr makes a NaN equal a NaN; to_pylist fills in the missing fields of structs
        expected = [repr(a) == repr(b) for a, b in zip(left.to_pylist(), right.to_pylist(), strict=True)]
        assert equal_values(left, right).tolist() == expected, (one, other)
        outcomes.update(expected)
    assert min(outcomes.values()) > 1000
    words = pa.array(["a", "b", None, "a"]).dictionary_encode()
    assert equal_values(words, words.take([1, 1, 2, 3])).tolist() == [False, True, True, True]


def test_rows_are_taken_from_all_chunks_in_order():
    data = concatenate_datasets([Dataset.from_dict({"a": [[k], [k, None]], "b": [f"{k}", None]}) for k in range(20)])
    rows = np.random.default_rng(0).integers(0, 40, 100)
    found = rows_of(data.data, rows)
    assert found.to_pylist() == [data[int(row)] for row in rows]


@pytest.mark.parametrize("case", ["plain", "shuffled", "twice", "twice, shuffled"])
def test_two_hundred_thousand_ids_cost_less_than_a_second(case):
    rows = 100_000 if "twice" in case else 200_000
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"{k}+1="}] for k in range(rows)],
            "answer": list(range(rows)),
            "prompt_id": [f"p{k}" for k in range(rows)],
        }
    )
    data = {
        "plain": lambda: data,
        "shuffled": lambda: data.shuffle(seed=0),
        "twice": lambda: concatenate_datasets([data, data]),
        "twice, shuffled": lambda: concatenate_datasets([data, data]).shuffle(seed=0),
    }[case]()
    started = time.process_time()
    assert check_dataset(data, "prompt_id")
    checked = time.process_time()
    assert len(prompt_keys(data, Identity("prompt_id"))) == rows
    assert checked - started < 1 and time.process_time() - checked < 1


def test_a_resume_does_not_hash_a_large_data_set_without_ids():
    small = Dataset.from_dict({"prompt": [f"{k}" for k in range(100)]})
    assert prompt_keys(small, Identity("prompt_id")) == {prompt_key(row, "prompt_id") for row in small}
    large = Dataset.from_dict({"prompt": [f"{k}" for k in range(20_000)]})
    wide = Dataset.from_dict({"prompt": ["x" * 1_000_000] * 100})
    for data in (large, wide, small.with_transform(lambda batch: batch), small.to_iterable_dataset()):
        assert prompt_keys(data, Identity("prompt_id")) is None


# -- runs in which nothing can happen ---------------------------------------------------------------------------------

WITHOUT_EFFECT = {
    "one prompt": ({"num_generations": 16, "max_steps": 60}, "a step has one prompt.*per_device_train_batch_size"),
    "minimum": ({"min_rollouts": 4, "max_steps": 60}, "equals min_rollouts.*lower min_rollouts to 2"),
    "two": ({"num_generations": 2, "max_steps": 60}, "equals min_rollouts.*Raise num_generations$"),
    "maximum": ({"max_rollouts": 4, "max_steps": 60}, "equals max_rollouts.*Raise max_rollouts"),
    "an epoch": ({"max_steps": -1, "num_train_epochs": 1}, "before any of the 24 prompts.*num_train_epochs"),
    "few steps": ({"max_steps": 6}, "before any of the 24 prompts.*max_steps"),
    "iterations": ({"max_steps": 12, "num_iterations": 2}, "before any of the 24 prompts"),
}

WITH_EFFECT = [
    {"max_steps": 7},
    {"max_steps": -1, "num_train_epochs": 2},
    {"max_steps": 12, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    {"max_steps": 60, "num_generations": 8},
]


def test_a_run_in_which_nothing_can_happen_says_so_once(tmp_path, caplog):
    for case, (settings, message) in WITHOUT_EFFECT.items():
        caplog.clear()
        tiny.trainer(KnapsackGRPOTrainer, tmp_path, **settings)
        found = [text.removesuffix(" (logged once)") for text in warnings_of(caplog)]
        assert len(found) == 1 and re.search(message, found[0]), (case, found)
        caplog.clear()
        tiny.trainer(KnapsackGRPOTrainer, tmp_path, allocation="uniform", **settings)
        assert warnings_of(caplog) == [], case
    for settings in WITH_EFFECT:
        tiny.trainer(KnapsackGRPOTrainer, tmp_path, **settings)
        assert warnings_of(caplog) == [], settings
    tiny.trainer(KnapsackGRPOTrainer, tmp_path, extra={"allocator": tiny.informed_allocator()})  # knows its prompts
    assert warnings_of(caplog) == []
    settings = {"max_steps": 5, "data": tiny.dataset(8)}
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, **settings)
    trainer.train()
    assert not any("stock GRPO" in text for text in warnings_of(caplog))


def test_what_the_warning_says_is_so(tmp_path):
    """Each of the runs that are warned about has the counts of the stock trainer in every step."""
    for case, (settings, _) in WITHOUT_EFFECT.items():
        short = settings | {"max_steps": min(settings["max_steps"], 8)}
        trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path / case, log_allocations=True, **short)
        trainer.train()
        mean = settings.get("num_generations", 4)
        counts = {
            count
            for row in trainer.state.log_history
            for count in (row.get("knapsack/budget_min", mean), row.get("knapsack/budget_max", mean))
        }
        assert counts == {mean}, case
