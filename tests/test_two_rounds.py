"""A step in two rounds on TRL: rows, advantages, joined batches and metrics."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.grpo_trainer import GRPOTrainer

import tiny
from knapsack_rl import KnapsackAllocator
from knapsack_rl.allocation.degradation import first_share
from knapsack_rl.runs.files import ALLOCATION_LOG
from knapsack_rl.trl import KnapsackGRPOTrainer
from knapsack_rl.trl.replay import loss_mask
from knapsack_rl.trl.two_rounds import by_process, join, merge_metrics, set_rewards
from strategies import no_deadline

TOLERANCE = 3e-7

# -- joined batches ----------------------------------------------------------------------------------------------------


def test_batches_are_joined_and_padded_with_what_trl_pads_with() -> None:
    first = {
        "prompt_ids": torch.tensor([[5, 6]]),
        "prompt_mask": torch.tensor([[1, 1]]),
        "completion_ids": torch.tensor([[7, 8, 9]]),
        "completion_mask": torch.tensor([[1, 1, 1]]),
        "advantages": torch.tensor([0.5]),
        "num_items_in_batch": torch.tensor(3),
        "tool_mask": torch.tensor([[1, 0, 1]]),
        "importance_sampling_ratio": torch.tensor([[0.5, 0.25, 2.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, -2.0, -3.0]]),
        "old_per_token_logps": None,
    }
    second = {
        "prompt_ids": torch.tensor([[4], [3]]),
        "prompt_mask": torch.tensor([[1], [1]]),
        "completion_ids": torch.tensor([[7, 1], [8, 2]]),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "advantages": torch.tensor([0.1, 0.2]),
        "num_items_in_batch": torch.tensor(3),
        "tool_mask": torch.tensor([[1, 1], [1, 1]]),
        "importance_sampling_ratio": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, -2.0], [-4.0, 0.0]]),
        "old_per_token_logps": None,
    }
    joined = join([first, second], pad_id=2)
    assert joined["prompt_ids"].tolist() == [[5, 6], [2, 4], [2, 3]]
    assert joined["prompt_mask"].tolist() == [[1, 1], [0, 1], [0, 1]]
    assert joined["completion_ids"].tolist() == [[7, 8, 9], [7, 1, 2], [8, 2, 2]]
    assert joined["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert joined["tool_mask"].tolist() == [[1, 0, 1], [1, 1, 1], [1, 1, 1]]
    assert joined["importance_sampling_ratio"].tolist() == [[0.5, 0.25, 2], [3, 4, 1], [5, 6, 1]]
    assert joined["sampling_per_token_logps"].tolist() == [[-1, -2, -3], [-1, -2, 0], [-4, 0, 0]]
    assert joined["advantages"].tolist() == pytest.approx([0.5, 0.1, 0.2])
    assert joined["num_items_in_batch"] == 6 and joined["old_per_token_logps"] is None
    sequences = {"importance_sampling_ratio": torch.tensor([[0.5]])}, {"importance_sampling_ratio": torch.ones(2, 1)}
    assert join(sequences, pad_id=2)["importance_sampling_ratio"].tolist() == [[0.5], [1], [1]]


@pytest.mark.parametrize("where", [0, 1])
def test_a_batch_with_images_or_with_tensors_that_the_other_lacks_is_refused(where: int) -> None:
    plain = {"advantages": torch.zeros(1)}
    for name in ("pixel_values", "tool_mask"):
        parts = [plain, plain]
        parts[where] = plain | {name: torch.zeros(1, 3)}
        with pytest.raises(ValueError, match=f"cannot be joined: TRL made {name}, .* set rounds=1"):
            join(parts, pad_id=0)


def test_rows_are_ordered_by_process_and_round() -> None:
    assert by_process([4, 2], 2).tolist() == [0, 1, 4, 2, 3, 5]
    assert by_process([4, 2], 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert by_process([3], 3).tolist() == [0, 1, 2]


@no_deadline
@given(rows=st.integers(1, 40), mean=st.integers(3, 16), least=st.integers(1, 3), parts=st.integers(1, 5))
def test_the_first_share_is_about_half_and_divides(rows: int, mean: int, least: int, parts: int) -> None:
    rows *= parts
    share = first_share(rows, mean, least, parts)
    assert share % parts == 0
    assert rows * max(2, least) <= share <= rows * mean
    assert rows * (mean // 2) <= share < rows * max(mean // 2, 2, least) + parts


# -- metrics -----------------------------------------------------------------------------------------------------------


def trl_metrics(rows: list[tuple[int, bool, int, int]]) -> dict[str, float]:
    """Metrics that TRL computes from (length, truncated, calls of tools, failed calls) of rows; NaN-free."""
    lengths, truncated, calls, failed = (np.array(column) for column in zip(*rows, strict=True))
    ended = lengths[~truncated.astype(bool)] if not truncated.all() else np.zeros(1)
    found = {"completions/clipped_ratio": truncated.mean(), "tools/call_frequency": calls.sum() / len(rows)}
    found["tools/failure_frequency"] = failed.sum() / calls.sum() if calls.sum() else 0.0
    for kind, statistic in {"mean": np.mean, "min": np.min, "max": np.max}.items():
        found[f"completions/{kind}_length"] = statistic(lengths)
        found[f"completions/{kind}_terminated_length"] = statistic(ended)
    return {name: float(number) for name, number in found.items()}


row = st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 3), st.just(0)).map(lambda r: (*r[:3], r[2] // 2))


@no_deadline
@given(first=st.lists(row, min_size=1, max_size=8), second=st.lists(row, min_size=1, max_size=8))
def test_metrics_of_both_rounds_are_those_of_all_rows(first: Any, second: Any) -> None:
    earlier = {"completions/mean_length": [7.5], "num_tokens": [3], "absent": [1.0]}
    metrics: dict[str, list[float]] = {name: list(values) for name, values in earlier.items()}
    entries = [{name: len(values) for name, values in metrics.items()}]
    for rows in (first, second):
        for name, number in trl_metrics(rows).items():
            metrics.setdefault(name, []).append(number)
        metrics["num_tokens"] = [len(rows)]
        entries.append({name: len(values) for name, values in metrics.items()})
    merge_metrics(metrics, entries, [len(first), len(second)])
    assert metrics.pop("num_tokens") == [len(second)] and metrics.pop("absent") == [1.0]
    for name, number in trl_metrics(first + second).items():
        assert metrics[name][:-1] == earlier.get(name, [])
        assert metrics[name][-1] == pytest.approx(number), name


def test_means_without_numbers_do_not_count() -> None:
    metrics = {"minutes": [2.0, 5.0], "a": [float("nan"), 4.0], "b": [float("nan")] * 2}
    merge_metrics(metrics, [{}, dict.fromkeys(metrics, 1), dict.fromkeys(metrics, 2)], [1, 2])
    assert metrics["minutes"] == [4.0] and metrics["a"] == [4.0] and np.isnan(metrics["b"]).all()
    assert len(metrics["b"]) == 1
    rewards = {"reward": [0.0], "reward_std": [0.0], "rewards/f/mean": [0.0], "rewards/f/std": [0.0]}
    set_rewards(rewards, np.array([[1.0], [np.nan], [0.0]]), np.array([2.0]), ["f"])
    assert rewards == {"reward": [1.0], "reward_std": [2**0.5], "rewards/f/mean": [0.5], "rewards/f/std": [0.5**0.5]}


# -- training ----------------------------------------------------------------------------------------------------------


class Watched(KnapsackGRPOTrainer):
    """Keeps what each step returned, and the advantages that are logged beside completions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.watched: list[dict[str, Any]] = []
        self.logged: list[dict[str, list[Any]]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.watched.append({name: tensor.clone() for name, tensor in output.items()})
        self.logged.append({name: list(self._logs[name]) for name in ("completion", "advantages")})
        return output


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> str:
    """TRL loads the reference of a KL term from the folder of the policy."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    return str(folder)


TWO_REWARDS = {"rewards": (tiny.digit_sum, tiny.length_reward), "reward_weights": [0.3, 1.7]}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "over the mean": {"advantage": "group-mean", "value": "likelihood"},
    "per prompt": {"weighting": "prompt"},
    "steps per generation": {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "two rewards": TWO_REWARDS,
    "gdpo": TWO_REWARDS | {"multi_objective_aggregation": "normalize_then_sum"},
    "scale batch, none rewards": {"rewards": (tiny.sometimes_none,), "scale_rewards": "batch"},
    "truncated, reference": {"mask_truncated_completions": True, "beta": 0.1},
    "replay": {"replay": 2},
}


@pytest.mark.trl_range
@pytest.mark.parametrize("case", CASES)
def test_a_step_in_two_rounds_trains_on_its_budget_with_the_advantages_of_whole_groups(
    tmp_path, saved_model, case: str
) -> None:
    settings = {"max_steps": 2, "num_generations": 6, "per_device_train_batch_size": 24} | CASES[case]
    functions = settings.pop("rewards", (tiny.has_digit_five,))
    rows, generated = settings["per_device_train_batch_size"] * settings.get("steps_per_generation", 1), []
    rewards = [tiny.recording(functions[0], generated), *functions[1:]]
    extra = {"model": saved_model} if settings.get("beta") else {}
    trainer = tiny.trainer(
        Watched, tmp_path, *rewards, data=tiny.dataset(16), extra=extra, rounds=2, log_allocations=True, **settings
    )
    trainer.train()
    assert not trainer.allocator.failures
    log = [json.loads(line) for line in (tmp_path / ALLOCATION_LOG).read_text().splitlines()]
    assert len(generated) == 2 * len(log) == 2 * len(trainer.watched)
    followed = 0
    for entry, output, first, second, logged in zip(
        log, trainer.watched, generated[::2], generated[1::2], trainer.logged, strict=True
    ):
        assert len(first["prompts"]) == rows // 2  # three of six for all
        assert set(Counter(first["prompts"]).values()) == {3}
        batch = {name: first[name] + second[name] for name in first}
        counts = dict(zip(entry["prompt_ids"], entry["counts"], strict=True))
        assert Counter(batch["prompt_id"]) == counts and sum(counts.values()) == rows
        if functions == (tiny.has_digit_five,):
            found = {i: set() for i in counts}
            for prompt, reward in zip(first["prompt_id"], first["rewards"], strict=True):
                found[prompt].add(reward)
            kinds = [{0.0}] if case == "over the mean" else [{0.0}, {1.0}]  # there only the first success counts
            gain = {prompt for prompt, outcomes in found.items() if outcomes in kinds}
            served = set(second["prompt_id"])
            assert served == gain if gain else served == counts.keys()
            followed += 0 < len(gain) < len(counts)
        if case == "replay":
            continue  # a stored success may stand in for a failure; the rest is checked without
        expected = tiny.reference_advantages(
            batch["prompts"],
            [function(completions=batch["completions"]) for function in functions],
            weights=settings.get("reward_weights"),
            scale=settings.get("scale_rewards", "group"),
            gdpo=case == "gdpo",
            weighting="prompt" if case in ("over the mean", "per prompt") else "rollout",
            over_mean=case == "over the mean",
        )
        np.testing.assert_allclose(output["advantages"].tolist(), expected, rtol=0, atol=TOLERANCE)
        assert max(map(abs, expected)) > 0.1
        assert logged["completion"] == batch["completions"]
        np.testing.assert_allclose(logged["advantages"], expected, rtol=0, atol=TOLERANCE)
        if case != "truncated, reference":
            assert output["completion_mask"].sum(dim=1).tolist() == batch["lengths"]
        assert output["num_items_in_batch"] == loss_mask(output).sum()
    assert followed or "rewards" in CASES[case]
    assert trainer.generated.rollouts == rows * len(log)
    assert trainer.allocator.tracker.records().rollouts.sum() == sum(sum(entry["scored"]) for entry in log)


class Twin(KnapsackGRPOTrainer):
    """Generates the rows of both rounds a second time, in one call of TRL, and keeps batches and metrics of both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self.twins: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        super().__init__(*args, **kwargs)

    def _generate_rows(self, rows: list[dict[str, Any]], step: Any) -> dict[str, Any]:
        self.rows += rows
        return super()._generate_rows(rows, step)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.rows = []
        output = super()._generate_and_score_completions(inputs)
        ours = {name: values[-1] for name, values in self._metrics["train"].items()}
        size, self.num_generations = self.num_generations, 1
        again = GRPOTrainer._generate_and_score_completions(self, [dict(row) for row in self.rows])
        self.num_generations = size
        stock = {name: self._metrics["train"][name].pop() for name in ours if "knapsack" not in name}
        self._scored = None
        self.twins.append((output, again, ours, stock))
        return output


def test_the_batch_and_its_metrics_are_those_of_one_call_with_the_same_completions(tmp_path, saved_model) -> None:
    """Greedy decoding of a peaked model: a prompt has the same completion in both rounds."""
    trainer = tiny.trainer(
        Twin, tmp_path, tiny.digit_sum, data=tiny.dataset(16), extra={"model": saved_model}, rounds=2,
        num_generations=6, per_device_train_batch_size=24, num_iterations=2, max_steps=4, beta=0.1, learning_rate=0.3,
        generation_kwargs={"do_sample": False},
    )  # fmt: skip
    trainer.train()
    assert len(trainer.twins) == 2
    for output, again, ours, stock in trainer.twins:
        assert output.keys() == again.keys() >= {"old_per_token_logps", "ref_per_token_logps"}
        assert len(output["completion_ids"].unique(dim=0)) > 1
        for name, tensor in again.items():
            if name.endswith("logps"):  # of padding they are arbitrary
                mask = again["completion_mask"].bool()
                torch.testing.assert_close(output[name][mask], tensor[mask], rtol=1e-4, atol=1e-5)
            elif name != "advantages":
                assert torch.equal(output[name], tensor), name
        for name, number in stock.items():
            if name not in ("num_tokens", "frac_reward_zero_std"):
                assert ours[name] == pytest.approx(number, rel=1e-5, nan_ok=True), name


def test_the_first_epoch_already_differs_from_stock_and_nothing_is_said_to_have_no_effect(tmp_path, caplog) -> None:
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, rounds=2, max_steps=2)
    assert "training is that of stock GRPO" not in caplog.text
    trainer.train()
    assert any(entry.get("knapsack/budget_max", 4) > 4 for entry in trainer.state.log_history)
    tiny.trainer(KnapsackGRPOTrainer, tmp_path, max_steps=2)
    assert "Set rounds=2" in caplog.text


