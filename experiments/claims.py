"""The training experiments as data: arms, claims with the figure and the rule that decide them, tables, plots."""

from __future__ import annotations

from functools import partial
from typing import Any

from experiments import tokens
from experiments.measures import ESTIMATE_CLASSES
from experiments.pool import label
from experiments.statistics import at_least, at_most, in_every_seed, not_below
from experiments.training import Claim, Table, Training
from knapsack_rl.groups import DIFFICULTY_CLASSES

AIM, PROVEN = 1 / 2, 1 / 1.5
"""Rollouts over those of uniform allocation for the same accuracy: the aim, and the most that its interval may hold."""

TOLERATED = 0.02
"""A regression of solved prompts that would not matter: two points of their success rate."""

SMOLLM2: dict[str, Any] = {
    "model": "smollm2-135m",
    "dataset": "sums",
    "precision": "bfloat16",
    "prompts_per_step": 16,
    "max_rollouts": 64,
    "train_prompts": 96,
    "held_out_prompts": 64,
    "eval_every": 12,
    "eval_samples": 2,
    "save_every": 12,
    "steps": 36,
    "learning_rate": 1e-5,
}
"""Six visits to each prompt; the learning rate is the one that the documentation recommends, tried on nothing."""


def by_arm(*measures: str) -> dict[str, str]:
    """Columns of measures of each arm."""
    return {measure: f"{{row}}, {measure}" for measure in measures}


def accuracy_table(baseline: str = "uniform", **more: str) -> Table:
    """Accuracy at the end and on the way, differences to a baseline, rollouts to its final accuracy."""
    end, way = "accuracy at the end", "mean over the run"
    differences = {f"difference to {label(baseline)}, points": f"{{row}} - {baseline}, {end}"}
    on_the_way = {"its difference, points": f"{{row}} - {baseline}, {way}"}
    cost = {f"rollouts to the final accuracy of {label(baseline)}": f"{{row}} / {baseline}, rollouts"}
    return Table(by_arm("rollouts", end) | differences | by_arm(way) | on_the_way | cost | more)


def more_gradients(arm: str, who: str) -> tuple[Claim, Claim]:
    """The paper's claim on the effective gradient ratio, and the same of prompts."""
    return (
        Claim(
            f"{who}: the effective gradient ratio rises by 20 to 40 points over uniform",
            f"{{{{{arm} - uniform, rollouts with a gradient}}}} points",
            partial(at_least, threshold=0.2),
            "+20 to +40 points",
        ),
        Claim(
            f"{who}: more *prompts* carry a gradient than under uniform",
            f"{{{{{arm} - uniform, prompts with a gradient}}}} points",
            at_least,
        ),
    )


def better(arm: str, other: str, text: str, paper: str = "–", *, on_the_way: bool = False) -> Claim:
    """An arm ends at a higher held-out accuracy than another."""
    way = f"; mean over the run {{{{{arm} - {other}, mean over the run}}}}" if on_the_way else ""
    return Claim(text, f"{{{{{arm} - {other}, accuracy at the end}}}} points of accuracy{way}", at_least, paper)


def dearer(arm: str, reference: str, text: str, threshold: float = 1.0, paper: str = "–") -> Claim:
    """An arm generates more rollouts than another for the final accuracy of that other."""
    rule = partial(at_least, threshold=threshold, neutral=1.0)
    return Claim(text, f"{{{{{arm} / {reference}, rollouts}}}}", rule, paper)


def cheaper(arm: str, reference: str, text: str) -> Claim:
    """An arm needs at most ``AIM`` times the rollouts of another for the final accuracy of that other."""
    return Claim(text, f"{{{{{arm} / {reference}, rollouts}}}}", partial(at_most, aim=AIM, proven=PROVEN))


