"""Writes synthetic run folders: prompts that succeed by chance and slowly get easier."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_run(
    folder: Path,
    *,
    allocation: str = "knapsack",
    rollouts_per_prompt: int = 8,
    prompts_per_step: int = 16,
    prompts: int = 48,
    steps: int = 30,
    planned: int | None = None,
    seed: int = 0,
    evaluate_every: int = 5,
    gain: float = 0.02,
    ids: list[Any] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Simulate a run, write its folder and return the allocation rows."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    ids = ids or [f"prompt-{i}" for i in range(prompts)]
    rate = rng.permutation(
        np.concatenate([np.linspace(0.001, 0.999, len(ids) - len(ids) // 4), np.zeros(len(ids) // 4)])
    )
    seen = np.zeros((len(ids), 2))
    total = 0
    rows, metrics = (
        [],
        [
            {
                "step": 0,
                "rollouts": 0,
                "training_seconds": 0.0,
                "held_out/accuracy": float(rate.mean()),
                "held_out/greedy_accuracy": 0.3,
            }
        ],
    )
    for step in range(1, steps + 1):
        chosen = rng.permutation(len(ids))[:prompts_per_step]
        estimate = np.where(seen[chosen, 1] > 0, seen[chosen, 0] / np.maximum(seen[chosen, 1], 1), np.nan)
        known = np.nan_to_num(estimate, nan=0.5)
        counts = np.full(chosen.size, rollouts_per_prompt)
        if allocation != "uniform":
            weights = known * (1 - known) ** 2 + 0.01
            counts = 2 + rng.multinomial((rollouts_per_prompt - 2) * chosen.size, weights / weights.sum())
        successes = rng.binomial(counts, rate[chosen])
        effective = (successes > 0) & (successes < counts)
        total += int(counts.sum())
        rows.append(
            {
                "step": step,
                "prompt_ids": [ids[i] for i in chosen],
                "counts": counts.tolist(),
                "arrived": counts.tolist(),
                "successes": successes.tolist(),
                "scored": counts.tolist(),
                "effective": effective.tolist(),
                "estimate": [None if np.isnan(value) else float(value) for value in estimate],
                "predicted": (1 - known**counts - (1 - known) ** counts).tolist(),
                "reason": "cold start" if step == 1 else "",
                "seconds": 0.001 * step,
            }
        )
        seen[chosen] = np.stack([successes, counts], axis=1)
        rate = np.minimum(rate + gain * (rate > 0) * (0.5 if allocation == "uniform" else 1), 1)
        took = 2.0 if allocation == "uniform" else 1.0
        spent = {"step": step, "rollouts": total, "training_seconds": took * step}
        parts = {"step_time": took, "knapsack/generation_seconds": 0.25, "knapsack/update_seconds": took - 0.5}
        reward = float(successes.sum() / counts.sum())
        metrics.append(spent | parts | {"loss": 0.1 / step, "reward": reward, "knapsack/rows_skipped": 0.625})
        if step % evaluate_every == 0:
            noise = rng.normal(0, 0.01)
            metrics.append(
                spent
                | {
                    "held_out/accuracy": float(np.clip(rate.mean() + noise, 0, 1)),
                    "held_out/greedy_accuracy": float(np.clip(rate.mean() + 0.05 + noise, 0, 1)),
                }
            )
    config = {
        "allocation": allocation,
        "rollouts_per_prompt": rollouts_per_prompt,
        "prompts_per_step": prompts_per_step,
        "steps": steps if planned is None else planned,
        "seed": seed,
        "model": "tiny",
        **settings,
    }
    # JSON is YAML, so the file needs no YAML writer.
    (folder / "config.yaml").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    write_rows(folder / "allocations.jsonl", rows)
    write_rows(folder / "metrics.jsonl", metrics)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    """Write JSON lines, followed by a tail such as a torn line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
