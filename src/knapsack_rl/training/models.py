"""The model of a run: presets by name, precision, adapters, and where it generates."""

from __future__ import annotations

import importlib.util
import logging
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
"""Where those of ``MODEL_PRESETS`` are."""


def model_name(model: str) -> str:
    """What ``from_pretrained`` takes for a model of the settings.

    Raises:
        ImportError: a preset needs a package.
        OSError: a preset could not be fetched.
    """
    return str(PRESETS[model]()) if model in PRESETS else model


def load_tokenizer(settings: TrainSettings) -> Any:
    """The model's tokenizer, padding on the left.

    Raises:
        ImportError: a preset needs a package.
        FileNotFoundError: a folder is not there, or holds no model.
        OSError: there is no such model, or a preset could not be fetched.
    """
    check_model(settings.model)
    from_hub = settings.model not in PRESETS and not Path(settings.model).is_dir()
    if from_hub and not isinstance(try_to_load_from_cache(settings.model, "config.json"), str):
        logger.warning("there is no folder %s here: asking the hub for a model of this name", settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name(settings.model), padding_side="left")
    except (OSError, ValueError) as error:
        if settings.model in PRESETS:
            raise
        where = "neither a folder here nor to be had from the hub" if from_hub else "a folder without a tokenizer"
        raise OSError(
            f"the model {settings.model} is {where}: {' '.join(str(error).split())[:300]} ({allowed_models()})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: TrainSettings, task: TaskData, tokenizer: Any, trained: Path | None = None) -> Any:
    """The model, with the task's end of answers among its own.

    (TRL releases that end generation at the tokenizer's own end only let answers go on to the longest allowed.)
    Weights that are trained stay in float32, so that small updates are not rounded away; those that LoRA freezes are
    kept in the precision of the forward pass.

    Args:
        settings: name the model, its precision and adapters.
        task: names the end of answers.
        tokenizer: of the model.
        trained: a checkpoint whose weights, or whose adapters, are taken instead.
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
    """Whether there is an accelerator to train on."""
    return torch.cuda.is_available()


def in_bfloat16(settings: TrainSettings) -> bool:
    """Whether forward and backward pass are in bfloat16."""
    return settings.precision == "bfloat16" or (settings.precision == "auto" and accelerated())


def adapter(settings: TrainSettings) -> Any:
    """The configuration of LoRA adapters; None where all weights are trained.

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
    """How a step's rollouts are cut into updates, processes and passes; fields of TRL's configuration.

    Raises:
        ValueError: the rollouts do not divide.
    """
    processes = world_size()
    share, rest = divmod(settings.budget // settings.updates_per_step, processes)
    if rest:
        raise ValueError(
            f"an update's {settings.budget // settings.updates_per_step} rollouts do not divide over {processes} "
            "processes; change prompts_per_step or rollouts_per_prompt"
        )
    at_once = settings.rollouts_per_pass or share
    passes, rest = divmod(share, at_once)
    if rest or at_once > share:
        raise ValueError(
            f"rollouts_per_pass {at_once} does not divide the {share} rollouts that a process has per update; choose "
            f"a divisor of {share}"
        )
    return {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": passes,
        "steps_per_generation": passes * settings.updates_per_step,
    }


def vllm_arguments(settings: TrainSettings, stop: int | None) -> dict[str, Any]:
    """Fields of TRL's configuration that let vLLM generate; none where it is off.

    Args:
        settings: ``vllm`` says how.
        stop: token that ends an answer besides the model's own.

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
