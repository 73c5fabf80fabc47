"""Settings of the allocation, declared here once, and what makes flags and checks of a settings class.

Every configuration of the project has the fields of :class:`AllocationSettings`. One that cannot work is refused when
the settings are made.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from knapsack_rl.advantages import OVER_MEAN
from knapsack_rl.allocation.tokens import BUDGET_UNITS
from knapsack_rl.allocation.value import VALUE_FORMS
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.estimation.grid import check_posterior, check_top_up
from knapsack_rl.estimation.named import ESTIMATORS

ALLOCATIONS = ("knapsack", "paper", "uniform")

AUTO = "auto"
"""A setting that fits the others: the value goes by the advantage."""

MATCHED_VALUE = "likelihood-0.5"
"""The value that fits advantages over a mean."""

LEAST_OF_TWO_ROUNDS = 3
"""Fewest mean rollouts of a prompt that can be divided into two rounds: the first group of two, and one more."""


LISTED = ("feature_columns",)
"""Settings that take names as text with commas, or as a list."""


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a field of a settings class, with the help and the choices of its flag.

    The metadata holds what argparse takes and nothing else: parsers of dataclasses, such as TRL's, pass all of it on.
    """
    return field(default=default, metadata={"help": text, "choices": choices})


def kind_of(setting: dataclasses.Field[Any]) -> type:
    """Return the type of a field of a settings class; one whose default is None is a number that need not be given."""
    return float if setting.default is None else type(setting.default)


