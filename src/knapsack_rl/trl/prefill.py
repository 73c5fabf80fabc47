"""Generation that passes a prompt through the model once, however many rollouts it has.

``generate`` of transformers passes every row. The rows of a group begin alike, so here the cache of a prompt is made
once and copied for its rollouts. A row goes on from the cache of all but its last token, as with a prompt that was
cached before; its logits differ from those of a whole pass by rounding alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_ROWS = {"input_ids", "attention_mask", "generation_config"}
"""What TRL passes to ``generate`` for prompts of text alone."""


@contextmanager
def prompts_once(model: Any) -> Iterator[None]:
    """Within, ``model.generate`` passes rows of equal prompts through the model once.

    It does what it always did where that cannot be: with images, beams, another kind of cache than the plain one, or
    soft prompts; and where no two rows that follow each other are equal.

    Args:
        model: has the method ``generate`` of transformers; not sharded, because processes whose prompts differ make
            different numbers of passes.
    """
    stock, own = model.generate, vars(model).get("generate")

    def generate(**inputs: Any) -> Any:
        found = _prefilled(model, stock, **inputs) if set(inputs) == _ROWS else None
        return stock(**inputs) if found is None else stock(**inputs, **found)

    model.generate = generate
    try:
        yield
    finally:
        if own is None:
            del model.generate  # that of its class is back
        else:
            model.generate = own


def _prefilled(
    model: Any, generate: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, generation_config: Any
) -> dict[str, Cache] | None:
    """Return the cache of all but the last token of each row as an argument of ``generate``; None if there can be none.

    The pass is a ``generate`` of one token, which the cache does not hold, so that positions are those of the model.
    """
    rows = torch.cat([attention_mask, input_ids], dim=1)  # two prompts may be equal but for their padding
    _, which = torch.unique_consecutive(rows, dim=0, return_inverse=True)
    groups = int(which[-1]) + 1 if which.numel() else 0
    soft = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if groups == len(rows) or input_ids.shape[1] < 2 or soft or not _plain(generation_config):
        return None
    first = torch.searchsorted(which, torch.arange(groups, device=which.device))
    config = copy.deepcopy(generation_config)
    config.update(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, num_return_sequences=1)
    made = generate(
        input_ids=input_ids[first, :-1], attention_mask=attention_mask[first, :-1], generation_config=config
    )
    name = "cache" if "cache" in made else "past_key_values"  # new and old releases of transformers
    cache = made[name]
    layers = getattr(cache, "layers", ())
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    cache.batch_select_indices(which)
    return {name: cache}


def _plain(config: Any) -> bool:
    """Return whether a configuration samples row by row with the cache that grows."""
    return (
        config.use_cache is not False
        and config.cache_implementation in (None, "dynamic")
        and (config.num_beams or 1) == 1
        and (config.num_return_sequences or 1) == 1
    )
