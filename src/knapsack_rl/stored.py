"""What of an allocator is saved, and how it is restored."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

from knapsack_rl.allocation.tokens import BudgetUnit
from knapsack_rl.allocation.value import ValueLike, named_value
from knapsack_rl.estimation.bayes import BayesFilterEstimator
from knapsack_rl.estimation.lengths import check_length_sums
from knapsack_rl.estimation.protocol import Estimator
from knapsack_rl.estimation.shared import SharedKnowledge
from knapsack_rl.estimation.tracker import Tracker
from knapsack_rl.guarded import Guarded, one_at_a_time
from knapsack_rl.metrics import StepMetrics
from knapsack_rl.state import COUNTERS, FORMAT, VERSION, check_header, read_state, section, write_state
from knapsack_rl.success import LEARNED, LearnedSuccess, SuccessRule


class Stored(Guarded):
    """The base of :class:`knapsack_rl.KnapsackAllocator` that saves and restores it.

    Attributes:
        estimator: of success rates.
        estimator_name: None for an estimator object.
        min_rollouts: N_low.
        max_rollouts: N_up.
        budget_unit: "rollouts" or "tokens".
        value: that is maximised.
        success: the success rule; None if it is learned.
        learned: the rule that is learned, None if one was given.
        tracker: records of all prompts.
        shared: knowledge shared by features; None before any are given.
    """

    estimator: Estimator
    estimator_name: str | None
    min_rollouts: int
    max_rollouts: int
    budget_unit: BudgetUnit
    value: ValueLike
    success: SuccessRule | None
    learned: LearnedSuccess | None
    tracker: Tracker
    shared: SharedKnowledge | None
    _step: StepMetrics

    @one_at_a_time
    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Return all that later allocations depend on: ``{"header": JSON values, "arrays": arrays by name}``.

        Args:
            copy: whether to copy the arrays; if not, they change with the allocator.
        """
        header = {
            "format": FORMAT,
            "version": VERSION,
            "estimator": self.estimator_name,
            "settings": self.estimator.settings(),
            "min_rollouts": self.min_rollouts,
            "max_rollouts": self.max_rollouts,
            "success": LEARNED if self.success is None else None if callable(self.success) else float(self.success),
            "budget_unit": self.budget_unit,
            "value": self.value if isinstance(self.value, str) else None,
            "failures": dict(self.failures),
        } | {counter: getattr(self, f"_{counter}") for counter in COUNTERS}
        arrays = {f"tracker.{name}": array for name, array in self.tracker.state_dict(copy=copy).items()}
        arrays |= {f"estimator.{name}": array for name, array in self.estimator.state_dict().items()}
        if self.learned is not None:
            arrays |= {f"success.{name}": array for name, array in self.learned.state_dict().items()}
        if self.shared is not None:
            arrays |= {f"shared.{name}": array for name, array in self.shared.state_dict().items()}
        return {"header": header, "arrays": arrays}

    @one_at_a_time
    def load_state_dict(self, state: Mapping[str, Any], *, copy: bool = True) -> None:
        """Restore a state into an allocator made with the same estimator; its other settings stay as they are.

        Args:
            state: returned by :meth:`state_dict`.
            copy: whether to copy the arrays; if not, they change with the allocator.

        Raises:
            ValueError: the state is damaged or foreign, or belongs to another estimator or version; the allocator is
                unchanged then.
        """
        header, arrays = check_header(state.get("header")), state.get("arrays")
        given, own = (header["estimator"], header["settings"]), (self.estimator_name, self.estimator.settings())
        if given != own:
            raise ValueError(f"the state belongs to estimator {given}, this allocator uses {own}; use the same one")
        if not isinstance(arrays, Mapping):
            raise ValueError(f"the arrays of the allocator state must be a mapping, got {type(arrays).__name__}")
        learned, rule = LearnedSuccess(), section(arrays, "success.")
        if rule:
            learned.load_state_dict(rule)
        shared = None
        if (alike := section(arrays, "shared.")) and isinstance(self.estimator, BayesFilterEstimator):
            shared = SharedKnowledge(self.estimator)
            shared.load_state_dict(alike)
        tracker = Tracker(self.estimator.evidence_size)
        tracker.load_state_dict(section(arrays, "tracker."), copy=copy)
        check_length_sums(tracker.lengths())
        self.estimator.load_state_dict(section(arrays, "estimator."))
        self.tracker, self.shared = tracker, shared
        self.learned = None if self.learned is None else learned
        self.failures = Counter(header["failures"])
        for counter in COUNTERS:
            setattr(self, f"_{counter}", header[counter])
        self._step = StepMetrics(differ_anyway=0.0 if self.learned is None else learned.differ_anyway)

    @one_at_a_time
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one npz file, atomically and without pickles.

        Raises:
            OSError: the file cannot be written.
        """
        state = self.state_dict(copy=False)
        write_state(path, state["header"], state["arrays"])

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Restore the state in a file; see :meth:`load_state_dict`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: as :meth:`load_state_dict`.
        """
        header, arrays = read_state(path)
        self.load_state_dict({"header": header, "arrays": arrays}, copy=False)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        success: SuccessRule | None = None,
        estimator: Estimator | None = None,
        value: ValueLike | None = None,
    ) -> Self:
        """Make an allocator with the settings and the state in a file.

        Args:
            path: written by :meth:`save`.
            success: the success rule; required if it was a function, otherwise the saved one by default.
            estimator: an estimator object; required if the allocator was made with one.
            value: the value; required unless it was a name, because a file must not name code to run.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or foreign, or a required argument is missing.
        """
        header, arrays = read_state(path)
        check_header(header)
        chosen: dict[str, tuple[Any, str]] = {
            "success": (header["success"] if success is None else success, "a success function"),
            "value": (header["value"] if value is None and named_value(header["value"]) else value, "another value"),
            "estimator": (header["estimator"] if estimator is None else estimator, "an estimator object"),
        }
        for name, (found, kind) in chosen.items():
            if found is None:
                raise ValueError(f"the state was saved with {kind}; pass it again as {name}=...")
        if chosen["success"][0] == LEARNED:
            chosen["success"] = None, ""
        settings = header["settings"] if estimator is None else {}
        kept = {key: header[key] for key in ("min_rollouts", "max_rollouts", "budget_unit")}
        allocator = cls(**{name: found for name, (found, _) in chosen.items()}, **kept, **settings)
        allocator.load_state_dict({"header": header, "arrays": arrays}, copy=False)
        return allocator
