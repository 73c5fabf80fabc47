"""A step in two rounds: TRL generates and scores each of them, and their batches are joined to that of one step.

The first round gives all prompts as many rollouts, the second gives the rest where the outcomes of the first say that
they gain most (:meth:`knapsack_rl.session.Session.plan_rest`). The joined batch has as many rows per process as the
stock step, so loss, accumulation and repeated updates are TRL's. Its metrics are those of the step: recomputed from all
rewards, or averaged by rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.trl.drawn import Drawn
from knapsack_rl.trl.identity import IMAGE_COLUMNS
from knapsack_rl.trl.replay import COLUMNS, COMPLETION, pad_to
from knapsack_rl.trl.step import Scored, Step

Metrics = dict[str, list[float]]
"""TRL's metrics since the last line of the log: an entry per generation."""

IDS = ("prompt_ids", "completion_ids")
LEFT = ("prompt_ids", "prompt_mask")
"""Tensors that are padded on the left; all others are padded on the right."""

CLIPPED = "completions/clipped_ratio"
TERMINATED = "completions/{}_terminated_length"
CALLS, FAILED_CALLS = "tools/call_frequency", "tools/failure_frequency"


def check_two_rounds(trainer: Any) -> None:
    """Refuse two rounds where their batches could not be joined.

    Args:
        trainer: a ``KnapsackGRPOTrainer`` before its first step.

    Raises:
        ValueError: prompts have images, or tools may return some.
    """
    found = set(IMAGE_COLUMNS) & set(getattr(trainer.train_dataset, "column_names", None) or ())
    if found or (getattr(trainer, "_is_vlm", False) and getattr(trainer, "tools", None)):
        cause = f"the column {min(found)!r}" if found else "a model of images with tools"
        raise ValueError(f"rounds=2 works on prompts and tools of text, got {cause}; set rounds=1")


def generate_in_two_rounds(trainer: Any, drawn: Drawn) -> tuple[Step, Scored, dict[str, Any]]:
    """Generate and score a step in two rounds.

    Args:
        trainer: a ``KnapsackGRPOTrainer``.
        drawn: the prompts of the step.

    Returns:
        The step, its rewards and completions, and this process's batch, in which the rows of the first round precede
        those of the second. Advantages are yet to be replaced.
    """
    session, mean, processes = trainer.session, trainer._mean, trainer.accelerator.num_processes
    metrics: Metrics = trainer._metrics["train"]
    entries = [_entries(metrics)]
    first = trainer._agree_on(session.plan_first(drawn.keys, mean, multiple=processes, features=drawn.features))
    groups, outputs, scores = [first.expand()], [], []

    def generate() -> None:
        rows = drawn.bring(first.ids, groups[-1], trainer.accelerator.process_index, processes, gather_object)
        outputs.append(trainer._generate_rows(rows, Step(first, groups[-1], ragged=True)))
        scores.append(trainer._take_scored(groups[-1].size))
        entries.append(_entries(metrics))

    generate()
    outcomes = trainer._outcome(scores[0])
    plan = trainer._agree_on(session.plan_rest(first, mean * len(drawn.keys), groups[0], outcomes))
    rest = plan.counts - first.counts
    if rest.any():
        groups.append(np.repeat(np.arange(rest.size), rest))
        generate()
    order = by_process([group_R.size for group_R in groups], processes)
    whole = Scored.joined(scores)
    if len(groups) == 2:
        merge_metrics(metrics, entries, [group_R.size for group_R in groups])
        set_rewards(metrics, whole.matrix, trainer._weights, trainer.reward_func_names)
    scored = replace(whole, matrix=whole.matrix[order], lengths=whole.lengths[order])
    step = Step(plan, np.concatenate(groups)[order], ragged=True, generated_R=order)
    return step, scored, join(outputs, trainer._tokenizer.pad_token_id)


def by_process(sizes: Sequence[int], processes: int) -> IntArray:
    """Return the (R,) rows of all rounds, numbered as they were generated, process by process.

    Args:
        sizes: rows of each round over all processes, multiples of the processes.
        processes: their number; each has an equal slice of every round.
    """
    starts = np.cumsum([0, *sizes])
    rounds = [np.arange(start, start + size).reshape(processes, -1) for start, size in zip(starts, sizes, strict=False)]
    return np.concatenate(rounds, axis=1).ravel()


