"""Settings of a training run: one flat dataclass, read from YAML and the command line, written into the run folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knapsack_rl.advantages import ADVANTAGES, OVER_MEAN, WEIGHTINGS, per_prompt
from knapsack_rl.estimation.named import WITH_POSTERIOR
from knapsack_rl.runs import files
from knapsack_rl.settings import AUTO, AllocationSettings, check_fields, option

MODEL_PRESETS = ("arithmetic-base", "smollm2-135m")
"""Models that need no hub; any other name is a Hugging Face folder or name."""

GRADE = "digits"
"""Column of the grade of the shipped tasks."""


@dataclass(kw_only=True)
class TrainSettings(AllocationSettings):
    """Settings of ``knapsack-rl train``. Every field, inherited ones included, is a flag and a key of the YAML file.

    Attributes:
        feature_columns: ``"auto"`` takes the grade of the shipped tasks, the column ``digits``, where the estimator
            has a use for it.

    Raises:
        ValueError: a value is out of range, or values contradict each other.
    """

    feature_columns: str = option(
        AUTO, "columns by which prompts are alike, such as 'level,topic'; auto: the shipped tasks' grade"
    )
    rollouts_per_prompt: int = option(4, "mean rollouts per prompt; the budget of a step is this x prompts per step")
    prompts_per_step: int = option(128, "prompts in a step")
    steps: int = option(400, "training steps")
    rollout_limit: int = option(0, "end the run once it generated so many rollouts; 0 for no limit")
    seed: int = option(0, "seed of data order, sampling and initialisation")
    model: str = option(
        "arithmetic-base", "arithmetic-base (ships), smollm2-135m (needs no hub), or any Hugging Face folder or name"
    )
    precision: str = option(
        "auto",
        "numbers of forward and backward pass; auto is bfloat16 on accelerators",
        ("auto", "float32", "bfloat16"),
    )
    lora_rank: int = option(0, "train LoRA adapters of this rank on all linear layers; 0 trains all weights")
    lora_alpha: int = option(0, "scale of the adapters; 0 takes twice the rank")
    rollouts_per_pass: int = option(0, "rollouts in one forward and backward pass of a process; 0 takes all at once")
    gradient_checkpointing: str = option("off", "recompute activations to save memory", ("off", "on"))
    vllm: str = option("off", "generate with vLLM beside the trainer, or on a server", ("off", "colocate", "server"))
    vllm_server: str = option("http://localhost:8000", "address of the server (trl vllm-serve), with --vllm server")
    vllm_memory: float = option(0.3, "share of the accelerator's memory that a colocated vLLM may take")
    dataset: str = option(
        "arithmetic",
        "arithmetic, running-sums, sums, countdown, gsm8k, math, dapo-math-17k, reasoning-gym:TASK, a "
        "JSONL/CSV/parquet file, or a hub data set",
    )
    prompt_column: str = option("prompt", "column of the prompt in a file or hub data set")
    answer_column: str = option("answer", "column of the answer in a file or hub data set")
    dataset_path: str = option("", "file or folder with a copy of a hub data set, read instead of the hub")
    dataset_config: str = option("", "configuration of a hub data set, where it has several")
    dataset_split: str = option("", "split of a hub data set that is trained on; empty for train")
    verifier: str = option(
        "auto", "how answers of a file or hub data set are checked; auto is exact", ("auto", "exact", "number", "math")
    )
    prompt_template: str = option("", "text with {prompt} in it, put around each prompt; empty takes the task's own")
    chat: str = option("auto", "prompts as chat messages; auto where task and model are for it", ("auto", "on", "off"))
    train_prompts: int = option(2048, "prompts trained on (the first ones of a file)")
    held_out_prompts: int = option(512, "prompts only evaluated on")
    replay: int = option(0, "most uses of a stored rare success of an unsolved prompt; 0 stores none")
    advantage: str = option(
        AUTO,
        "GRPO's (group-std), MaxRL's (group-mean), or against what is expected of a prompt (posterior-mean); auto is "
        "the last where the estimator has a posterior, else group-mean",
        (AUTO, *ADVANTAGES),
    )
    weighting: str = option(
        "auto", "loss weight per rollout (the paper) or prompt; auto fits the advantage", WEIGHTINGS
    )
    skip_zero_advantages: str = option(
        "auto",
        "train on rows with a gradient only; auto does so wherever it is exact, and not with uniform",
        ("auto", "on", "off"),
    )
    learning_rate: float = option(6e-4, "learning rate of AdamW, constant")
    updates_per_step: int = option(1, "parts into which a step's rollouts are split, an optimizer update each")
    num_iterations: int = option(2, "times that each step's rollouts are trained on, by a clipped ratio")
    loss_type: str = option("dapo", "TRL's loss_type; dapo is the token mean", ("dapo", "grpo", "dr_grpo", "bnpo"))
    clip_low: float = option(0.2, "lower clip range of the ratio")
    clip_high: float = option(0.28, "upper clip range of the ratio")
    kl_coefficient: float = option(0.0, "TRL's beta; 0 needs no reference model")
    temperature: float = option(1.0, "sampling temperature")
    max_completion_tokens: int = option(0, "longest answer in tokens; 0 takes the task's own, 256 for a file")
    eval_every: int = option(20, "steps between evaluations on held-out prompts; 0 evaluates at start and end only")
    eval_samples: int = option(4, "sampled answers per held-out prompt")
    save_every: int = option(50, "steps between checkpoints; 0 saves only on interruption and at the end")
    threads: int = option(0, "torch threads; 0 takes two for the shipped model on a CPU, else torch's choice")
    report_to: str = option("none", "a logger of the trainer: none, tensorboard, wandb, trackio")

    @property
    def columns(self) -> list[str]:
        """Names of the columns by which prompts are alike; none while the task is to decide."""
        return [] if self.feature_columns == AUTO else super().columns

    def __post_init__(self) -> None:
        check_fields(self, type(self))
        self.check_allocation(self.rollouts_per_prompt)
        at_least = {
            "rollouts_per_prompt": 2, "prompts_per_step": 1, "steps": 1, "seed": 0, "train_prompts": 1,
            "held_out_prompts": 0, "rollout_limit": 0, "replay": 0, "updates_per_step": 1, "num_iterations": 1,
            "eval_every": 0, "eval_samples": 1, "save_every": 0, "threads": 0, "lora_rank": 0, "lora_alpha": 0,
            "rollouts_per_pass": 0, "max_completion_tokens": 0,
        }  # fmt: skip
        for name, minimum in at_least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be >= {minimum}, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")
        for name in ("clip_low", "clip_high", "kl_coefficient"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.prompts_per_step > self.train_prompts:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} exceeds train_prompts {self.train_prompts}; lower it"
            )
        self.check_advantage(self.chosen_advantage)
        if not 0.0 < self.vllm_memory <= 1.0:
            raise ValueError(f"vllm_memory must be in (0, 1], got {self.vllm_memory}")
        if self.lora_alpha and not self.lora_rank:
            raise ValueError(f"lora_alpha {self.lora_alpha} needs lora_rank, which is 0")
        if self.prompt_template and "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template must hold {{prompt}}, where the prompt goes, got {self.prompt_template!r}"
            )
        if self.budget % self.updates_per_step:
            raise ValueError(f"the step's {self.budget} rollouts do not divide into {self.updates_per_step} updates")

    @property
    def chosen_advantage(self) -> str:
        """The advantage that is trained with."""
        if self.advantage != AUTO:
            return self.advantage
        return "posterior-mean" if self.estimator_in_use in WITH_POSTERIOR else "group-mean"

    def chosen_value(self, advantage: str | None = None) -> str:
        """As the parent; the advantage is that of these settings."""
        return super().chosen_value(advantage or self.chosen_advantage)

    @property
    def budget(self) -> int:
        """Rollouts of a step."""
        return self.prompts_per_step * self.rollouts_per_prompt

    @property
    def updates(self) -> int:
        """Optimizer updates of a step."""
        return self.updates_per_step * self.num_iterations

    @property
    def label(self) -> str:
        """Short name of the policy and seed, suitable for a folder."""
        over_mean = self.allocation == "uniform" and self.chosen_advantage in OVER_MEAN
        return f"{self.allocation}{'-mean' if over_mean else ''}-n{self.rollouts_per_prompt}-seed{self.seed}"

    def trains_like(self, other: TrainSettings) -> bool:
        """Return whether these are the same settings, whether or not weighting and value are named."""
        return self._named() == other._named()

    def _named(self) -> dict[str, Any]:
        advantage = self.chosen_advantage
        weighting = "prompt" if per_prompt(self.weighting, advantage) else "rollout"
        named = {"advantage": advantage, "weighting": weighting, "value": self.chosen_value()}
        return dataclasses.asdict(self) | named

    def to_yaml(self) -> str:
        """Return the settings as YAML, in the order of the fields."""
        import yaml

        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def settings_from(values: Mapping[str, Any], source: str) -> TrainSettings:
    """Make settings from a mapping.

    Raises:
        ValueError: a key is unknown or a value is not allowed; ``source`` is named.
    """
    known = {spec.name for spec in dataclasses.fields(TrainSettings)}
    unknown = sorted(str(key) for key in set(values) - known)
    if unknown:
        raise ValueError(f"{source}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    # YAML 1.1 reads 1e-4 as text, and on and off as booleans.
    floats = {spec.name for spec in dataclasses.fields(TrainSettings) if isinstance(spec.default, float)}
    switches = {spec.name for spec in dataclasses.fields(TrainSettings) if "off" in (spec.metadata["choices"] or ())}
    values = {name: _as_float(given) if name in floats else given for name, given in values.items()}
    words = {True: "on", False: "off"}
    values = {
        name: words[given] if name in switches and isinstance(given, bool) else given for name, given in values.items()
    }
    try:
        return TrainSettings(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _as_float(given: Any) -> Any:
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given  # refused by TrainSettings, which names it


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    values = files.read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    return values
