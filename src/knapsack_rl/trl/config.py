"""Configuration of the trainer: TRL's fields and those of the allocation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig

from knapsack_rl.advantages import ADVANTAGES, WEIGHTINGS, check_advantage
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.metrics import LOGGED
from knapsack_rl.settings import AllocationSettings


@dataclass
class KnapsackGRPOConfig(AllocationSettings, GRPOConfig):
    """TRL's ``GRPOConfig``, the fields of :class:`~knapsack_rl.settings.AllocationSettings`, and the following.

    ``num_generations`` is the mean number of rollouts per prompt.

    Attributes:
        advantage: ``"group-std"`` (GRPO's, ``scale_rewards="group"``); ``"group-mean"`` (MaxRL's, over the mean of the
            group's outcomes, 1 for a success and 0 for a failure); or ``"posterior-mean"`` (outcomes against what was
            expected by the prompt's history and the rest of the group, see
            :func:`~knapsack_rl.advantages.group_advantages`). By default ``scale_rewards`` decides.
        weighting: ``"rollout"`` (the paper: a prompt weighs in proportion to its rollouts), ``"prompt"`` (every
            prompt weighs the same, as under uniform allocation), or ``"auto"``: per prompt with advantages over a mean,
            per rollout with all else.
        prompt_id_column: column of a stable id per prompt; a row without an id is identified by a hash of its columns.
        outcome_reward: name of the reward function whose value, unweighted, is the outcome; by default the one that
            tells prompts apart best, found as the run goes, see :mod:`knapsack_rl.success`.
        reward_timeout: seconds that one call of a reward function may take, ``None`` for no limit. A longer call
            stops the run with an error that names the prompt.
        replay: most times that a rare success of an unsolved prompt is trained on again, see
            :mod:`knapsack_rl.trl.replay`; 0 for never.
        skip_zero_advantages: leave rows without a gradient out of the updates, see :mod:`knapsack_rl.trl.skipping`;
            ``None`` for wherever the gradient stays that of all rows, except with ``allocation="uniform"``, whose
            updates stay the stock trainer's bit for bit.
        share_prefill: pass a prompt through the model once for all its rollouts where transformers generates them, see
            :mod:`knapsack_rl.trl.prefill`; not with ``allocation="uniform"``, which stays the stock trainer, nor where
            weights are sharded.
        log_metrics: metrics in each line of the log: ``"core"`` (a dozen, and failures if there are any) or ``"all"``.
        log_allocations: append each generation's allocation and outcome to ``allocations.jsonl`` in ``output_dir``.
        log_samples: prompts of which sample completions are kept in ``samples.jsonl`` in ``output_dir``, 0 for none:
            the first one, the newest success and the newest failure that the main process generated, each cut to
            a few hundred characters.

    Raises:
        ValueError: the settings cannot work together; see :func:`check_settings`.
    """

    advantage: str | None = field(default=None, metadata={"help": f"{', '.join(ADVANTAGES)}; else scale_rewards."})
    weighting: str = field(default="auto", metadata={"help": "Loss weight per 'rollout' or 'prompt', or 'auto'."})
    prompt_id_column: str = field(default="prompt_id", metadata={"help": "Column of a stable id per prompt."})
    outcome_reward: str | None = field(default=None, metadata={"help": "Reward function that decides on success."})
    reward_timeout: float | None = field(default=None, metadata={"help": "Seconds that a reward function may take."})
    replay: int = field(default=0, metadata={"help": "Most uses of a stored rare success; 0 for none."})
    skip_zero_advantages: bool | None = field(default=None, metadata={"help": "Train on rows with a gradient only."})
    share_prefill: bool = field(default=True, metadata={"help": "Pass a prompt through the model once."})
    log_metrics: str = field(default="core", metadata={"help": "Metrics in the log: 'core' or 'all'."})
    log_allocations: bool = field(default=False, metadata={"help": "Append allocations to allocations.jsonl."})
    log_samples: int = field(default=0, metadata={"help": "Prompts of which completions are kept in samples.jsonl."})

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        check_settings(self)


_DEFAULTS = {
    own.name: own.default for own in fields(KnapsackGRPOConfig) if own.name not in {f.name for f in fields(GRPOConfig)}
}


def setting(args: Any, name: str) -> Any:
    """Return an allocation setting of ``args``, or its default if ``args`` is a plain ``GRPOConfig``."""
    return getattr(args, name, _DEFAULTS[name])


def check_settings(args: Any) -> AllocationSettings:
    """Refuse a configuration that cannot work, before a model is loaded; return the settings of the allocation.

    Raises:
        ValueError: bounds exclude ``num_generations``, an option is unknown, the estimator cannot serve the value, or
            ``generation_kwargs`` sets ``seed``.
    """
    found = AllocationSettings.of(args)
    found.check_allocation(args.num_generations, "num_generations")
    choices = {"weighting": WEIGHTINGS, "log_metrics": LOGGED}
    for name, allowed in choices.items():
        if setting(args, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {setting(args, name)!r}")
    check_advantage(setting(args, "advantage"), args.scale_rewards, "scale_rewards")
    found.check_advantage(setting(args, "advantage"))
    aggregation = getattr(args, "multi_objective_aggregation", "sum_then_normalize")
    if setting(args, "advantage") is not None and aggregation != "sum_then_normalize":
        raise ValueError(
            f"advantage={setting(args, 'advantage')!r} needs multi_objective_aggregation='sum_then_normalize', got "
            f"{aggregation!r}; leave one of them out"
        )
    for name in ("replay", "log_samples"):
        if setting(args, name) < 0:
            raise ValueError(f"{name} must be >= 0, got {setting(args, name)}")
    limit = setting(args, "reward_timeout")
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"reward_timeout must be None or a number of seconds > 0, got {limit!r}")
    if "seed" in (args.generation_kwargs or {}):
        raise ValueError("generation_kwargs must not set seed: every rollout of a prompt would be the same")
    return found


def without_effect(args: Any, allocator: KnapsackAllocator, data: Any) -> list[str]:
    """Return why a run cannot differ from one of the stock trainer, each reason with what to change.

    Args:
        args: the configuration.
        allocator: of the run.
        data: the data set; None if the environment makes the tasks.
    """
    if setting(args, "allocation") == "uniform":
        return []
    if data is None:
        return [
            "there is no data set: the environment chooses the tasks, so prompts cannot be told apart and training is "
            "that of stock GRPO. Give the trainer a train_dataset with a row for each task to allocate over them"
        ]
    mean, found = args.num_generations, []
    prompts = args.generation_batch_size // mean
    if prompts == 1:
        found.append(
            f"a step has one prompt: its {mean} rollouts are the whole generation batch, so there is nothing to divide "
            "and training is that of stock GRPO. Raise per_device_train_batch_size or gradient_accumulation_steps, or "
            "lower num_generations"
        )
    if mean == allocator.min_rollouts and allocator.budget_unit == "rollouts":
        found.append(
            f"num_generations={mean} equals min_rollouts, so no prompt can give up a rollout and training is that of "
            "stock GRPO. Raise num_generations" + (", or lower min_rollouts to 2" if mean > 2 else "")
        )
    if mean == allocator.max_rollouts and allocator.budget_unit == "rollouts":
        found.append(
            f"num_generations={mean} equals max_rollouts, so no prompt can get more and training is that of stock "
            "GRPO. Raise max_rollouts"
        )
    by_history = setting(args, "rounds") == 1 and isinstance(data, Dataset) and not len(allocator.tracker)
    if by_history and visits(args, len(data)) <= len(data):
        found.append(
            f"training ends before any of the {len(data)} prompts comes a second time. Nothing is known of a prompt at "
            "its first visit, so training is that of stock GRPO. Set rounds=2, raise num_train_epochs or max_steps, or "
            "use fewer prompts"
        )
    return found


def visits(args: Any, prompts: int) -> float:
    """Return how many prompts a run draws from a data set of this size, repeats included."""
    if args.max_steps <= 0:
        return args.num_train_epochs * prompts
    generations = args.max_steps * args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)
    return math.ceil(generations) * (args.generation_batch_size // args.num_generations)
