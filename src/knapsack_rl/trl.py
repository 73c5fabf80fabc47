"""Knapsack RL on TRL: change ``GRPOTrainer`` to :class:`KnapsackGRPOTrainer`.

The only change to GRPO is the size of the groups: each step's rollouts are divided over its prompts by the allocator
instead of evenly, and advantages are normalised inside the groups that result. Sampler, generation, loss, logging,
evaluation and checkpoints are TRL's own.

How: TRL's sampler delivers M prompts x G rows. Just before generation the rows of all processes are gathered, the
budget M x G is allocated afresh, and each process gets its slice of the expanded rows, as many as it brought. TRL then
generates and scores them; the advantages it computes by reshaping to (M, G) have the right shape and the wrong values,
and are replaced. Binding this late, the allocation uses every reward observed so far.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
    from accelerate.utils import broadcast_object_list, gather, gather_object
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise ImportError(f'{error}. knapsack_rl.trl needs: pip install "knapsack-rl[trl]"') from error

from knapsack_rl.allocation import Allocation
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.groups import STD_EPSILON, group_advantages, group_outcomes, prompt_weights
from knapsack_rl.report.runfiles import append_row
from knapsack_rl.statefile import read_state
from knapsack_rl.tracker import PromptId
from knapsack_rl.value import FloatArray, IntArray

logger = logging.getLogger(__name__)

STATE_FILE = "knapsack_allocator.npz"
ALLOCATION_LOG = "allocations.jsonl"


@dataclass
class KnapsackGRPOConfig(GRPOConfig):
    """TRL's ``GRPOConfig`` and how to allocate. ``num_generations`` is the mean number of rollouts per prompt.

    Attributes:
        allocation: ``"knapsack"``, or ``"uniform"`` for stock GRPO with the same metrics.
        estimator: ``"empirical-bayes"``, ``"beta"``, or ``"window"`` for the paper's rule with its fallback.
        min_rollouts: fewest rollouts of a prompt, 2 <= min_rollouts <= num_generations.
        max_rollouts: most rollouts of a prompt, >= num_generations.
        weighting: ``"rollout"`` (the paper: a prompt weighs in proportion to its rollouts) or ``"prompt"`` (every
            prompt weighs the same, as under uniform allocation).
        prompt_id_column: column of a stable id per prompt; without the column the prompt's text is hashed.
        success_threshold: an outcome above it counts as success.
        outcome_reward: name of the reward function whose value is the outcome; by default the first one that scored
            the rollout. Unlike the training reward it is neither weighted nor summed.
        log_allocations: append each generation's allocation and outcome to ``allocations.jsonl`` in ``output_dir``.
    """

    allocation: str = field(default="knapsack", metadata={"help": "'knapsack' or 'uniform'."})
    estimator: str = field(default="empirical-bayes", metadata={"help": "'empirical-bayes', 'beta' or 'window'."})
    min_rollouts: int = field(default=2, metadata={"help": "Fewest rollouts of a prompt."})
    max_rollouts: int = field(default=128, metadata={"help": "Most rollouts of a prompt."})
    weighting: str = field(default="rollout", metadata={"help": "Loss weight per 'rollout' or per 'prompt'."})
    prompt_id_column: str = field(default="prompt_id", metadata={"help": "Column of a stable id per prompt."})
    success_threshold: float = field(default=0.0, metadata={"help": "An outcome above it is a success."})
    outcome_reward: str | None = field(default=None, metadata={"help": "Reward function that tells success."})
    log_allocations: bool = field(default=False, metadata={"help": "Append allocations to allocations.jsonl."})


_DEFAULTS = {
    own.name: own.default for own in fields(KnapsackGRPOConfig) if own.name not in {f.name for f in fields(GRPOConfig)}
}


@dataclass
class _Step:
    """One generation batch: which prompts, and which of their rollouts stand in which row of all processes."""

    prompts: list[PromptId]
    allocation: Allocation
    group_R: IntArray  # noqa: N815 - the suffix tells the shape
    ragged: bool
    seconds: float


class KnapsackGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` whose rollouts per prompt are allocated by the knapsack.

    Takes the arguments of ``GRPOTrainer``; ``args`` may be a plain ``GRPOConfig`` (defaults of
    :class:`KnapsackGRPOConfig` apply).

    Args:
        *args: as ``GRPOTrainer``.
        allocator: an allocator of your own (a success function, another estimator); by default one is made from the
            configuration.
        **kwargs: as ``GRPOTrainer``.

    Raises:
        ValueError: the configuration cannot work: bounds that exclude ``num_generations``, ``seed`` in
            ``generation_kwargs``, ids that name several prompts, a world size other than the launcher's.
        RuntimeError: this TRL release has other internals than the trainer needs.
    """

    def __init__(self, *args: Any, allocator: KnapsackAllocator | None = None, **kwargs: Any) -> None:
        _check_internals()
        super().__init__(*args, **kwargs)
        self._check_configuration()
        self.allocator = allocator or KnapsackAllocator(
            self._setting("estimator"),
            self._setting("min_rollouts"),
            self._setting("max_rollouts"),
            success=self._setting("success_threshold"),
        )
        self._reward_matrix: FloatArray | None = None
        self._warned: set[str] = set()
        if isinstance(self.train_dataset, Dataset):
            _check_ids(self.train_dataset, self._setting("prompt_id_column"))
        if getattr(self, "vllm_generation", None) is not None:
            self.vllm_generation.generate = _one_completion_per_row(self.vllm_generation.generate, self)
        self.add_callback(_SaveAllocator(self))

    def _setting(self, name: str) -> Any:
        return getattr(self.args, name, _DEFAULTS[name])

    def _check_configuration(self) -> None:
        low, high, mean = self._setting("min_rollouts"), self._setting("max_rollouts"), self.num_generations
        if not 2 <= low <= mean <= high:
            raise ValueError(
                f"rollouts per prompt must satisfy 2 <= min_rollouts <= num_generations <= max_rollouts, got "
                f"min_rollouts={low}, num_generations={mean}, max_rollouts={high}"
            )
        for name, allowed in (("allocation", ("knapsack", "uniform")), ("weighting", ("rollout", "prompt"))):
            if self._setting(name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {self._setting(name)!r}")
        outcome = self._setting("outcome_reward")
        if outcome is not None and outcome not in self.reward_func_names:
            raise ValueError(f"outcome_reward must name a reward function {self.reward_func_names}, got {outcome!r}")
        if "seed" in (self.args.generation_kwargs or {}):
            raise ValueError("generation_kwargs must not set seed: every rollout of a prompt would be the same")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:
            raise ValueError(
                f"the launcher started {launched} processes but training runs on {self.accelerator.num_processes}; "
                "on CPUs use torchrun --nproc_per_node"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        rows, step = self._allocate_step(inputs)
        output = super()._generate_and_score_completions(rows)
        self._finish_step(step, output)
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        self._reward_matrix = rewards_per_func.detach().double().cpu().numpy()  # gathered, in rank order
        return rewards_per_func

    @property
    def _updates_per_generation(self) -> int:
        batches = self.args.steps_per_generation * self.num_iterations
        return max(batches // self.args.gradient_accumulation_steps, 1)

    # -- before generation ------------------------------------------------------------------------------------------

    def _allocate_step(self, inputs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], _Step]:
        """Allocate over the prompts of all processes; return this process's rows and the step."""
        started = time.perf_counter()
        everything = gather_object(inputs)
        size = self.num_generations
        blocks = [everything[at : at + size] for at in range(0, len(everything), size)]
        keys = [self._key_of_block(block) for block in blocks]
        rows = {key: block[0] for key, block in zip(reversed(keys), reversed(blocks), strict=True)}
        prompts = list(dict.fromkeys(keys))
        if len(prompts) < len(keys):
            self._warn("duplicates", "a batch holds the same prompt more than once; its rollouts form one group")
        budget = len(everything)
        place = {key: position for position, key in enumerate(prompts)}
        stock_R = np.repeat([place[key] for key in keys], size)
        if self._setting("allocation") == "uniform":
            allocation = self.allocator.adopt(prompts, np.bincount(stock_R))
        else:
            # One process decides for all, so that no difference between machines can split a group.
            allocation = _from_main_process(self.allocator.allocate(prompts, budget))
        ragged = bool((allocation.counts != np.bincount(stock_R)).any())
        if ragged:
            group_R = allocation.expand()
            start = self.accelerator.process_index * len(inputs)
            mine = [dict(rows[prompts[group]]) for group in group_R[start : start + len(inputs)]]
        else:
            group_R, mine = stock_R, inputs  # exactly the stock step: same rows, same order
        return mine, _Step(prompts, allocation, group_R, ragged, time.perf_counter() - started)

    def _key_of_block(self, block: list[dict[str, Any]]) -> PromptId:
        first = block[0]
        key = prompt_key(first, self._setting("prompt_id_column"))
        for row in block[1:]:
            if row.get("prompt") != first.get("prompt") or prompt_key(row, self._setting("prompt_id_column")) != key:
                raise ValueError(
                    f"rows of different prompts stand in one block of num_generations={self.num_generations} "
                    f"(prompt {key!r}): the data loader broke a group. With an IterableDataset, make every process read "
                    "whole groups"
                )
        return key

    # -- after scoring ----------------------------------------------------------------------------------------------

    def _finish_step(self, step: _Step, output: dict[str, Any]) -> None:
        """Replace advantages where groups are ragged, record outcomes, log."""
        matrix, self._reward_matrix = self._reward_matrix, None
        rollouts = step.group_R.size
        if matrix is None or matrix.shape != (rollouts, len(self.reward_func_names)):
            got = None if matrix is None else matrix.shape
            raise RuntimeError(
                f"expected rewards of shape {(rollouts, len(self.reward_func_names))}, got {got}; "
                "a subclass may override _calculate_rewards without calling super()"
            )
        if np.isinf(matrix).any():
            self._warn("infinite", "a reward function returned an infinite value; the rollout counts as unscored")
            matrix = np.where(np.isinf(matrix), np.nan, matrix)
        weights = self.reward_weights.double().cpu().numpy()
        total = np.where(np.isnan(matrix).all(axis=1), np.nan, np.nansum(matrix * weights, axis=1))
        if step.ragged:
            self._replace_advantages(step, matrix, total, weights, output)
        lengths = gather(output["completion_mask"].sum(dim=1)).cpu().numpy()
        outcome = self._outcome(matrix)
        keys_R = [step.prompts[group] for group in step.group_R]
        self.allocator.observe(keys_R, outcome, lengths)

        metrics = self._metrics["train"]
        for name, number in self.allocator.metrics().items():
            metrics[f"knapsack/{name}"].append(number)
        metrics["knapsack/allocation_seconds"][-1] = step.seconds
        by_prompt = group_outcomes(step.group_R, total).mean_reward
        metrics["knapsack/reward_per_prompt"].append(float(np.nanmean(by_prompt)) if by_prompt.size else float("nan"))
        if self._setting("log_allocations") and self.accelerator.is_main_process:
            self._log_allocation(step, outcome)

    def _replace_advantages(
        self, step: _Step, matrix: FloatArray, total: FloatArray, weights: FloatArray, output: dict[str, Any]
    ) -> None:
        advantages = ragged_advantages(
            step.group_R,
            matrix,
            total,
            weights,
            scale=self.scale_rewards,
            aggregation=getattr(self, "multi_objective_aggregation", "sum_then_normalize"),
            weighting=self._setting("weighting"),
        )
        old = output["advantages"]
        local = old.shape[0]
        start = self.accelerator.process_index * local
        mine = torch.as_tensor(advantages[start : start + local], dtype=old.dtype, device=old.device)
        if mine.shape != old.shape:
            raise RuntimeError(
                f"TRL computed advantages of shape {tuple(old.shape)}, the groups give {tuple(mine.shape)}"
            )
        output["advantages"] = mine
        logged = self._logs.get("advantages")
        if logged is not None:
            for _ in range(min(len(logged), advantages.size)):
                logged.pop()
            logged.extend(advantages.tolist())
        zero_std = self._metrics["train"].get("frac_reward_zero_std")
        if zero_std and self.scale_rewards != "batch":
            zero_std[-1] = float(1.0 - group_outcomes(step.group_R, total).effective[step.group_R].mean())

    def _outcome(self, matrix: FloatArray) -> FloatArray:
        """(R,) the reward that tells success: the named function's, or the first that scored the rollout."""
        name = self._setting("outcome_reward")
        if name is not None:
            return matrix[:, self.reward_func_names.index(name)]
        scored = ~np.isnan(matrix)
        return matrix[np.arange(matrix.shape[0]), scored.argmax(axis=1)]

    def _log_allocation(self, step: _Step, outcome: FloatArray) -> None:
        groups = group_outcomes(step.group_R, outcome, self.allocator.success)
        order = np.argsort(step.group_R[groups.first_row])  # back from first appearance to the order of the prompts
        record = {
            "step": self.state.global_step // self._updates_per_generation + 1,
            "prompt_ids": step.prompts,
            "counts": step.allocation.counts.tolist(),
            "successes": groups.successes[order].tolist(),
            "scored": groups.totals[order].tolist(),
            "effective": groups.effective[order].tolist(),
            "estimate": _null_for_nan(step.allocation.success_rates),
            "predicted": _null_for_nan(step.allocation.nonzero_gradient),
            "reason": step.allocation.reason,
            "seconds": step.seconds,
        }
        append_row(Path(str(self.args.output_dir)) / ALLOCATION_LOG, record)

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s (told once)", message)

    # -- resume -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As ``GRPOTrainer.train``; resuming also restores the allocator.

        A checkpoint without allocator state (made by the stock trainer) resumes with nothing known of the prompts,
        and says so.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        if folder:
            state = Path(folder) / STATE_FILE
            if state.exists():
                header, arrays = read_state(state)
                self.allocator.load_state_dict({"header": header, "arrays": arrays})
            else:
                self._warn("no state", f"{folder} holds no {STATE_FILE}: the allocator starts with nothing known")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class _SaveAllocator(TrainerCallback):
    """Writes the allocator's state into each checkpoint, last, so that its presence marks a complete one."""

    def __init__(self, trainer: KnapsackGRPOTrainer) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self._trainer.allocator.save(folder / STATE_FILE)


def prompt_key(row: dict[str, Any], id_column: str) -> PromptId:
    """Stable identity of a prompt: its id column, else a hash of the prompt itself.

    Raises:
        ValueError: the id is no string or whole number, or there is none and the prompt holds images.
    """
    given = row.get(id_column)
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise ValueError(f"column {id_column!r} must hold strings or whole numbers, got {given!r}")
        return given
    if "image" in row or "images" in row:
        raise ValueError(f"prompts with images need an id: add a column {id_column!r} that names each prompt")
    text = json.dumps(row.get("prompt"), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def ragged_advantages(
    group_R: IntArray,
    matrix: FloatArray,
    total: FloatArray,
    weights: FloatArray,
    *,
    scale: Any,
    aggregation: str,
    weighting: Any,
) -> FloatArray:
    """TRL's advantages for groups of any size.

    Args:
        group_R: (R,) group of each rollout.
        matrix: (R, F) reward of each function, NaN where it gave none.
        total: (R,) weighted sum, NaN where no function gave a reward.
        weights: (F,) reward weights.
        scale: ``scale_rewards``: "group", "batch" or "none".
        aggregation: ``"sum_then_normalize"`` (GRPO), or ``"normalize_then_sum"`` (GDPO: each function normalised
            inside its group, then the sum over the batch).
        weighting: "rollout" or "prompt".

    Returns:
        (R,) float64.

    Raises:
        ValueError: an option is unknown.
    """
    if aggregation == "sum_then_normalize":
        return group_advantages(group_R, total, scale, weighting)
    if aggregation != "normalize_then_sum":
        raise ValueError(f"unknown multi_objective_aggregation {aggregation!r}")
    normalised = [group_advantages(group_R, column, "group") for column in matrix.T]
    combined = np.where(np.isnan(total), np.nan, np.asarray(normalised).T @ weights)
    scored = combined[~np.isnan(combined)]
    if scored.size < 2:
        return np.zeros_like(total)
    advantages = np.nan_to_num((combined - scored.mean()) / (scored.std(ddof=1) + STD_EPSILON))
    return advantages * prompt_weights(group_R) if weighting == "prompt" else advantages


def _check_internals() -> None:
    """Compare the two methods that are wrapped with what they are expected to take.

    Raises:
        RuntimeError: this TRL release differs.
    """
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    }
    for name, parameters in expected.items():
        method = getattr(GRPOTrainer, name, None)
        found = list(inspect.signature(method).parameters) if method else None
        if found != parameters:
            raise RuntimeError(
                f"GRPOTrainer.{name} takes {found}, expected {parameters}: this TRL release is not supported; "
                'install "trl>=1.9,<2" and the newest knapsack-rl'
            )


def _check_ids(dataset: Any, id_column: str) -> None:
    """Refuse an id that names several prompts; their histories would be mixed.

    Raises:
        ValueError: two rows share an id and differ in their prompt.
    """
    if id_column not in (dataset.column_names or []):
        logger.info("no column %r: prompts are told apart by a hash of their text", id_column)
        return
    seen: dict[Any, int] = {}
    for position, prompt_id in enumerate(dataset[id_column]):
        first = seen.setdefault(prompt_id, position)
        if first != position and dataset[first]["prompt"] != dataset[position]["prompt"]:
            raise ValueError(
                f"column {id_column!r}: id {prompt_id!r} names different prompts (rows {first} and {position}); make ids "
                "unique over all files, for example by putting the source in front"
            )


def _one_completion_per_row(generate: Callable[..., Any], trainer: KnapsackGRPOTrainer) -> Callable[..., Any]:
    """Force n = 1: vLLM's server mode sends every G-th prompt with n = G, which ragged rows break."""

    @wraps(generate)
    def generate_rows(*args: Any, **kwargs: Any) -> Any:
        if trainer.model.training:
            bound = inspect.signature(generate).bind(*args, **kwargs)
            bound.arguments["num_generations"] = 1
            return generate(*bound.args, **bound.kwargs)
        return generate(*args, **kwargs)

    return generate_rows


def _from_main_process(allocation: Allocation) -> Allocation:
    shared = [allocation]
    broadcast_object_list(shared)
    return shared[0]


def _null_for_nan(numbers: FloatArray | None) -> list[float | None]:
    return [] if numbers is None else [None if np.isnan(number) else float(number) for number in numbers]
