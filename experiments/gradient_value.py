"""Is a prompt with a high V(N, p) one whose gradient is large, aligned and useful? Gradients of single prompts.

On the shipped arithmetic model, as it is and at points of a training run of the main job: the norm of a prompt's GRPO
gradient at group size N, its cosine to the gradient of a large batch of other prompts, and the slope along it of the
prompt's own success rate and of the mean of other prompts'. Success rates are exact, see
:mod:`experiments.gradient_measure`.

``fitted_value.json`` in the folder of the experiment's runs holds the value function that was fitted to the measured
gains; ``experiments/data/fitted_value.json`` is a copy and gives :func:`experiments.values.fitted`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.contract import Options, Row
from experiments.gradient_fit import GROUP_SIZES, Measured, figures, findings, fit, tables, write_fit
from experiments.pieces import Piece, run_pieces
from experiments.values import FITTED_VALUE
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.runs.files import ALLOCATION_LOG, METRICS_FILE, MODEL_FOLDER, complete_checkpoints, steps_of
from knapsack_rl.tasks import base_model_path
from knapsack_rl.training.settings import TrainSettings

if TYPE_CHECKING:
    from experiments.gradient_measure import ArithmeticModel, Directions, Pair

__all__ = ["figures", "findings", "measure", "pieces", "tables"]


STRATA = (0.001, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""Prompts are drawn in equal numbers from between these success rates; beyond them gradients are next to never seen."""
MEASURE = 4
"""Stream of random numbers; simulations use those below."""


STEPS, QUICK_STEPS = (0, 100, 200), (0, 1)
"""Training steps after which the model is looked at; 0 is the base model."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement per seed and stage.

    Attributes:
        candidates: prompts whose success rate is computed, to draw from.
        prompts: prompts measured.
        pool: rollouts sampled of each, for its failures.
        groups: groups drawn per prompt and size.
        population: other prompts, for the large batch and for the mean success rate.
        step_length: of the gradient steps that are taken to check the slopes, times the gradient.
        training: changes to the settings of the main job, for the quick version.
    """

    candidates: int = 1024
    prompts: int = 48
    pool: int = 256
    groups: int = 400
    population: int = 256
    step_length: float = 1e-4
    training: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, options: Options) -> Sizes:
        """The full sizes, or the quick ones."""
        if not options.quick:
            return cls()
        small = (("prompts_per_step", 4), ("held_out_prompts", 8), ("train_prompts", 256), ("eval_samples", 1))
        return cls(128, 8, 24, 40, 32, training=small)


def _pieces(options: Options) -> list[Piece]:
    sizes, steps = Sizes.of(options), QUICK_STEPS if options.quick else STEPS
    return [
        Piece(f"seed{seed}{'-quick' * options.quick}", measured_seed, (seed, steps, sizes, str(_folder(options))))
        for seed in options.seed_range
    ]


def _folder(options: Options) -> Path:
    return options.runs / "gradient_value"


def pieces(options: Options) -> int:
    """Pieces of work."""
    return len(_pieces(options))


def measure(options: Options, done: Callable[[str], None]) -> list[Row]:
    """Train, measure at each stage, fit a value function and write it into the folder of the runs.

    Raises:
        ImportError: the packages of the extra ``trl`` are not installed.
    """
    rows = run_pieces(_pieces(options), _folder(options), options.workers, done)
    write_fit(fit(Measured.of(rows)), _folder(options) / FITTED_VALUE.name)
    return rows


def measured_seed(seed: int, steps: tuple[int, ...], sizes: Sizes, folder: str) -> list[Row]:
    """Rows of one training run, a piece per stage so that an interruption costs little."""
    settings = TrainSettings(**{"seed": seed, "threads": 1, "eval_every": 0} | dict(sizes.training))
    label = f"seed{seed}{'-quick' * bool(sizes.training)}"
    rows: list[Row] = []
    for step in steps:
        model = model_at(step, settings, Path(folder) / f"training-{label}")
        piece = Piece(f"{label}-step{step}", measured_stage, (seed, step, sizes, str(model)))
        rows += run_pieces([piece], Path(folder) / "stages", 1, lambda _: None)
    return rows


