"""Settings of a training run: one flat dataclass, read from YAML and the command line, written into the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knapsack_rl.allocation.policies import BUDGET_UNITS
from knapsack_rl.allocation.value import VALUES
from knapsack_rl.estimation.named import ESTIMATORS, make_estimator
from knapsack_rl.estimation.protocol import check_choices
from knapsack_rl.runs import files as runfiles

RIVALS = ("oversample", "skip", "sequential")
"""Rules that generate in rounds, see :mod:`knapsack_rl.training.rivals`."""

ALLOCATIONS = ("knapsack", "paper", "paper-without-fallback", "uniform", *RIVALS)

WINDOW_ALLOCATIONS = ("paper", "paper-without-fallback")
"""Those whose estimator is the paper's window, whatever ``estimator`` says."""


MODEL_PRESETS = ("arithmetic-base", "smollm2-135m")
"""Models that need no hub; any other name is a Hugging Face folder or name."""


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of ``knapsack-rl train``. Every field is a flag and a key of the YAML file.

    Raises:
        ValueError: a value is out of range, or values contradict each other.
    """

    allocation: str = _option("knapsack", "how a step's rollouts are divided over its prompts", ALLOCATIONS)
    rollouts_per_prompt: int = _option(8, "mean rollouts per prompt; the budget of a step is this x prompts per step")
    prompts_per_step: int = _option(64, "prompts in a step")
    steps: int = _option(400, "training steps; rules that generate in rounds stop at the same number of rollouts")
    seed: int = _option(0, "seed of data order, sampling and initialisation")
    model: str = _option(
        "arithmetic-base", "arithmetic-base (ships), smollm2-135m (needs no hub), or any Hugging Face folder or name"
    )
    precision: str = _option(
        "auto",
        "numbers of forward and backward pass; auto is bfloat16 on accelerators",
        ("auto", "float32", "bfloat16"),
    )
    lora_rank: int = _option(0, "train LoRA adapters of this rank on all linear layers; 0 trains all weights")
    lora_alpha: int = _option(0, "scale of the adapters; 0 takes twice the rank")
    rollouts_per_pass: int = _option(0, "rollouts in one forward and backward pass of a process; 0 takes all at once")
    gradient_checkpointing: str = _option("off", "recompute activations to save memory", ("off", "on"))
    vllm: str = _option("off", "generate with vLLM beside the trainer, or on a server", ("off", "colocate", "server"))
    vllm_server: str = _option("http://localhost:8000", "address of the server (trl vllm-serve), with --vllm server")
    vllm_memory: float = _option(0.3, "share of the accelerator's memory that a colocated vLLM may take")
    dataset: str = _option(
        "arithmetic",
        "arithmetic, running-sums, sums, countdown, gsm8k, math, dapo-math-17k, reasoning-gym:TASK, a "
        "JSONL/CSV/parquet file, or a hub data set",
    )
    prompt_column: str = _option("prompt", "column of the prompt in a file or hub data set")
    answer_column: str = _option("answer", "column of the answer in a file or hub data set")
    dataset_path: str = _option("", "file or folder with a copy of a hub data set, read instead of the hub")
    dataset_config: str = _option("", "configuration of a hub data set, where it has several")
    dataset_split: str = _option("", "split of a hub data set that is trained on; empty for train")
    verifier: str = _option(
        "auto", "how answers of a file or hub data set are checked; auto is exact", ("auto", "exact", "number", "math")
    )
    prompt_template: str = _option("", "text with {prompt} in it, put around each prompt; empty takes the task's own")
    chat: str = _option("auto", "prompts as chat messages; auto where task and model are for it", ("auto", "on", "off"))
    train_prompts: int = _option(2048, "prompts trained on (the first ones of a file)")
    held_out_prompts: int = _option(512, "prompts only evaluated on")
    estimator: str = _option(
        "bayes-filter", "what is known of success rates, with --allocation knapsack", tuple(ESTIMATORS)
    )
    estimator_settings: str = _option("", "settings of the estimator, such as 'window=8,minimum=4'")
    value: str = _option(
        "knapsack", f"what is maximised, with --allocation knapsack: {', '.join(VALUES)} or package.module:function"
    )
    min_rollouts: int = _option(2, "fewest rollouts of a prompt; 0 lets prompts be skipped, one has no gradient")
    max_rollouts: int = _option(128, "most rollouts of a prompt")
    budget_unit: str = _option(
        "rollouts", "unit of a step's budget; tokens: what uniform allocation is expected to take", BUDGET_UNITS
    )
    replay: int = _option(0, "uses of a stored rare success of an unsolved prompt at most; 0 stores none")
    weighting: str = _option("rollout", "loss weight per rollout (the paper) or per prompt", ("rollout", "prompt"))
    learning_rate: float = _option(6e-4, "learning rate of AdamW, constant")
    updates_per_step: int = _option(1, "optimizer updates on each step's rollouts")
    loss_type: str = _option("dapo", "TRL's loss_type; dapo is the token mean", ("dapo", "grpo", "dr_grpo", "bnpo"))
    clip_low: float = _option(0.2, "lower clip range of the ratio")
    clip_high: float = _option(0.28, "upper clip range of the ratio")
    kl_coefficient: float = _option(0.0, "TRL's beta; 0 needs no reference model")
    temperature: float = _option(1.0, "sampling temperature")
    max_completion_tokens: int = _option(0, "longest answer in tokens; 0 takes the task's own, 256 for a file")
    eval_every: int = _option(20, "steps between evaluations on held-out prompts; 0 evaluates at start and end only")
    eval_samples: int = _option(4, "sampled answers per held-out prompt")
    save_every: int = _option(50, "steps between checkpoints; 0 saves only on interruption and at the end")
    threads: int = _option(0, "torch threads; 0 leaves torch's choice")
    report_to: str = _option("none", "a logger of the trainer: none, tensorboard, wandb, trackio")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            given = getattr(self, spec.name)
            kind = type(spec.default)
            if kind is float and isinstance(given, int) and not isinstance(given, bool):
                object.__setattr__(self, spec.name, float(given))
            elif type(given) is not kind:
                raise ValueError(f"{spec.name} must be {kind.__name__}, got {given!r}")
            choices = spec.metadata["choices"]
            if choices and given not in choices:
                raise ValueError(f"{spec.name} must be one of {', '.join(choices)}, got {given!r}")
        at_least = {
            "rollouts_per_prompt": 2, "prompts_per_step": 1, "steps": 1, "seed": 0, "train_prompts": 1,
            "held_out_prompts": 0, "min_rollouts": 0, "replay": 0, "updates_per_step": 1, "max_completion_tokens": 0,
            "eval_every": 0, "eval_samples": 1, "save_every": 0, "threads": 0, "lora_rank": 0, "lora_alpha": 0,
            "rollouts_per_pass": 0,
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
        if not self.min_rollouts <= self.rollouts_per_prompt <= self.max_rollouts:
            raise ValueError(
                f"min_rollouts <= rollouts_per_prompt <= max_rollouts must hold, got {self.min_rollouts}, "
                f"{self.rollouts_per_prompt}, {self.max_rollouts}"
            )
        if self.prompts_per_step > self.train_prompts:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} exceeds train_prompts {self.train_prompts}; lower it"
            )
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
        try:
            made = make_estimator(self.estimator_name, **self.estimator_options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"estimator_settings {self.estimator_settings!r}: {error}") from error
        check_choices(made, self.budget_unit, self.value, self.min_rollouts)
        if self.budget_unit == "tokens" and self.allocation != "knapsack":
            raise ValueError(f"budget_unit 'tokens' needs allocation 'knapsack', got {self.allocation!r}")
        if self.in_rounds and self.replay:
            raise ValueError(f"replay does not go with allocation {self.allocation!r} in {self.budget_unit}")
        if self.in_rounds and self.updates_per_step > 1:
            raise ValueError(
                f"updates_per_step must be 1 with allocation {self.allocation!r} and budget_unit {self.budget_unit!r}: "
                f"the rollouts of a step vary in number, got {self.updates_per_step}"
            )
        if self.in_rounds and self.rollouts_per_pass:
            raise ValueError(
                f"rollouts_per_pass must be 0 for allocation {self.allocation!r} and budget_unit {self.budget_unit!r}: "
                f"the rollouts of a step vary in number, got {self.rollouts_per_pass}"
            )

    @property
    def in_rounds(self) -> bool:
        """Whether the number of rollouts varies from step to step."""
        return self.allocation in RIVALS or self.budget_unit == "tokens"

    @property
    def total_rollouts(self) -> int | None:
        """Rollouts after which a run ends before its last step: rivals generate more in a step than the others."""
        return self.steps * self.budget if self.allocation in RIVALS else None

    @property
    def estimator_name(self) -> str:
        """Name of the estimator in use."""
        return "window" if self.allocation in WINDOW_ALLOCATIONS else self.estimator

    @property
    def estimator_options(self) -> dict[str, Any]:
        """Keyword arguments of the estimator in use.

        Raises:
            ValueError: ``estimator_settings`` is no list of ``name=value`` with numbers or ``true``, ``false``.
        """
        found: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in self.estimator_settings.split(","))):
            name, _, text = part.partition("=")
            try:
                found[name.strip()] = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{part!r} must be name=value with a number, true or false as the value") from error
        return found | ({"fallback": False} if self.allocation == "paper-without-fallback" else {})

    @property
    def budget(self) -> int:
        """Rollouts of a step."""
        return self.prompts_per_step * self.rollouts_per_prompt

    @property
    def label(self) -> str:
        """Short name of the policy and seed, good for a folder."""
        return f"{self.allocation}-n{self.rollouts_per_prompt}-seed{self.seed}"

    def to_yaml(self) -> str:
        """The settings as YAML, in the order of the fields."""
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
        ValueError: the file holds no mapping or is no YAML.
    """
    values = runfiles.read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    return values
