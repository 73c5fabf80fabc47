"""Launching verl with the plug-in: its settings, the overrides that switch it on, and the checks before a run.

Nothing here imports verl, so that a launch line can be made and checked on any machine. A configuration is a nested
mapping: verl's own (OmegaConf) or plain dictionaries.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from knapsack_rl.advantages import Advantage
from knapsack_rl.metrics import LOGGED
from knapsack_rl.settings import LEAST_OF_TWO_ROUNDS, LISTED, AllocationSettings, check_fields, option

MANAGER_KEY = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
SAMPLER_PATH_KEY = "trainer.v1.sampler.custom_sampler.path"
SAMPLER_NAME_KEY = "trainer.v1.sampler.custom_sampler.name"
CALLBACK_KEY = "trainer.checkpoint_callback_class"
SETTINGS_KEY = "trainer.v1.sampler.sampler_kwargs"

REFILL_KEY = "trainer.v1.sampler.sync_refill_failed_groups"
"""verl's setting by which a synchronous step replaces prompts of which all rollouts failed."""

SWITCHES = {
    MANAGER_KEY: "knapsack_rl.verl.KnapsackAgentLoopManager",
    SAMPLER_PATH_KEY: "pkg://knapsack_rl.verl",
    SAMPLER_NAME_KEY: "KnapsackReplayBuffer",
    CALLBACK_KEY: "knapsack_rl.verl.KnapsackCheckpoint",
}
"""The overrides that switch the plug-in on."""

ADDED = (MANAGER_KEY,)
"""Keys that verl's YAML may lack, so Hydra needs ++ in front, as for the keys below SETTINGS_KEY."""

ESTIMATORS_OVER_MEAN: dict[str, Advantage] = {
    "knapsack_group_mean": "group-mean",
    "knapsack_posterior_mean": "posterior-mean",
}
"""The plug-in's estimators in verl's registry, and their advantages; the replay buffer registers them."""

UNGROUPED = ("gae", "remax", "reinforce_plus_plus")
"""verl's advantage estimators without groups: their gradient is not zero where all rewards of a prompt are equal."""


@dataclass(kw_only=True)
class VerlSettings(AllocationSettings):
    """Settings of the plug-in: the keys below ``trainer.v1.sampler.sampler_kwargs``.

    The fields of :class:`~knapsack_rl.settings.AllocationSettings`, and the following.

    Attributes:
        prompt_id: identifies a prompt: ``"index"`` (data_source and extra_info.index), ``"hash"`` (the prompt itself),
            or another key of extra_info, used together with data_source.
        feature_columns: here columns of verl's batch, or keys of extra_info.
        outcome: ``"reward"``, or the name of a value that the reward function returns beside its score (``acc``).
        log_metrics: metrics of each step: ``"core"`` (a dozen, and failures if there are any) or ``"all"``.
        log_allocations: append each batch's allocation and outcome to allocations.jsonl in trainer.default_local_dir.
        watch: log signs of failure once each, and append them to warnings.jsonl in trainer.default_local_dir.
        poll_interval: seconds between checks of the replay buffer for finished groups; verl's default is 2.

    Raises:
        ValueError: a setting is out of range.
    """

    prompt_id: str = option("index", "identifies a prompt: index, hash, or a key of extra_info")
    outcome: str = option("reward", "reward, or a value that the reward function returns beside its score")
    log_metrics: str = option("core", "metrics of each step: a dozen (core) or all", LOGGED)
    log_allocations: bool = option(False, "append allocations to allocations.jsonl")
    watch: bool = option(False, "log signs of failure, each once")
    poll_interval: float = option(2.0, "seconds between checks for finished groups")

    def __post_init__(self) -> None:
        check_fields(self, type(self))
        self.check_allocation()
        if self.min_rollouts == 1:
            raise ValueError(
                "min_rollouts must be 0 (prompts may be skipped) or at least 2, got 1: verl gives a group of one its "
                "raw reward as advantage"
            )
        if not 0 < self.poll_interval < math.inf:
            raise ValueError(f"poll_interval must be seconds above 0, got {self.poll_interval!r}")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any] | None) -> VerlSettings:
        """Return settings from the sampler's keyword arguments; unknown keys are refused.

        Raises:
            ValueError: a key is unknown or a value out of range.
        """
        values = {str(name): value for name, value in (given or {}).items()}
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
                raise ValueError(f"{SETTINGS_KEY} has no setting {name!r}{hint}")
        return cls(**values)


