"""A tiny random language model, prompts and rewards for engine tests: made in code, no file needed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.estimation.named import BetaEstimator
from knapsack_rl.trl import KnapsackGRPOConfig

torch.set_num_threads(1)

CHARACTERS = "0123456789+=ab"

AS_STOCK = {"skip_zero_advantages": False, "share_prefill": False}
"""Other settings change the order of sums, so that parameters equal the stock trainer's but for rounding."""


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: k + 2 for k, character in enumerate(CHARACTERS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(CHARACTERS) + 2,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def dataset(prompts: int = 24, *, ids: bool = True) -> Dataset:
    """Distinct prompts; column ``answer`` names the prompt it belongs to, whatever the id is."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"{k}+{k % 7}=", "answer": f"answer of {k}+{k % 7}="} for k in range(prompts)
    ]
    if ids:
        rows = [row | {"prompt_id": f"p{k}"} for k, row in enumerate(rows)]
    return Dataset.from_list(rows)


def has_digit_five(completions: list[str], **_: Any) -> list[float]:
    """Success of a random model now and then: a digit 5 somewhere."""
    return [float("5" in completion) for completion in completions]


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [len(completion) / 10 for completion in completions]


def sometimes_none(completions: list[str], **_: Any) -> list[float | None]:
    return [None if completion.startswith("a") else float("7" in completion) for completion in completions]


def digit_sum(completions: list[str], **_: Any) -> list[float]:
    """A shaped reward with many values, not all of them exact in binary."""
    return [sum(int(character) for character in completion if character.isdigit()) / 10 for completion in completions]


def recording(function: Callable[..., Any], batches: list[dict[str, Any]]) -> Callable[..., Any]:
    """The reward function, noting what it was given and what it returned."""

    def recorded(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> Any:
        rewards = function(completions=completions, prompts=prompts, **columns)
        columns = {name: values for name, values in columns.items() if isinstance(values, list)}
        lengths = [len(ids) for ids in completion_ids]
        batches.append(
            columns | {"prompts": prompts, "completions": completions, "lengths": lengths, "rewards": rewards}
        )
        return rewards

    recorded.__name__ = function.__name__
    return recorded


def informed_allocator(prompts: int = 24, estimator: str = "beta", **settings: Any) -> KnapsackAllocator:
    """An allocator that knows all prompts of :func:`dataset`, very different ones, so that every batch is ragged."""
    allocator = KnapsackAllocator(BetaEstimator(discount=1.0) if estimator == "beta" else estimator, **settings)
    lengths = settings.get("budget_unit") == "tokens"
    for k in range(prompts):
        successes = (0, 1, 8, 16)[(k * 7 + k // 4) % 4]  # never solved, rarely, half the time, always
        rewards = [1.0] * successes + [0.0] * (16 - successes)
        allocator.observe([f"p{k}"] * 16, rewards, [1 + k % 5] * 16 if lengths else None)
    return allocator


def _sample_deviation(numbers: Sequence[float]) -> float:
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def reference_advantages(
    groups: Sequence[Any],
    rewards: Sequence[Sequence[float | None]],
    *,
    weights: Sequence[float] | None = None,
    scale: str = "group",
    gdpo: bool = False,
    weighting: str = "rollout",
    over_mean: bool = False,
) -> list[float]:
    """Advantages of ragged groups by definition, one row after the other.

    Args:
        groups: the prompt of each row.
        rewards: per reward function, the rewards of all rows, ``None`` where it gave none.
        weights: of the reward functions; 1 by default.
        scale: "group", "batch" or "none".
        gdpo: normalise each function inside its group, then the weighted sum over the batch.
        weighting: "rollout" or "prompt".
        over_mean: divide by the mean of the group, of one reward function of 0 and 1.
    """
    # TRL holds rewards and weights in single precision; what follows is in double.
    table = [[None if r is None else float(np.float32(r)) for r in column] for column in rewards]
    weights = [float(np.float32(weight)) for weight in weights or [1.0] * len(table)]
    rows = range(len(groups))
    scored = [row for row in rows if any(column[row] is not None for column in table)]

    def normalised(values: dict[int, float], how: str) -> dict[int, float]:
        everywhere = _sample_deviation(list(values.values())) if len(values) > 1 else 0.0
        found = {}
        for row, value in values.items():
            mates = [values[other] for other in values if groups[other] == groups[row]]
            if max(mates) - min(mates) <= 1e-6 * max(abs(mate) for mate in mates):
                found[row] = 0.0
                continue
            deviation = value - math.fsum(mates) / len(mates)
            spread = {"group": _sample_deviation(mates), "batch": everywhere, "none": 1 - 1e-4}[how]
            found[row] = deviation / (spread + 1e-4)
            if over_mean:
                found[row] = value * len(mates) / math.fsum(mates) - 1
        return found

    if gdpo:
        parts = [normalised({row: r for row, r in enumerate(column) if r is not None}, "group") for column in table]
        total = {row: sum(w * part.get(row, 0.0) for w, part in zip(weights, parts, strict=True)) for row in scored}
        mean, spread = math.fsum(total.values()) / len(total), _sample_deviation(list(total.values()))
        advantages = {row: (value - mean) / (spread + 1e-4) for row, value in total.items()}
    else:
        total = {row: sum(w * (c[row] or 0.0) for w, c in zip(weights, table, strict=True)) for row in scored}
        advantages = normalised(total, scale)
    if weighting == "prompt":
        sizes = {group: list(groups).count(group) for group in groups}
        advantages = {r: a * len(groups) / (len(sizes) * sizes[groups[r]]) for r, a in advantages.items()}
    return [advantages.get(row, 0.0) for row in rows]


def fingerprint(module: torch.nn.Module) -> str:
    """SHA1 over all parameters, bit for bit."""
    digest = hashlib.sha1()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of a small GRPO configuration that runs on a CPU."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    } | changes


def trainer(
    kind: type[GRPOTrainer],
    folder: Path,
    *rewards: Callable[..., Any],
    data: Any = None,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A silent trainer on the tiny model.

    Args:
        kind: its class; for the stock one, settings that only the knapsack configuration has are left out.
        folder: of the run.
        *rewards: functions, by default :func:`has_digit_five`.
        data: by default 24 prompts.
        extra: keyword arguments of the trainer that replace the default ones.
        **changes: to :func:`arguments`.
    """
    config: type[GRPOConfig] = KnapsackGRPOConfig
    if kind is GRPOTrainer:
        config, changes = GRPOConfig, {k: v for k, v in changes.items() if k in GRPOConfig.__dataclass_fields__}
    else:
        changes = {"log_metrics": "all"} | changes
    made: dict[str, Any] = {
        "model": model(),
        "reward_funcs": list(rewards) or [has_digit_five],
        "args": config(**arguments(folder, **changes)),
        "train_dataset": dataset() if data is None else data,
        "processing_class": tokenizer(),
    }
    found = kind(**(made | (extra or {})))
    found.remove_callback(PrinterCallback)
    return found


def leave(folder: Path, found: Any) -> None:
    """Write what a process saw for :func:`on_two_processes`, and end together with the others."""
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_two_processes(worker: str, folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Run a script of this folder under torchrun; return what each of the processes wrote to ``rank<n>.json``."""
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name(worker)), str(folder), *flags],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