def measured_stage(seed: int, step: int, sizes: Sizes, folder: str) -> list[Row]:
    """Rows of one model: one of the stage, one for each prompt."""
    import torch

    from experiments.gradient_measure import ArithmeticModel, PromptScores
    from knapsack_rl.tasks import make_splits, to_rows

    torch.set_num_threads(1)
    torch.manual_seed(1000 * seed + step)
    rng = np.random.default_rng([seed, MEASURE, step])
    model = ArithmeticModel(Path(folder))
    everyone = to_rows(make_splits().train)  # training prompts: nothing is chosen on held-out ones
    order = rng.permutation(len(everyone))
    others = [everyone[i] for i in order[: sizes.population]]
    candidates = [everyone[i] for i in order[sizes.population : sizes.population + sizes.candidates]]
    rates = model.success_rates(model.pairs(candidates))
    along = _directions(model, others)
    other_pairs = model.pairs(others)
    chosen = stratified(rates, sizes.prompts, rng)
    mine = [candidates[i] for i in chosen]
    pool = model.sample(mine, sizes.pool)
    rows: list[Row] = [
        {
            "part": "stage",
            "seed": seed,
            "step": step,
            "mean_rate": _short(rates.mean()),
            "batch_norm": _short(along.batch.norm()),
            "exact_rate": _short(rates[chosen].mean()),
            "sampled_rate": _short(np.mean([rollouts.rewards.mean() for rollouts in pool])),
        }
    ]
    for right, rollouts in zip(model.pairs(mine), pool, strict=True):
        if rollouts.rewards.all():
            continue  # no failure was sampled
        scores = PromptScores(model, right, rollouts)
        by_size = {size: scores.groups(size, sizes.groups, along, rng) for size in GROUP_SIZES}
        row: Row = {"part": "prompt", "seed": seed, "step": step, "p": _short(scores.rate)}
        for name in ("norm", "cosine", "own", "population"):
            row[name] = [_short(getattr(groups, name).mean()) for groups in by_size.values()]
        eight = by_size[8]
        mixed = np.flatnonzero(eight.norm > 0.0)
        if mixed.size:
            at = int(mixed[0])
            gradient = scores.gradient(eight.weights[at])
            gained = _step(model, sizes.step_length * gradient, right, other_pairs) / sizes.step_length
            row["step_taken"] = [
                _short(gained[0]),
                _short(eight.own[at]),
                _short(gained[1]),
                _short(eight.population[at]),
            ]
        rows.append(row)
    return rows


def _directions(model: ArithmeticModel, others: list[dict[str, Any]]) -> Directions:
    """Gradients of the other prompts: of a GRPO batch of 8 rollouts each, and of their mean success rate."""
    from experiments.gradient_measure import Directions, policy_gradient

    batch = policy_gradient(model, model.sample(others, 8))
    assert batch is not None, "a large batch holds mixed groups"
    return Directions(batch, model.gradient(model.log_probabilities(model.pairs(others)).exp().mean()))


def _step(model: ArithmeticModel, step: Any, right: Pair, others: list[Pair]) -> FloatArray:
    """Gain in success rate (own, population) by a step of the parameters, which are then put back."""
    before = np.array([model.success_rates([right])[0], model.success_rates(others).mean()])
    model.move(step)
    after = np.array([model.success_rates([right])[0], model.success_rates(others).mean()])
    model.move(None)
    return after - before


def stratified(rates: FloatArray, prompts: int, rng: np.random.Generator) -> IntArray:
    """Indices of prompts, as evenly as can be over the strata of success rates.

    Args:
        rates: (P,) of all candidates.
        prompts: how many; fewer if there are fewer within the strata.
        rng: source of randomness.
    """
    stratum = np.searchsorted(STRATA, rates, side="right") - 1
    inside = np.flatnonzero((stratum >= 0) & (stratum < len(STRATA) - 1))
    shuffled = inside[rng.permutation(inside.size)]
    # A prompt's turn is its place within its stratum: first one of each, then a second of each, and so on.
    turn = np.array([int((stratum[shuffled[:k]] == stratum[i]).sum()) for k, i in enumerate(shuffled)])
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:prompts]])


def _short(number: Any) -> float:
    """Four significant digits: rows stay small."""
    return float(f"{float(number):.4g}")


def model_at(step: int, settings: TrainSettings, folder: Path) -> Path:
    """Folder of the model after a number of steps of a training run; 0 is the base model.

    The run is that of ``knapsack-rl train`` with these settings, resumed from one number of steps to the next; models
    in the folder are used again.

    Args:
        step: number of steps, >= 0, not below that of an earlier call.
        settings: of the run; its ``steps`` are replaced, and its model is the shipped one.
        folder: of the run and the models.

    Raises:
        ValueError: the run already has more steps, and the model was not kept.
    """
    target = base_model_path() if step == 0 else folder / f"step-{step}"
    if not target.is_dir():
        _train_to(replace(settings, steps=step), folder / "run")
        partial = folder / f"step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder / "run" / MODEL_FOLDER, partial)
        partial.rename(target)  # so that a model is either complete or absent
    return target


def _train_to(settings: TrainSettings, run: Path) -> None:
    from knapsack_rl.training.recorder import Quiet
    from knapsack_rl.training.run import train

    checkpoints = complete_checkpoints(run)
    if checkpoints and steps_of(checkpoints[-1]) > settings.steps:
        raise ValueError(
            f"the run in {run} is past {settings.steps} steps, at {steps_of(checkpoints[-1])}; delete it to train anew"
        )
    if not checkpoints:
        # The files of a run that was stopped before its first checkpoint are of no use.
        for name in (METRICS_FILE, ALLOCATION_LOG):
            (run / name).unlink(missing_ok=True)
    outcome = train(settings, run, Quiet(), resume=bool(checkpoints))
    if not outcome.finished:
        raise KeyboardInterrupt(f"the run in {run} was interrupted after {outcome.steps} steps")
