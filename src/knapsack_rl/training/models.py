"""The model of a run: presets by name, precision, adapters, batches, and generation by vLLM."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from knapsack_rl.tasks import base_model_path
from knapsack_rl.tasks.data import TaskData
from knapsack_rl.training.checks import allowed_models, check_model
from knapsack_rl.training.data import stop_token
from knapsack_rl.training.processes import world_size
from knapsack_rl.training.settings import TrainSettings
from knapsack_rl.training.smollm2 import smollm2_folder

logger = logging.getLogger(__name__)

PRESETS = {"arithmetic-base": base_model_path, "smollm2-135m": smollm2_folder}
"""Functions that return the folders of ``MODEL_PRESETS``."""


def model_name(model: str) -> str:
    """Return the argument of ``from_pretrained`` for a model of the settings.

    Raises:
        ImportError: a package that the preset needs is missing.
        OSError: a preset could not be fetched.
    """
    return str(PRESETS[model]()) if model in PRESETS else model


def load_tokenizer(settings: TrainSettings) -> Any:
    """Return the model's tokenizer with padding on the left.

    Raises:
        ImportError: a package that the preset needs is missing.
        FileNotFoundError: a folder does not exist or holds no model.
        OSError: the model is unknown, or a preset could not be fetched.
    """
    check_model(settings.model)
    from_hub = settings.model not in PRESETS and not Path(settings.model).is_dir()
    if from_hub and not isinstance(try_to_load_from_cache(settings.model, "config.json"), str):
        logger.warning("no folder %s here; asking the hub for a model of this name", settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name(settings.model), padding_side="left")
    except (OSError, ValueError) as error:
        if settings.model in PRESETS:
            raise
        where = "neither a folder here nor available from the hub" if from_hub else "a folder without a tokenizer"
        raise OSError(
            f"the model {settings.model} is {where}: {' '.join(str(error).split())[:300]} ({allowed_models()})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: TrainSettings, task: TaskData, tokenizer: Any, trained: Path | None = None) -> Any:
    """Return the model, with the task's end of answers added to its end tokens.

    (TRL releases that stop only at the tokenizer's end token would otherwise generate up to the longest answer.)
    Trained weights stay in float32, so that small updates are not rounded away; weights frozen by LoRA are kept in the
    precision of the forward pass.

    Args:
        settings: model, precision and adapters.
        task: holds the text that ends answers.
        tokenizer: of the model.
        trained: a checkpoint whose weights or adapters are loaded instead.
    """
    frozen = settings.lora_rank and in_bfloat16(settings)
    name = str(trained) if trained and not settings.lora_rank else model_name(settings.model)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if frozen else torch.float32)
    stop = stop_token(task, tokenizer)
    if stop is not None:
        own = model.generation_config.eos_token_id
        ends = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
        model.generation_config.eos_token_id = list(dict.fromkeys([*ends, stop]))
    if trained and settings.lora_rank:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(trained), is_trainable=True)
    return model


def accelerated() -> bool:
    """Return whether an accelerator is available."""
    return torch.cuda.is_available()


def chosen_threads(settings: TrainSettings) -> tuple[int, str]:
    """Return the number of torch threads, 0 for torch's own choice, and the reason in words."""
    if settings.threads:
        return settings.threads, "as set"
    if (given := os.environ.get("OMP_NUM_THREADS")) is not None:
        return 0, f"OMP_NUM_THREADS={given}"
    if settings.model == "arithmetic-base" and not accelerated():
        few = min(2, os.cpu_count() or 1)
        return few, "more would wait for one another on a model this small; change with --threads"
    return 0, "torch's choice; change with --threads"


def in_bfloat16(settings: TrainSettings) -> bool:
    """Return whether forward and backward pass are in bfloat16."""
    return settings.precision == "bfloat16" or (settings.precision == "auto" and accelerated())


def adapter(settings: TrainSettings) -> Any:
    """Return the configuration of LoRA adapters; None if all weights are trained.

    Raises:
        ImportError: peft is not installed.
    """
    if not settings.lora_rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f'{error}. lora_rank needs: pip install "knapsack-rl[trl]"') from error
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        target_modules="all-linear",
    )


def batch_arguments(settings: TrainSettings) -> dict[str, Any]:
    """Return the fields of TRL's configuration that split a step's rollouts into updates, processes and passes.

    Raises:
        ValueError: the rollouts do not divide evenly.
    """
    processes = world_size()
    share, rest = divmod(settings.budget // settings.updates_per_step, processes)
    if rest:
        raise ValueError(
            f"the {settings.budget // settings.updates_per_step} rollouts of an update do not divide evenly over "
            f"{processes} processes; change prompts_per_step or rollouts_per_prompt"
        )
    at_once = settings.rollouts_per_pass or share
    passes, rest = divmod(share, at_once)
    if rest or at_once > share:
        raise ValueError(
            f"rollouts_per_pass {at_once} does not divide the {share} rollouts of a process per update; choose a "
            f"divisor of {share}"
        )
    return {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": passes,
        "steps_per_generation": passes * settings.updates_per_step,
    }


def vllm_arguments(settings: TrainSettings, stop: int | None) -> dict[str, Any]:
    """Return the fields of TRL's configuration that make vLLM generate; none if it is off.

    Args:
        settings: ``vllm`` selects how.
        stop: token that ends an answer in addition to the model's.

    Raises:
        ImportError: vLLM is not installed.
    """
    if settings.vllm == "off":
        return {}
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f'No module named vllm. vllm={settings.vllm} needs: pip install "knapsack-rl[trl,vllm]"')
    chosen: dict[str, Any] = {"use_vllm": True, "vllm_mode": settings.vllm}
    if settings.vllm == "colocate":
        chosen["vllm_gpu_memory_utilization"] = settings.vllm_memory
    else:
        chosen["vllm_server_base_url"] = settings.vllm_server
    if stop is not None:
        chosen["generation_kwargs"] = {"stop_token_ids": [stop]}
    return chosen
