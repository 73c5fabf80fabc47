"""Prompts are passed through the model once for all their rollouts, and the rollouts stay the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, Qwen3NextConfig

import tiny
from knapsack_rl.trl import KnapsackGRPOTrainer
from knapsack_rl.trl.prefill import prompts_once

SIZES = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
RAGGED = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3]
"""The prompt of each row."""


def inputs(group: list[int], **settings: Any) -> dict[str, Any]:
    """Rows of prompts of different lengths, padded on the left."""
    prompts = ["1+2=", "12+345=", "7=", "1+2=a"]
    rows = tiny.tokenizer()([prompts[k] for k in group], return_tensors="pt", padding=True)
    config = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": 1, "pad_token_id": 0} | settings
    return {
        "input_ids": rows["input_ids"],
        "attention_mask": rows["attention_mask"],
        "generation_config": GenerationConfig(**config),
    }


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """The tokens of each forward pass."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    yield seen
    hook.remove()


def generated(model: Any, given: dict[str, Any], *, once: bool) -> tuple[torch.Tensor, list[int]]:
    """Tokens and passes of a generation from a fixed seed."""
    torch.manual_seed(3)
    with passes(model) as seen:
        if once:
            with prompts_once(model):
                found = model.generate(**given)
        else:
            found = model.generate(**given)
    return found, seen


def sliding() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=4))


def recurrent() -> Any:
    """Every second layer keeps a state instead of keys and values."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        **SIZES,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        mlp_only_layers=[0, 1],
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("make", [tiny.model, sliding])
def test_rollouts_are_those_of_whole_passes(make: Any) -> None:
    model, given = make().eval(), inputs(RAGGED)
    stock, every = generated(model, given, once=False)
    ours, fewer = generated(model, given, once=True)
    assert torch.equal(ours, stock)
    length = given["input_ids"].shape[1]
    assert every[0] == len(RAGGED) * length
    assert fewer[:2] == [4 * (length - 1), len(RAGGED)]  # four prompts, then the last token of every row
    assert fewer[2:] == every[1:]
    assert "generate" not in vars(model)  # what it was before


@pytest.mark.parametrize("make", [tiny.model, sliding])
def test_the_cache_is_that_of_whole_passes(make: Any) -> None:
    """Sampling hides small differences: the logits of all tokens are compared too."""
    model = make().eval()
    given = inputs(RAGGED, do_sample=False, return_dict_in_generate=True, output_logits=True)
    whole: Any = generated(model, given, once=False)[0]
    ours: Any = generated(model, given, once=True)[0]
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(whole.logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "group", "settings"),
    [
        (tiny.model, [0, 1, 2, 3], {}),  # nothing to share
        (tiny.model, RAGGED, {"num_beams": 2, "do_sample": False}),
        (tiny.model, RAGGED, {"use_cache": False}),
        (tiny.model, RAGGED, {"cache_implementation": "static"}),
        (tiny.model, RAGGED, {"num_return_sequences": 2}),
    ],
)
def test_whole_passes_where_a_cache_cannot_be_shared(make: Any, group: list[int], settings: dict[str, Any]) -> None:
    model, given = make().eval(), inputs(group, **settings)
    stock, every = generated(model, given, once=False)
    ours, same = generated(model, given, once=True)
    assert torch.equal(ours, stock)
    assert same == every


def test_a_state_in_place_of_keys_and_values_is_not_copied() -> None:
    model, given = recurrent().eval(), inputs(RAGGED)
    assert torch.equal(generated(model, given, once=True)[0], generated(model, given, once=False)[0])


def test_other_inputs_than_text_are_left_alone() -> None:
    model, given = tiny.model().eval(), inputs(RAGGED)
    given |= {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    assert generated(model, given, once=True)[1] == generated(model, given, once=False)[1]


def test_a_failing_generation_leaves_the_model_as_it_was() -> None:
    model = tiny.model()
    with pytest.raises(ZeroDivisionError), prompts_once(model):
        raise ZeroDivisionError
    assert "generate" not in vars(model)
    model.generate = replaced = model.generate  # some libraries put their own there
    with prompts_once(model):
        assert model.generate is not replaced
    assert model.generate is replaced


@pytest.mark.trl_range
@pytest.mark.parametrize("allocation", ["knapsack", "uniform"])
def test_training_prefills_every_prompt_once(allocation: str, tmp_path: Any) -> None:
    """The same rollouts and losses, from fewer tokens; uniform allocation stays the stock trainer."""
    found = {}
    for share in (False, True):
        batches: list[dict[str, Any]] = []
        trainer = tiny.trainer(
            KnapsackGRPOTrainer,
            tmp_path / f"{allocation}-{share}",
            tiny.recording(tiny.digit_sum, batches),
            allocation=allocation,
            share_prefill=share,
        )
        with passes(trainer.model) as seen:
            trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found[share] = ([batch["completions"] for batch in batches], losses, sum(seen))
    assert found[True][0] == found[False][0]
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5)
    assert (found[True][2] < found[False][2]) == (allocation == "knapsack")