def overrides(settings: VerlSettings) -> list[str]:
    """Return the overrides that switch the plug-in on with these settings, without defaults."""
    lines = [f"{'++' if key in ADDED else ''}{key}={value}" for key, value in SWITCHES.items()]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            if field.name in LISTED:  # a list for Hydra, which would take commas for a sweep
                value = f"[{','.join(settings.columns)}]"
            lines.append(f"++{SETTINGS_KEY}.{field.name}={value}")
    return lines


def parse_overrides(given: Iterable[str]) -> dict[str, Any]:
    """Return Hydra overrides ``key=value`` as nested dictionaries, as far as the checks need them.

    Raises:
        ValueError: an argument is not an override.
    """
    config: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        path = key.lstrip("+").split(".")
        if not equals or not all(path):
            raise ValueError(f"{text!r} is not an override of verl; write key=value, as on the command line of verl")
        inner = config
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{text!r} contradicts an earlier override: {part!r} already is a value")
        inner[path[-1]] = _value_of(value)
    return config


def _value_of(text: str) -> Any:
    plain = text.strip().strip("'\"")
    named = {"true": True, "false": False, "null": None}
    if plain.lower() in named:
        return named[plain.lower()]
    for kind in (int, float):
        try:
            return kind(plain)
        except ValueError:
            continue
    return plain


def pick(config: Any, path: str, default: Any = None) -> Any:
    """Return the value at a dotted path, or the default if a part of the path is missing or null."""
    for part in path.split("."):
        if not isinstance(config, Mapping) and not hasattr(config, "get"):
            return default
        config = config.get(part)
        if config is None:
            return default
    return config


def check_config(config: Any, settings: VerlSettings, *, switched_on: bool = True) -> None:
    """Refuse a configuration that cannot work, before a worker starts.

    Args:
        config: verl's configuration, or the known part of it; missing keys have verl's defaults.
        settings: of the plug-in.
        switched_on: also check that all overrides of the plug-in are present.

    Raises:
        ValueError: one line for each problem, with what is allowed and the fix.
    """
    problems = [
        *_group_problems(config, settings),
        *_feature_problems(config),
        *_advantage_problems(config, settings),
        *_size_problems(config),
        *_round_problems(config, settings),
    ]
    if switched_on:
        problems += _switch_problems(config)
    if problems:
        raise ValueError(
            "\n".join(
                [f"Knapsack RL cannot run with this configuration of verl ({len(problems)}):"]
                + [f"  - {problem}" for problem in problems]
            )
        )


def without_effect(config: Any, settings: VerlSettings) -> list[str]:
    """Return why a run cannot differ from one of stock verl, each reason with what to change.

    Args:
        config: verl's configuration, or the known part of it; missing keys have verl's defaults.
        settings: of the plug-in.
    """
    if settings.allocation == "uniform":
        return []
    found, mean = [], pick(config, "actor_rollout_ref.rollout.n", 1)
    in_rollouts = settings.budget_unit == "rollouts"
    if pick(config, "data.train_batch_size", 1024) == 1:
        found.append("data.train_batch_size=1: a step has one prompt, so there is nothing to divide; raise it")
    if in_rollouts and mean == settings.min_rollouts:
        lower = f", or lower ++{SETTINGS_KEY}.min_rollouts to 2" if mean > 2 else ""
        found.append(
            f"actor_rollout_ref.rollout.n={mean} equals min_rollouts, so no prompt can give up a rollout; raise "
            f"rollout.n{lower}"
        )
    if in_rollouts and mean == settings.max_rollouts:
        found.append(
            f"actor_rollout_ref.rollout.n={mean} equals max_rollouts, so no prompt can get more; raise "
            f"++{SETTINGS_KEY}.max_rollouts"
        )
    if pick(config, "trainer.total_epochs", 30) == 1 and settings.rounds == 1:
        found.append(
            "trainer.total_epochs=1: every prompt comes once, and nothing is known of it then; train for more "
            f"epochs, or set ++{SETTINGS_KEY}.rounds=2"
        )
    return [f"training will be that of stock verl. {reason}" for reason in found]