def test_a_run_in_two_rounds_resumes_as_if_it_had_not_stopped(tmp_path) -> None:
    def run(folder, steps, resume=None):
        trainer = tiny.trainer(
            KnapsackGRPOTrainer, folder, rounds=2, max_steps=steps, lr_scheduler_type="constant",
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight", 4)
    run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", 4, resume=str(tmp_path / "stopped" / "checkpoint-2"))
    assert tiny.fingerprint(resumed.model) == tiny.fingerprint(straight.model)
    assert resumed.generated == straight.generated


def test_a_step_whose_second_round_cannot_be_allocated_is_divided_evenly(tmp_path, monkeypatch) -> None:
    generated: list[dict[str, Any]] = []
    trainer = tiny.trainer(KnapsackGRPOTrainer, tmp_path, tiny.recording(tiny.has_digit_five, generated), rounds=2)

    def failing(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(trainer.allocator, "top_up", failing)
    trainer.train()
    for first, second in zip(generated[::2], generated[1::2], strict=True):
        assert set(Counter(first["prompts"] + second["prompts"]).values()) == {4}
    assert trainer.state.log_history[-2]["knapsack/failures/top-up"] == 3


def test_without_a_rest_a_step_has_one_round(tmp_path) -> None:
    generated: list[dict[str, Any]] = []
    reward = tiny.recording(tiny.has_digit_five, generated)
    trainer = tiny.trainer(Watched, tmp_path, reward, rounds=2, min_rollouts=4)
    trainer.train()
    assert [len(batch["rewards"]) for batch in generated] == [16] * 3
    for batch, output in zip(generated, trainer.watched, strict=True):
        expected = tiny.reference_advantages(batch["prompts"], [batch["rewards"]])
        np.testing.assert_allclose(output["advantages"].tolist(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget_unit": "tokens"}, "rounds=2 .* got 'tokens'"),
        ({"allocation": "paper"}, "rounds=2 needs allocation='knapsack', got 'paper'"),
        ({"num_generations": 2}, "rounds=2 needs num_generations of at least 3, .* got 2"),
        ({"extra": {"allocator": KnapsackAllocator("beta")}}, "rounds=2: .* got BetaEstimator; set rounds=1"),
        ({"data": tiny.dataset().add_column("image", [None] * 24)}, "rounds=2 works on prompts and tools of text"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_construction(tmp_path, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(KnapsackGRPOTrainer, tmp_path, **{"rounds": 2} | settings)


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_divide_both_rounds_evenly(tmp_path) -> None:
    """2 x 15 rows are 6 prompts x 5; the first round has 12, the second 18, and groups straddle the processes."""
    ranks = tiny.on_two_processes("two_rounds_worker.py", tmp_path)
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert ranks[0]["end"] == ranks[1]["end"]
    straddling = 0
    for step, entry in enumerate(ranks[0]["log"]):
        rounds = [[rank["generated"][2 * step + k] for rank in ranks] for k in (0, 1)]
        assert [[len(part["prompts"]) for part in parts] for parts in rounds] == [[6, 6], [9, 9]]
        by_rank = [{name: rounds[0][r][name] + rounds[1][r][name] for name in rounds[0][r]} for r in (0, 1)]
        rows = {name: by_rank[0][name] + by_rank[1][name] for name in by_rank[0]}
        assert Counter(rows["prompt_id"]) == dict(zip(entry["prompt_ids"], entry["counts"], strict=True))
        straddling += len(set(by_rank[0]["prompts"]) & set(by_rank[1]["prompts"]))
        expected = tiny.reference_advantages(rows["prompts"], [rows["rewards"]])
        watched = [rank["watched"][step] for rank in ranks]
        found = watched[0]["advantages"] + watched[1]["advantages"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        assert watched[0]["items"] == watched[1]["items"] == sum(rows["lengths"])
        # TRL logs round by round.
        completions = [c for parts in rounds for part in parts for c in part["completions"]]
        prompts = [p for parts in rounds for part in parts for p in part["prompts"]]
        rewards = [r for parts in rounds for part in parts for r in part["rewards"]]
        for rank in watched:
            assert rank["logged"]["completion"] == completions
            in_log = tiny.reference_advantages(prompts, [rewards])
            np.testing.assert_allclose(rank["logged"]["advantages"], in_log, rtol=0, atol=TOLERANCE)
        metrics = ranks[0]["history"][step]
        assert metrics["reward"] == pytest.approx(np.mean(rewards))
        assert metrics["reward_std"] == pytest.approx(np.std(rewards, ddof=1))
        assert metrics["completions/mean_length"] == pytest.approx(np.mean(rows["lengths"]))
        work = [sum(part["lengths"]) for part in by_rank]
        assert metrics["knapsack/process_imbalance"] == pytest.approx(max(work) / np.mean(work))
    assert straddling
