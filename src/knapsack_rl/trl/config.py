"""Configuration of the trainer: TRL's own, and how to allocate."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.estimation.named import ESTIMATORS, make_estimator
from knapsack_rl.estimation.protocol import check_choices


@dataclass
class KnapsackGRPOConfig(GRPOConfig):
    """TRL's ``GRPOConfig`` and how to allocate. ``num_generations`` is the mean number of rollouts per prompt.

    Attributes:
        allocation: ``"knapsack"``, or ``"uniform"`` for stock GRPO with the same metrics.
        estimator: ``"bayes-filter"``, ``"empirical-bayes"``, ``"beta"``, or ``"window"`` for the paper's rule with
            its fallback.
        min_rollouts: fewest rollouts of a prompt, up to num_generations. 0 lets prompts be skipped until another look
            is worth its rollouts; with 1 a prompt may get a single rollout, which is observed but has no gradient.
        max_rollouts: most rollouts of a prompt, >= num_generations.
        value: what is maximised, by name: ``"knapsack"`` (the paper's), ``"nonzero-gradient"``, ``"variance"``,
            ``"signal-to-noise"`` or ``"fitted"``; of the estimators those on a grid take another than the paper's.
        prompts_per_step: ``"fixed"``, or ``"varying"``: every step has the same rollouts, but prompts wait in a queue
            and as many are served as the rollouts pay for at one price for all steps, see
            :mod:`knapsack_rl.trl.queue`.
        weighting: ``"rollout"`` (the paper: a prompt weighs in proportion to its rollouts) or ``"prompt"`` (every
            prompt weighs the same, as under uniform allocation).
        prompt_id_column: column of a stable id per prompt; without the column the prompt's text is hashed.
        success_threshold: an outcome above it counts as success.
        outcome_reward: name of the reward function whose value is the outcome; by default the first one that scored
            the rollout. Unlike the training reward it is neither weighted nor summed.
        reward_timeout: seconds that one call of a reward function may take, ``None`` for no limit. One that takes
            longer stops the run with an error that names the prompt.
        replay: how often a rare success of an unsolved prompt is trained on again at most, see
            :mod:`knapsack_rl.trl.replay`; 0 for never.
        log_allocations: append each generation's allocation and outcome to ``allocations.jsonl`` in ``output_dir``.
        log_samples: prompts of which sample completions are kept in ``samples.jsonl`` in ``output_dir``, 0 for none:
            the first one, the newest success and the newest failure that the main process generated, each cut to
            some hundred characters.

    Raises:
        ValueError: the settings cannot work together; see :func:`check_settings`.
    """

    allocation: str = field(default="knapsack", metadata={"help": "'knapsack' or 'uniform'."})
    estimator: str = field(default="bayes-filter", metadata={"help": "Name of an estimator of success rates."})
    min_rollouts: int = field(default=2, metadata={"help": "Fewest rollouts of a prompt."})
    max_rollouts: int = field(default=128, metadata={"help": "Most rollouts of a prompt."})
    value: str = field(default="knapsack", metadata={"help": "Name of the value that is maximised."})
    prompts_per_step: str = field(default="fixed", metadata={"help": "'fixed', or 'varying' at one price."})
    weighting: str = field(default="rollout", metadata={"help": "Loss weight per 'rollout' or per 'prompt'."})
    prompt_id_column: str = field(default="prompt_id", metadata={"help": "Column of a stable id per prompt."})
    success_threshold: float = field(default=0.0, metadata={"help": "An outcome above it is a success."})
    outcome_reward: str | None = field(default=None, metadata={"help": "Reward function that tells success."})
    reward_timeout: float | None = field(default=None, metadata={"help": "Seconds that a reward function may take."})
    replay: int = field(default=0, metadata={"help": "Uses of a stored rare success at most; 0 for none."})
    log_allocations: bool = field(default=False, metadata={"help": "Append allocations to allocations.jsonl."})
    log_samples: int = field(default=0, metadata={"help": "Prompts of which completions are kept in samples.jsonl."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)


_DEFAULTS = {
    own.name: own.default for own in fields(KnapsackGRPOConfig) if own.name not in {f.name for f in fields(GRPOConfig)}
}


def setting(args: Any, name: str) -> Any:
    """An allocation setting of ``args``, or its default where ``args`` is a plain ``GRPOConfig``."""
    return getattr(args, name, _DEFAULTS[name])


def check_settings(args: Any, allocator: KnapsackAllocator | None = None) -> None:
    """Refuse a configuration that cannot work, before a model is loaded.

    Args:
        args: the configuration.
        allocator: the user's own, if there is one.

    Raises:
        ValueError: the allocator's budget is in tokens, bounds exclude ``num_generations``, an option is unknown, the
            estimator cannot serve the value, or ``generation_kwargs`` sets ``seed``.
    """
    if allocator is not None and allocator.budget_unit != "rollouts":
        raise ValueError(
            f"TRL generates the same number of rows in every step, so the allocator's budget_unit must be 'rollouts', "
            f"got {allocator.budget_unit!r}; budgets in tokens are for loops of your own"
        )
    low, high, mean = setting(args, "min_rollouts"), setting(args, "max_rollouts"), args.num_generations
    if not 0 <= low <= mean <= high:
        raise ValueError(
            "0 <= min_rollouts <= num_generations <= max_rollouts must hold, got "
            f"min_rollouts={low}, num_generations={mean}, max_rollouts={high}"
        )
    if setting(args, "replay") < 0:
        raise ValueError(f"replay must be >= 0, got {setting(args, 'replay')}")
    choices = {
        "allocation": ("knapsack", "uniform"),
        "prompts_per_step": ("fixed", "varying"),
        "weighting": ("rollout", "prompt"),
        "estimator": tuple(ESTIMATORS),
    }
    for name, allowed in choices.items():
        if setting(args, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {setting(args, name)!r}")
    if setting(args, "prompts_per_step") == "varying" and setting(args, "allocation") == "uniform":
        raise ValueError("prompts_per_step='varying' needs allocation='knapsack', got 'uniform'")
    if setting(args, "log_samples") < 0:
        raise ValueError(f"log_samples must be >= 0, got {setting(args, 'log_samples')}")
    check_choices(make_estimator(setting(args, "estimator")), "rollouts", setting(args, "value"), low)
    limit = setting(args, "reward_timeout")
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"reward_timeout must be None or a number of seconds > 0, got {limit!r}")
    if "seed" in (args.generation_kwargs or {}):
        raise ValueError("generation_kwargs must not set seed: every rollout of a prompt would be the same")
