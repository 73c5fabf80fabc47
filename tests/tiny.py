"""A tiny random language model, prompts and rewards for engine tests: made in code, no file needed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+=ab"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: k + 2 for k, character in enumerate(CHARACTERS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


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
    rows: list[dict[str, Any]] = [{"prompt": f"{k}+{k % 7}="} for k in range(prompts)]
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