@dataclass(kw_only=True)
class AllocationSettings:
    """Settings of the allocation, declared here once; every configuration of the project has these fields.

    Attributes:
        allocation: ``"knapsack"``, ``"paper"`` (the paper's rule with its fallback; the estimator is its window),
            or ``"uniform"`` for stock GRPO with the same metrics.
        estimator: name of the estimator of success rates.
        estimator_settings: settings of the estimator, such as ``"window=8,minimum=4"``.
        value: the value that is maximised: a name, ``"power-A-B"`` for the gain p^A (1-p)^B, ``"likelihood-B"``, or the
            import path ``"package.module:function"`` of a function ``f(counts, success_rates)``. Estimators on a grid
            take any, ``"beta"`` names alone, the window only without its fallback. ``"auto"`` fits the advantage of the
            engine: :data:`MATCHED_VALUE` with advantages over a mean, the paper's value with all else and for its rule.
        budget_unit: ``"rollouts"``: a step has prompts x mean rollouts. ``"tokens"``: a step has as many expected
            tokens as that would take, and its number of rollouts varies; until lengths are observed it is uniform.
        min_rollouts: fewest rollouts of a prompt. 0 lets prompts be skipped until another look is worth its rollouts;
            with 1 a prompt may get a single rollout, which is observed but has no gradient.
        max_rollouts: most rollouts of a prompt.
        rounds: 1, or 2: half of a step's rollouts go to all prompts alike, and the rest where the outcomes of that half
            say that they gain most, see :meth:`knapsack_rl.session.Session.plan_rest`.
        success_threshold: an outcome above it counts as a success; by default what counts is learned from the outcomes,
            see :mod:`knapsack_rl.success`.
        feature_columns: columns of the data by which prompts are alike, a list or ``"level,topic"``: texts are
            categories, numbers are numbers. Prompts that are alike inform each other's estimates, see
            :mod:`knapsack_rl.estimation.shared`; needs the Bayes filter.
        prior: run folder, log or saved state of an earlier run, see :mod:`knapsack_rl.offline.earlier`: the success
            rate that a prompt had there is one more such column.

    Raises:
        ValueError: a setting has the wrong type or is out of range, or the settings contradict each other.
    """

    allocation: str = option("knapsack", "how a step's rollouts are divided over its prompts", ALLOCATIONS)
    estimator: str = option("bayes-filter", "estimator of success rates", tuple(ESTIMATORS))
    estimator_settings: str = option("", "settings of the estimator, such as 'window=8,minimum=4'")
    value: str = option(
        AUTO,
        f"value that is maximised: {', '.join(VALUE_FORMS)}, or package.module:function; auto fits the advantage",
    )
    budget_unit: str = option("rollouts", "unit of a step's budget", BUDGET_UNITS)
    min_rollouts: int = option(2, "fewest rollouts of a prompt; 0 lets prompts be skipped")
    max_rollouts: int = option(128, "most rollouts of a prompt")
    rounds: int = option(1, "1, or 2: half of a step's rollouts for all prompts, the rest by the outcomes of that half")
    success_threshold: float | None = option(None, "an outcome above it is a success; learned by default")
    feature_columns: str = option("", "columns by which prompts are alike, such as 'level,topic'")
    prior: str = option("", "run folder, log or state of an earlier run, whose success rates are one more such column")

    def __post_init__(self) -> None:
        self.check_allocation()

    @classmethod
    def of(cls, source: Any) -> AllocationSettings:
        """Return these settings alone, read from an object that may have some of them as attributes.

        An ``advantage`` over the mean among them decides on the value, if that is ``"auto"``.
        """
        names = [spec.name for spec in dataclasses.fields(AllocationSettings)]
        found = AllocationSettings(**{name: getattr(source, name) for name in names if hasattr(source, name)})
        advantage = getattr(source, "chosen_advantage", getattr(source, "advantage", None))
        if advantage in OVER_MEAN:
            found.value = found.chosen_value(advantage)
        return found

    def chosen_value(self, advantage: str | None = None) -> str:
        """Return the value that is maximised.

        Args:
            advantage: of the engine, to which ``"auto"`` fits the value; by default that of these settings, if any.
        """
        if self.value != AUTO:
            return self.value
        over_mean = (advantage or getattr(self, "advantage", None)) in OVER_MEAN
        return MATCHED_VALUE if over_mean and self.estimator_in_use != "window" else "knapsack"

    @property
    def estimator_in_use(self) -> str:
        """Name of the estimator; the paper's rule has its own."""
        return "window" if self.allocation == "paper" else self.estimator

    def check_allocation(self, mean: int | None = None, name: str = "rollouts_per_prompt") -> None:
        """Check these settings by making the allocator once.

        Args:
            mean: mean rollouts of a prompt, if known.
            name: the engine's name for it.

        Raises:
            ValueError: a setting is out of range, or the settings contradict each other.
        """
        check_fields(self, AllocationSettings)
        if self.success_threshold is not None and not math.isfinite(self.success_threshold):
            raise ValueError(f"success_threshold must be a finite number, got {self.success_threshold!r}")
        try:
            allocator = self.make_allocator()
        except TypeError as error:
            raise ValueError(f"estimator_settings {self.estimator_settings!r}: {error}") from error
        except ValueError as error:
            hint = f"estimator_settings {self.estimator_settings!r}: " if self.estimator_settings else ""
            raise ValueError(f"{hint}{error}") from error
        if (self.columns or self.prior) and self.estimator_in_use != "bayes-filter":
            raise ValueError(
                f"feature_columns and prior need the estimator 'bayes-filter', got {self.estimator_in_use!r}"
            )
        if self.budget_unit == "tokens" and self.allocation != "knapsack":
            raise ValueError(f"budget_unit='tokens' needs allocation='knapsack', got {self.allocation!r}")
        if mean is not None and not self.min_rollouts <= mean <= self.max_rollouts:
            raise ValueError(
                f"min_rollouts <= {name} <= max_rollouts must hold, got "
                f"min_rollouts={self.min_rollouts}, {name}={mean}, max_rollouts={self.max_rollouts}"
            )
        if self.rounds not in (1, 2):
            raise ValueError(f"rounds must be 1 or 2, got {self.rounds}")
        if self.rounds == 2:
            if self.allocation != "knapsack":
                raise ValueError(f"rounds=2 needs allocation='knapsack', got {self.allocation!r}; set rounds=1")
            check_rounds(allocator)
            if mean is not None and mean < LEAST_OF_TWO_ROUNDS:
                raise ValueError(
                    f"rounds=2 needs {name} of at least {LEAST_OF_TWO_ROUNDS}, of which a prompt gets two in the first "
                    f"round, got {mean}; raise it or set rounds=1"
                )

    @property
    def columns(self) -> list[str]:
        """Names of the columns by which prompts are alike."""
        return [name for part in self.feature_columns.strip("[]").split(",") if (name := part.strip(" '\""))]

    def check_columns(self, present: Sequence[str]) -> None:
        """Check that the columns by which prompts are alike are there.

        Args:
            present: columns of the data set.

        Raises:
            ValueError: one is not.
        """
        if absent := [name for name in self.columns if name not in present]:
            raise ValueError(f"feature_columns must be columns of the data set, {list(present)}, got {absent}")

    @property
    def estimator_options(self) -> dict[str, Any]:
        """Keyword arguments of the estimator.

        Raises:
            ValueError: ``estimator_settings`` is not a list of ``name=value`` with numbers or ``true``, ``false``.
        """
        found: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in self.estimator_settings.split(","))):
            name, _, text = part.partition("=")
            try:
                found[name.strip()] = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"estimator_settings: {part!r} must be name=value with a number, true or false as the value"
                ) from error
        return found

    def check_advantage(self, advantage: str | None) -> None:
        """Check that the estimator gives what an advantage of the engine goes by.

        Raises:
            ValueError: it does not.
        """
        if advantage == "posterior-mean":
            check_posterior(self.make_allocator().estimator)

    def make_allocator(self) -> KnapsackAllocator:
        """Return the allocator that these settings describe; under uniform allocation it only observes.

        Raises:
            ValueError: a setting is out of range.
        """
        return KnapsackAllocator(
            self.estimator_in_use,
            self.min_rollouts,
            self.max_rollouts,
            success=self.success_threshold,
            budget_unit=self.budget_unit,  # type: ignore[arg-type] # checked above
            value=self.chosen_value(),
            **self.estimator_options,
        )