TRAINING: dict[str, Training] = {
    "gradient-ratio": Training(
        arms=("uniform", "uniform-2n", "paper", "knapsack"),
        claims=(
            *more_gradients("paper", "Paper"),
            *more_gradients("knapsack", "Bayes filter"),
            Claim(
                "Late in uniform training most groups are all correct or all wrong",
                "{{uniform, all correct at the end}} and {{uniform, all wrong at the end}}",
                partial(at_least, threshold=0.5, neutral=0.5),
                "about 40 % and 20 %",
                decided_by="uniform, all correct or all wrong at the end",
            ),
        ),
        layout={
            "ratios": Table(
                by_arm("rollouts with a gradient", "prompts with a gradient", "all correct at the end",
                       "all wrong at the end", "accuracy at the end")
            )
        },
        panels=("rollout_ratio", "prompt_ratio"),
    ),
    "fallback": Training(
        arms=("uniform", "paper", "paper-without-fallback", "empirical-bayes", "knapsack"),
        claims=(
            Claim(
                "Without the fallback unsolved prompts starve",
                "{{paper-without-fallback, rollouts a visit to unsolved prompts}} rollouts a visit; with it "
                "{{paper - paper-without-fallback, rollouts a visit to unsolved prompts}} more",
                at_least,
                "they get N_low",
                decided_by="paper - paper-without-fallback, rollouts a visit to unsolved prompts",
            ),
            Claim(
                "Without the fallback more prompts stay unsolved",
                "{{paper-without-fallback - paper, still unsolved}} points of those unsolved at the start",
                at_least,
            ),
            better("paper", "paper-without-fallback", "The fallback raises held-out accuracy"),
            better("empirical-bayes", "paper", "Empirical Bayes, without a fallback, beats the paper's rule with it"),
            better("knapsack", "paper", "The Bayes filter, without a fallback, beats the paper's rule with it"),
        ),
        layout={
            "unsolved": Table(
                by_arm("rollouts a visit to unsolved prompts", "share of rollouts to unsolved prompts",
                       "still unsolved", "accuracy at the end")
            )
        },
        panels=("accuracy", "still unsolved"),
    ),
    "compute": Training(
        arms=("uniform", "uniform-2n", "uniform-3n", "paper", "knapsack"),
        claims=(
            dearer("uniform-2n", "paper",
                   "For the final accuracy of the paper's rule, uniform 2N generates about twice the rollouts",
                   2.0, "about 2 ×"),
            dearer("uniform", "paper", "For the final accuracy of the paper's rule, uniform N generates more rollouts"),
            dearer("uniform-2n", "knapsack",
                   "For the final accuracy of the Bayes filter, uniform 2N generates about twice the rollouts",
                   2.0, "about 2 ×"),
            dearer("uniform", "knapsack",
                   "For the final accuracy of the Bayes filter, uniform N generates more rollouts"),
            dearer("paper", "knapsack",
                   "For the final accuracy of the Bayes filter, the paper's rule generates more rollouts"),
        ),
        layout={
            "accuracy": accuracy_table(**{"tokens to it": "{row} / uniform, tokens"}),
        },
    ),
    "budgets": Training(
        arms=("uniform", "paper", "knapsack"),
        claims=tuple(
            Claim(
                f"{who}: single prompts get up to 93 rollouts",
                f"largest allocation of a seed {{{{{arm}, largest allocation}}}}",
                partial(in_every_seed, threshold=93),
                "93",
            )
            for arm, who in (("paper", "Paper"), ("knapsack", "Bayes filter"))
        ),
        layout={
            "rates": Table(
                {f"rollouts, {label(arm)}": f"{arm}, rollouts at estimate {{row}}" for arm in ("paper", "knapsack")},
                {name: name for name in ESTIMATE_CLASSES},
                "estimated success rate",
            )
        },
        panels=("budgets paper", "budgets knapsack", "classes paper", "classes knapsack",
                "transitions paper", "transitions knapsack"),
    ),
    "forgetting": Training(
        arms=("uniform", "knapsack", "knapsack-min1", "knapsack-min0"),
        claims=tuple(
            Claim(
                f"Solved prompts do not regress at min_rollouts {minimum}",
                f"{{{{{arm}, change of solved prompts}}}} points of success rate",
                partial(not_below, floor=-TOLERATED),
                "they do not (N_low = 2)" if minimum == 2 else "–",
            )
            for arm, minimum in (("knapsack", 2), ("knapsack-min1", 1), ("knapsack-min0", 0))
        ),
        layout={
            "solved": Table(
                by_arm("change of solved prompts", "solved prompts lost", "seen solved twice, then lost",
                       "accuracy at the end")
                | {"difference to minimum 2, points": "{row} - knapsack, accuracy at the end"}
            )
        },
        panels=("seen solved twice, then lost", "accuracy"),
    ),
    "robustness-training": Training(
        arms=("uniform", "paper-window4", "paper", "paper-window64", "bayes-discount05", "empirical-bayes",
              "bayes-discount1", "knapsack"),
        claims=tuple(
            better(default, arm, f"{label(arm)[0].upper()}{label(arm)[1:]}: less accurate than the default {setting}")
            for arm, default, setting in (
                ("paper-window4", "paper", "window of 16"),
                ("paper-window64", "paper", "window of 16"),
                ("bayes-discount05", "empirical-bayes", "of 0.8"),
                ("bayes-discount1", "empirical-bayes", "of 0.8"),
            )
        ),
        layout={"accuracy": accuracy_table()},
        panels=("accuracy at the end",),
    ),
    "tokens": Training(
        arms=("uniform", "knapsack", "knapsack-tokens"),
        claims=(
            Claim(
                "At equal tokens a budget in tokens gives a better model than one in rollouts",
                "{{knapsack-tokens - knapsack, accuracy at equal tokens}} points of accuracy",
                at_least,
                "open question",
            ),
        ),
        layout={
            "tokens": Table(
                by_arm("tokens", "rollouts", "accuracy at equal tokens")
                | {"difference to uniform N, points": "{row} - uniform, accuracy at equal tokens"}
                | by_arm("accuracy at the end")
                | {"tokens to the final accuracy of uniform N": "{row} / uniform, tokens"}
            )
        },
        panels=("accuracy by tokens",),
        task=f"{tokens.TASK}-",
        changes=tokens.changes,
        prepare=tokens.make_base_model,
        seeds=3,
    ),
    "values-training": Training(
        arms=("uniform", "knapsack", "value-nonzero", "value-variance", "value-signal", "value-fitted"),
        claims=tuple(
            better(arm, "knapsack", f"{what}: better than the paper's value", "open question", on_the_way=True)
            for arm, what in (
                ("value-nonzero", "Chance of a gradient"),
                ("value-variance", "Reward variance"),
                ("value-signal", "Signal to noise"),
                ("value-fitted", "Fitted to measured gradients"),
            )
        ),
        layout={"accuracy": accuracy_table("knapsack")},
    ),
    "replay": Training(
        arms=("uniform", "uniform-replay", "knapsack", "knapsack-replay"),
        claims=tuple(
            Claim(
                f"{who}: with replay fewer prompts stay unsolved",
                f"{{{{{arm} - {arm}-replay, still unsolved}}}} points fewer; "
                f"accuracy {{{{{arm}-replay - {arm}, accuracy at the end}}}} points",
                at_least,
                "proposed; 20 % stay extremely hard",
            )
            for arm, who in (("knapsack", "Bayes filter"), ("uniform", "Uniform N"))
        ),
        layout={
            "unsolved": Table(
                by_arm("still unsolved", "unsolved at the end", "no success at the last visit", "successes replayed")
            ),
            "accuracy": accuracy_table(),
        },
        panels=("still unsolved", "accuracy"),
    ),
    "weighting": Training(
        arms=("uniform", "knapsack", "knapsack-per-prompt", "paper", "paper-per-prompt"),
        claims=tuple(
            better(arm, f"{arm}-per-prompt", f"{who}: weighting per rollout is better than per prompt")
            for arm, who in (("knapsack", "Bayes filter"), ("paper", "Paper"))
        ),
        layout={"accuracy": accuracy_table()},
    ),
    "rivals": Training(
        arms=("uniform", "paper", "knapsack", "oversample", "skip", "sequential"),
        claims=tuple(
            better("knapsack", arm, f"At equal generated rollouts the Bayes filter ends above {label(arm)}",
                   on_the_way=True)
            for arm in ("oversample", "skip", "sequential")
        ),
        layout={
            "accuracy": accuracy_table(),
            "steps": Table(by_arm("steps", "rollouts with a gradient")),
        },
    ),
    "headline-trl": Training(
        arms=("uniform", "uniform-trl-twice", "recommended-trl", "posterior-trl", "posterior-trl-twice"),
        claims=(
            cheaper("posterior-trl-twice", "uniform",
                    "The recommended setting needs at most half the rollouts of uniform N for its final accuracy"),
            better("posterior-trl-twice", "uniform", "The recommended setting ends above uniform N", on_the_way=True),
            better("posterior-trl-twice", "uniform-trl-twice", "It ends above uniform N with two updates a step too",
                   on_the_way=True),
            better("posterior-trl-twice", "posterior-trl", "Two updates a step help the recommended setting",
                   on_the_way=True),
            better("uniform-trl-twice", "uniform", "Two updates a step help uniform N", on_the_way=True),
            cheaper("posterior-trl", "uniform",
                    "With one update a step it needs at most half the rollouts of uniform N"),
            better("posterior-trl", "uniform", "With one update a step it ends above uniform N", on_the_way=True),
            cheaper("recommended-trl", "uniform",
                    "With one update, over the mean of the group, it needs at most half the rollouts of uniform N"),
            better("recommended-trl", "uniform", "With one update, over the mean of the group, it ends above uniform N",
                   on_the_way=True),
            better("posterior-trl", "recommended-trl",
                   "With one update it ends above the same over the mean of the group", on_the_way=True),
        ),
        layout={"accuracy": accuracy_table()},
    ),
    "real-model": Training(
        arms=("uniform", "knapsack"),
        claims=(
            *more_gradients("knapsack", "SmolLM2"),
            better("knapsack", "uniform", "SmolLM2: held-out accuracy is higher at equal rollouts",
                   "+2 to +4 points on average", on_the_way=True),
        ),
        layout={
            "classes": Table(
                {name: f"{{row}} visit {name}" for name in DIFFICULTY_CLASSES},
                {
                    "first visit, both policies": "uniform, first",
                    "last visit, uniform N": "uniform, last",
                    "last visit, Bayes filter": "knapsack, last",
                },
                "",
            ),
            "accuracy": Table(
                by_arm("accuracy before", "accuracy at the end", "mean over the run", "rollouts with a gradient",
                       "prompts with a gradient", "largest allocation")
            ),
        },
        panels=("accuracy", "rollout_ratio"),
        task="smollm2-",
        changes=lambda options: {} if options.quick else SMOLLM2,
        seeds=2,
    ),
}  # fmt: skip
"""Training experiments by name."""
