"""The model card (README.md) of a run folder: model, settings, and results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from knapsack_rl.report.page import percent
from knapsack_rl.runs.curves import tail_mean
from knapsack_rl.runs.files import MODEL_FOLDER
from knapsack_rl.runs.log import RunLog

CARD_FILE = "README.md"


def write_card(folder: Path) -> Path:
    """Write the model card of a run, finished or not, into its folder and next to its model.

    Raises:
        FileNotFoundError: the folder is not a run folder.
    """
    run = RunLog.load(folder)
    text = card(run, finished=(folder / MODEL_FOLDER).is_dir())
    for place in (folder, folder / MODEL_FOLDER):
        if place.is_dir():
            (place / CARD_FILE).write_text(text, encoding="utf-8", errors="replace")
    return folder / CARD_FILE


def card(run: RunLog, *, finished: bool) -> str:
    """Return the model card as Markdown with a YAML header."""
    config, name = run.config, run.folder.resolve().name
    allocation = str(config.get("allocation", "?"))
    lines = [
        "---",
        "library_name: transformers",
        *_hub_name(config.get("model", "?")),
        "tags: [grpo, trl, knapsack-rl]",
        "---",
        "",
        f"# {_inline(name)}",
        "",
        f"{_code(config.get('model', '?'))}, trained on {_code(config.get('dataset', '?'))} by GRPO with "
        + (
            "the same number of rollouts for every prompt."
            if allocation == "uniform"
            else "its rollouts allocated by a knapsack (arXiv 2509.25849)."
        ),
        "",
        _progress(run, finished),
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _facts(run)),
        "",
        "Accuracies are on held-out prompts; other tasks were not measured.",
        "",
        "## Reproduce",
        "",
        "In this folder:",
        "",
        "```sh",
        "knapsack-rl train --config config.yaml --output FOLDER",
        "```",
        "",
        "All settings are in `config.yaml`, every step in `metrics.jsonl` and `allocations.jsonl`; `report.html` shows "
        "them. The trained model is in `model/`.",
        "",
    ]
    return "\n".join(lines)


def _hub_name(model: Any) -> list[str]:
    """Return the header line for a base model with a name on the hub; none for a local model."""
    name = str(model)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not Path(name).exists()
    return [f"base_model: {name}"] if on_hub else []


def _progress(run: RunLog, finished: bool) -> str:
    steps = f"{run.steps.size:,} of {run.planned_steps:,}" if run.planned_steps else f"{run.steps.size:,}"
    done = f"{steps} steps, {int(run.rollouts.sum()):,} rollouts."
    return done if finished else f"**Not finished:** {done}"


def _facts(run: RunLog) -> list[tuple[str, str]]:
    config = run.config
    allocation = str(config.get("allocation", "?"))
    estimator = f", estimator {config.get('estimator', '?')}" if allocation == "knapsack" else ""
    facts = [
        ("base model", _code(config.get("model", "?"))),
        ("task", _code(config.get("dataset", "?"))),
        ("allocation", f"{_code(allocation)}{_inline(estimator)}"),
        (
            "rollouts",
            f"{config.get('prompts_per_step', '?')} prompts a step × {config.get('rollouts_per_prompt', '?')} on "
            "average",
        ),
        ("bounds", f"{config.get('min_rollouts', '?')} to {config.get('max_rollouts', '?')} rollouts of a prompt"),
        ("learning rate, seed", f"{config.get('learning_rate', '?')}, {config.get('seed', '?')}"),
    ]
    for label, metric in (("sampled", "held_out/accuracy"), ("greedy", "held_out/greedy_accuracy")):
        values = run.metric(metric)[1]
        if values.size:
            facts.append((f"held-out accuracy, {label}", f"{percent(values[-1])} (first: {percent(values[0])})"))
    for label, ratio in (("rollouts", run.effective_rollout_ratio), ("prompts", run.effective_prompt_ratio)):
        value = tail_mean(ratio)
        if math.isfinite(value):
            facts.append((f"{label} with a gradient, last 20 % of the steps", percent(value)))
    facts += [(f"warning at step {row['step']}", _inline(row["seen"])) for row in run.warnings]
    return facts


def _inline(value: Any) -> str:
    """Return untrusted text for a table cell: one line, with Markdown and HTML escaped."""
    text = " ".join(str(value).split())
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>|" else {"<": "&lt;", ">": "&gt;", "|": "&#124;"}[sign])
    return text


def _code(value: Any) -> str:
    return f"`{' '.join(str(value).split()).replace('`', chr(39)).replace('|', '¦')}`"