def _group_problems(config: Any, settings: VerlSettings) -> list[str]:
    mean = pick(config, "actor_rollout_ref.rollout.n", 1)
    low, high = max(settings.min_rollouts, 2), settings.max_rollouts
    if not isinstance(mean, int) or not low <= mean <= high:
        return [
            f"actor_rollout_ref.rollout.n is {mean}, the mean number of rollouts per prompt; it must lie between "
            f"{low} and max_rollouts={high}: change it, or ++{SETTINGS_KEY}.max_rollouts"
        ]
    return []


def _feature_problems(config: Any) -> list[str]:
    found = []
    estimator = str(pick(config, "algorithm.adv_estimator", "gae"))
    if estimator in UNGROUPED:
        found.append(
            f"algorithm.adv_estimator={estimator} does not compare the rollouts of a prompt, so there is nothing to "
            "allocate; use grpo or another estimator with groups"
        )
    if not pick(config, "trainer.use_v1", True):
        found.append("trainer.use_v1=False is the legacy trainer, which lacks the extension points; set it to True")
    if pick(config, "algorithm.filter_groups.enable", False):
        found.append(
            "algorithm.filter_groups.enable=True generates further groups in place of those without a gradient, "
            "beyond the budget that is allocated to avoid them; set it to False"
        )
    model = "reward.reward_model"
    if pick(config, f"{model}.enable", False) and not pick(config, f"{model}.enable_resource_pool", False):
        found.append(
            f"{model}.enable=True on the training GPUs scores after the batch is sampled, too late to be observed; "
            f"set {model}.enable_resource_pool=True or use a reward function"
        )
    return found


def _advantage_problems(config: Any, settings: VerlSettings) -> list[str]:
    name = pick(config, "algorithm.adv_estimator")
    if name not in ESTIMATORS_OVER_MEAN:
        return []
    found = []
    try:
        settings.check_advantage(ESTIMATORS_OVER_MEAN[name])
    except ValueError as error:
        found.append(f"algorithm.adv_estimator={name}: {error}")
    if settings.outcome != "reward":
        found.append(
            f"algorithm.adv_estimator={name} judges the reward, and outcome={settings.outcome} another value; "
            f"set ++{SETTINGS_KEY}.outcome=reward, or use grpo"
        )
    if pick(config, "algorithm.use_kl_in_reward", False):
        found.append(
            f"algorithm.use_kl_in_reward=True changes the reward that algorithm.adv_estimator={name} judges; "
            "set it to False and use actor_rollout_ref.actor.use_kl_loss"
        )
    return found


def _round_problems(config: Any, settings: VerlSettings) -> list[str]:
    if settings.rounds == 1:
        return []
    found, mean = [], pick(config, "actor_rollout_ref.rollout.n", 1)
    mode, syncs = pick(config, "trainer.v1.trainer_mode", "sync"), _syncs(config)
    if mode != "sync" or syncs != 1:
        found.append(
            "rounds=2 needs trainer.v1.trainer_mode=sync and parameter_sync_step=1, where a step samples its whole "
            f"batch while the policy rests, got {mode} and {syncs}; set ++{SETTINGS_KEY}.rounds=1"
        )
    if pick(config, "skip.rollout_tq.enable", False):
        found.append(f"rounds=2 generates while it samples, which skip.rollout_tq skips; set ++{SETTINGS_KEY}.rounds=1")
    if pick(config, REFILL_KEY, False):
        found.append(f"{REFILL_KEY}=True sends prompts between the rounds of rounds=2; set one of them to its default")
    if isinstance(mean, int) and mean < LEAST_OF_TWO_ROUNDS:
        found.append(
            f"rounds=2 needs actor_rollout_ref.rollout.n of at least {LEAST_OF_TWO_ROUNDS}, of which a prompt gets two "
            f"in the first round, got {mean}; raise it or set ++{SETTINGS_KEY}.rounds=1"
        )
    return found


