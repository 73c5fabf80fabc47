"""Would the policy's own hidden state of a prompt tell which prompts are alike?

    python -m experiments.embedding --beds addition skills-dev

Prompts are clustered by k-means on the mean of the base model's last hidden states over the prompt, half of them decide
what the mean logit of each cluster is, and the others show how much of the variance of their exact logits that
explains. The same for the column by which the bed grades its prompts, and for a ridge regression on the states, which
needs the logits of the known prompts to be known well.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2

from experiments.lab.beds import BEDS, base_folder, bed
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.tasks import pretraining
from knapsack_rl.tasks.generated import Problem

CLUSTERS = (16, 64)
RIDGE = 10.0
RESTARTS, ITERATIONS = 10, 50


def clusters(points: FloatArray, count: int, rng: np.random.Generator) -> IntArray:
    """Return the (P,) cluster of each point: k-means from the best of several starts."""
    found = [kmeans2(points, count, iter=ITERATIONS, minit="++", rng=rng) for _ in range(RESTARTS)]
    spread = [((points - centers[nearest]) ** 2).sum() for centers, nearest in found]
    return found[int(np.argmin(spread))][1]


def explained(logits: FloatArray, group: IntArray, known: np.ndarray) -> float:
    """Return the share of the variance of the other prompts' logits that the means of the known ones explain."""
    mean = float(logits[known].mean())
    total, size = np.bincount(group[known], logits[known]), np.bincount(group[known])
    predicted = np.array([total[k] / size[k] if k < size.size and size[k] else mean for k in group[~known].tolist()])
    return 1.0 - float(((logits[~known] - predicted) ** 2).sum() / ((logits[~known] - mean) ** 2).sum())


def linear(logits: FloatArray, states: FloatArray, known: np.ndarray) -> float:
    """Return the share of the variance of the other prompts' logits that a ridge regression on the known explains."""
    scaled = (states - states.mean(0)) / states.std(0)
    mean, here = logits[known].mean(), scaled[known]
    slope = np.linalg.solve(here.T @ here + RIDGE * np.eye(here.shape[1]), here.T @ (logits[known] - mean))
    residual = logits[~known] - mean - scaled[~known] @ slope
    return 1.0 - float((residual**2).sum() / ((logits[~known] - mean) ** 2).sum())


def measure(name: str, bases: Path, prompts: int, seed: int) -> dict[str, float]:
    """Return the explained share by the number of clusters, and by the grade, on a bed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(base_folder(name, bases, quick=False))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = list(bed(name).data(prompts, 64).train)
    problems = [Problem(row["prompt"], row["answer"], row["prompt_id"], 1) for row in rows]
    rates = pretraining.success_rates(model, problems).double().numpy().clip(1e-6, 1 - 1e-6)
    logits = np.log(rates) - np.log1p(-rates)
    with torch.no_grad():
        ids = [tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"] for row in rows]
        states = [model(one, output_hidden_states=True).hidden_states[-1][0].mean(0).double().numpy() for one in ids]
    rng = np.random.default_rng(seed)
    known = rng.random(len(rows)) < 0.5
    found = {
        f"{count} clusters": explained(logits, clusters(np.stack(states), count, rng), known) for count in CLUSTERS
    }
    grades = np.unique([str(row[bed(name).grade]) for row in rows], return_inverse=True)[1]
    found[f"column {bed(name).grade!r}"] = explained(logits, grades, known)
    return found | {"ridge regression": linear(logits, np.stack(states), known)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=["addition", "skills-dev"], choices=tuple(BEDS))
    parser.add_argument("--bases", type=Path, help="folder of base models; a temporary one by default")
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.beds:
            found = measure(name, options.bases or Path(folder), options.prompts, options.seed)
            print(f"{name}: " + ", ".join(f"{label} {100 * share:.0f} %" for label, share in found.items()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