def check_rounds(allocator: KnapsackAllocator) -> None:
    """Refuse an allocator that cannot divide a step into two rounds.

    Raises:
        ValueError: it counts in tokens, may skip prompts, or cannot judge further rollouts of a group.
    """
    if allocator.budget_unit != "rollouts" or allocator.min_rollouts == 0:
        raise ValueError(
            "rounds=2 gives every prompt rollouts in the first round, so it needs budget_unit='rollouts' and "
            f"min_rollouts of at least 1, got {allocator.budget_unit!r} and {allocator.min_rollouts}; set rounds=1"
        )
    try:
        check_top_up(allocator.estimator)
    except ValueError as error:
        raise ValueError(f"rounds=2: {error}; set rounds=1") from error


def check_fields(settings: Any, kind: type) -> None:
    """Check the type of every field of a settings class against its default, and its choices.

    Raises:
        ValueError: a value has another type, or is not one of the choices.
    """
    for spec in dataclasses.fields(kind):
        given, wanted = getattr(settings, spec.name), kind_of(spec)
        if spec.name in LISTED and isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
            given = ",".join(map(str, given))
            object.__setattr__(settings, spec.name, given)
        if given is None and spec.default is None:
            continue
        if wanted is float and isinstance(given, int) and not isinstance(given, bool):
            given = float(given)
            object.__setattr__(settings, spec.name, given)
        if type(given) is not wanted:
            raise ValueError(f"{spec.name} must be {wanted.__name__}, got {given!r}")
        choices = spec.metadata.get("choices")
        if choices and given not in choices:
            raise ValueError(f"{spec.name} must be one of {', '.join(choices)}, got {given!r}")