def join(parts: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Any]:
    """Return one batch of several outputs of TRL: rows below each other, padded to the longest.

    Args:
        parts: outputs with (rows,) and (rows, tokens) tensors and ``num_items_in_batch``.
        pad_id: token that pads ids.

    Raises:
        ValueError: an output has other tensors, such as those of images, or one that another output lacks.
    """
    present = [{name for name, tensor in part.items() if tensor is not None} for part in parts]
    unknown = set().union(*present) - (set.intersection(*present) & {*COLUMNS, *COMPLETION})
    if unknown:
        raise ValueError(
            f"batches of several generations cannot be joined: TRL made {', '.join(sorted(unknown))}, which only "
            "batches of one generation may have; set rounds=1"
        )
    joined: dict[str, Any] = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0] is None:
            joined[name] = None
        elif name == "num_items_in_batch":
            joined[name] = sum(tensors[1:], start=tensors[0])
        elif tensors[0].dim() == 1:
            joined[name] = torch.cat(tensors)
        else:
            fill, side = pad_id if name in IDS else COLUMNS.get(name, 0), "left" if name in LEFT else "right"
            width = max(tensor.shape[1] for tensor in tensors)
            joined[name] = torch.cat([pad_to(tensor, width, fill, side) for tensor in tensors])
    return joined


# -- metrics -----------------------------------------------------------------------------------------------------------


def _entries(metrics: Metrics) -> dict[str, int]:
    return {name: len(values) for name, values in metrics.items()}


def merge_metrics(metrics: Metrics, entries: Sequence[Mapping[str, int]], rows: Sequence[int]) -> None:
    """Replace the entries of two rounds by one of the step.

    Extremes are those of both rounds. Means are weighted by what they are means of: rows that ended by themselves,
    calls of tools, or rows. Standard deviations are not exact; :func:`set_rewards` sets them. Metrics that TRL sets and
    does not add to, such as ``num_tokens``, remain.

    Args:
        metrics: of TRL; changed.
        entries: number of entries of each metric before the first, between the rounds, and after the second.
        rows: of the two rounds.
    """
    before, between, after = entries
    both = [name for name, size in after.items() if size - 1 == between.get(name, 0) == before.get(name, 0) + 1]
    pairs = {name: metrics[name][-2:] for name in both}
    weights = {name: _weights(name, pairs, rows) for name in both}
    for name in both:
        metrics[name][-2:] = [_combined(name, pairs[name], weights[name])]


def _weights(name: str, pairs: Mapping[str, list[float]], rows: Sequence[int]) -> list[float]:
    """Return how much each round's entry of a metric counts."""
    if name in [TERMINATED.format(kind) for kind in ("mean", "min", "max")] and CLIPPED in pairs:
        return [size * (1.0 - clipped) for size, clipped in zip(rows, pairs[CLIPPED], strict=True)]
    if name == FAILED_CALLS and CALLS in pairs:
        return [size * calls for size, calls in zip(rows, pairs[CALLS], strict=True)]
    return [float(size) for size in rows]


def _combined(name: str, values: Sequence[float], weights: Sequence[float]) -> float:
    pairs = zip(values, weights, strict=True)
    counted = [(value, weight) for value, weight in pairs if weight > 0 and not math.isnan(value)]
    if not counted:
        return values[0]
    kind = name.rpartition("/")[2].partition("_")[0]
    if kind in ("min", "max"):
        return (min if kind == "min" else max)(value for value, _ in counted)
    return sum(value * weight for value, weight in counted) / sum(weight for _, weight in counted)


def set_rewards(metrics: Metrics, matrix: FloatArray, weights: FloatArray, names: Sequence[str]) -> None:
    """Set TRL's means and standard deviations of rewards in the newest entry to those of all rows.

    Args:
        metrics: of TRL; changed.
        matrix: (R, F) reward of each function, NaN where it gave none.
        weights: (F,) of the functions.
        names: of the functions.
    """
    unscored = np.isnan(matrix).all(axis=1)
    total = np.where(unscored, np.nan, np.nansum(matrix * weights, axis=1))
    columns = {("reward", "reward_std"): total}
    columns |= {(f"rewards/{name}/mean", f"rewards/{name}/std"): matrix[:, k] for k, name in enumerate(names)}
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean of nothing, which is NaN as in TRL
        for (mean, deviation), column in columns.items():
            metrics[mean][-1], metrics[deviation][-1] = float(np.nanmean(column)), float(np.nanstd(column, ddof=1))
