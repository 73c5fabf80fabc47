"""A tiny random model, a byte tokenizer and data, made in code."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MODULI = ("0", "1", "2", "8")
"""Ground truths: never, always, half of the time, rarely; see :func:`compute_score`."""


def make_model(folder: Path) -> Path:
    """Write model and tokenizer and return their folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: k + 2 for k, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    return folder


def make_data(path: Path, prompts: int, *, source: str = "numbers") -> Path:
    """Write a parquet file as verl reads it and return its path."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"{source} {k}="}],
            "reward_model": {"style": "rule", "ground_truth": MODULI[k % 4]},
            "extra_info": {"index": k, "split": "train"},
        }
        for k in range(prompts)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info=None, **_: object) -> dict:
    """Reward 1 where the sum of the characters is a multiple of the modulus; a modulus of 0 is never met."""
    modulus = int(ground_truth)
    right = modulus > 0 and sum(map(ord, solution_str)) % modulus == 0
    return {"score": float(right), "acc": float(right)}