def _size_problems(config: Any) -> list[str]:
    prompts, mean = pick(config, "data.train_batch_size", 1024), pick(config, "actor_rollout_ref.rollout.n", 1)
    mini, syncs = _mini_batch(config), _syncs(config)
    numbers = {"data.train_batch_size": prompts, "ppo_mini_batch_size": mini, "parameter_sync_step": syncs}
    bad = [f"{name} must be a whole number above 0, got {n!r}" for name, n in numbers.items() if not _positive(n)]
    if bad or not _positive(mean):
        return bad
    if prompts % syncs:
        return [f"data.train_batch_size={prompts} must be a multiple of parameter_sync_step={syncs}"]
    gpus, per_replica = _world(config)
    if gpus % per_replica:
        return [
            f"trainer.nnodes x trainer.n_gpus_per_node = {gpus} GPUs cannot be divided into model replicas of "
            f"{per_replica} (tensor x pipeline x context or Ulysses sequence parallel sizes)"
        ]
    multiple, rows = rows_multiple(config), prompts // syncs * mean
    if rows % multiple:
        return [
            f"an update has {rows} rollouts (train_batch_size x rollout.n / parameter_sync_step), which verl would "
            f"pad to a multiple of {multiple}, the lcm of {gpus // per_replica} data-parallel ranks and "
            f"ppo_mini_batch_size x rollout.n = {mini * mean}; choose sizes that divide"
        ]
    return []


def rows_multiple(config: Any) -> int:
    """Return the number to a multiple of which verl pads the rollouts of an update."""
    gpus, per_replica = _world(config)
    return math.lcm(gpus // per_replica, _mini_batch(config) * pick(config, "actor_rollout_ref.rollout.n", 1))


def varying_rows_multiple(config: Any) -> int:
    """Return the number of which the rollouts of an update must be a multiple where their number varies.

    Log probabilities are computed in micro-batches, which verl does not pad unless their size is dynamic.
    """
    gpus, per_replica = _world(config)
    parts = [pick(config, f"actor_rollout_ref.{part}", {}) for part in ("rollout", "ref")]
    micro = [
        pick(part, "log_prob_micro_batch_size_per_gpu") or 1
        for part in parts
        if not pick(part, "log_prob_use_dynamic_bsz", False)
    ]
    return math.lcm(rows_multiple(config), *(gpus // per_replica * size for size in micro))


def _mini_batch(config: Any) -> Any:
    return pick(config, "actor_rollout_ref.actor.ppo_mini_batch_size", 256)


def _syncs(config: Any) -> Any:
    mode = pick(config, "trainer.v1.trainer_mode", "sync")
    return pick(config, f"trainer.v1.{mode}.parameter_sync_step", 4 if mode == "separate_async" else 1)


def _world(config: Any) -> tuple[int, int]:
    """Return (GPUs that train, GPUs that hold one replica of the model)."""
    gpus = pick(config, "trainer.nnodes", 1) * pick(config, "trainer.n_gpus_per_node", 8)
    actor = pick(config, "actor_rollout_ref.actor", {})
    if pick(actor, "strategy", "fsdp") == "megatron":
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        return gpus, math.prod(pick(actor, f"megatron.{size}", 1) for size in sizes)
    old, new = "ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"
    return gpus, max(pick(actor, old, 1), pick(actor, new, 1))


def _positive(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _switch_problems(config: Any) -> list[str]:
    found = []
    for key, value in SWITCHES.items():
        if key == CALLBACK_KEY:
            # Another callback may save the state itself, see KnapsackCheckpoint.
            missing = pick(config, "trainer.save_freq", -1) > 0 and pick(config, key) is None
            why = "without it a resumed run knows nothing of its prompts"
        else:
            missing, why = pick(config, key) is None, "the plug-in is only partly switched on"
        if missing:
            found.append(f"{key} is not set: {why}; add {'++' if key in ADDED else ''}{key}={value}")
    return found
