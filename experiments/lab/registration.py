"""A registration: what an experiment runs and what would refute it, written and committed before its first run.

A registration is a Markdown file. Its first fenced ``yaml`` block is read by the command, so that what is stated is
what is run; the text around it says what is measured, what is expected, and what refutes it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from experiments.accelerator.train import Settings
from experiments.contract import Row, select
from experiments.lab.beds import bed
from experiments.measures import best_rate
from experiments.pool import ARMS

_BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Registration:
    """What is run.

    Attributes:
        beds: names of ``experiments.lab.beds.BEDS``.
        arms: names of ``experiments.pool.ARMS``.
        seeds: that are reported.
        learning_rates: grid from which each arm gets its own on each bed, in ascending order.
        tuning_seed: on which it is chosen; none of ``seeds``.
        steps: of every run.
        equal_rollouts: see :class:`~experiments.accelerator.train.Settings`; it may be left out.

    Raises:
        ValueError: a value is not allowed.
    """

    beds: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tuning_seed: int
    steps: int
    equal_rollouts: bool = False

    def __post_init__(self) -> None:
        for name in self.beds:
            bed(name)
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
        for name in ("beds", "arms", "seeds", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, and none twice, got {list(values)}")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} must not be one of the seeds that are reported")
        if not all(isinstance(rate, float) and 0 < rate < 1 for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be numbers in (0, 1) such as 0.0006, got {self.learning_rates}")
        if sorted(self.learning_rates) != list(self.learning_rates):
            raise ValueError(f"learning_rates must ascend, got {list(self.learning_rates)}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not isinstance(self.equal_rollouts, bool):
            raise ValueError(f"equal_rollouts must be true or false, got {self.equal_rollouts!r}")

    def tuning(self, shared: Settings) -> list[Settings]:
        """Runs that choose the learning rates.

        Args:
            shared: settings of every run.
        """
        return [
            replace(self._of(shared), dataset=name, arm=arm, seed=self.tuning_seed, learning_rate=rate)
            for name in self.beds
            for arm in self.arms
            for rate in self.learning_rates
        ]

    def chosen_rate(self, tuned: Sequence[Row], name: str, arm: str) -> float:
        """The learning rate of an arm on a bed: of the highest held-out accuracy, averaged over its rollouts.

        Args:
            tuned: rows of the runs of :meth:`tuning`.
            name: of the bed.
            arm: name of the arm.
        """
        return best_rate([row for row in select(tuned, arm=arm) if row["settings"]["dataset"] == name])

    def training(self, shared: Settings, tuned: Sequence[Row]) -> list[Settings]:
        """Runs that are reported, whole seeds first.

        Args:
            shared: settings of every run.
            tuned: rows of the runs of :meth:`tuning`, all of them.
        """
        rates = {(name, arm): self.chosen_rate(tuned, name, arm) for name in self.beds for arm in self.arms}
        return [
            replace(self._of(shared), dataset=name, arm=arm, seed=seed, learning_rate=rates[name, arm])
            for seed in self.seeds
            for name in self.beds
            for arm in self.arms
        ]

    def _of(self, shared: Settings) -> Settings:
        return replace(shared, steps=self.steps, equal_rollouts=self.equal_rollouts)


def read(path: Path) -> Registration:
    """Read a registration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no block of settings, or a setting is unknown, missing or not allowed.
    """
    import yaml

    found = _BLOCK.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} must hold a ```yaml block with the settings of its runs; see registrations/")
    try:
        return _registration(yaml.safe_load(found[1]))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def _registration(stated: Any) -> Registration:
    names = [spec.name for spec in fields(Registration) if spec.default is MISSING]
    if not isinstance(stated, Mapping) or set(stated) - {"equal_rollouts"} != set(names):
        keys = f"{', '.join(names)}, and may have equal_rollouts"
        raise ValueError(f"the block must have exactly the keys {keys}, got {stated!r}")
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in stated.items()}
    return Registration(**values)


def commit_of(path: Path) -> str:
    """Return the commit in which a registration last changed.

    Raises:
        ValueError: it was not committed as it is, or git cannot say.
    """
    asked = ("status", "--porcelain"), ("log", "-1", "--format=%H")
    found = [
        subprocess.run(  # noqa: S603 - a fixed command
            ["git", *words, "--", path.name],  # noqa: S607 - whichever git there is
            cwd=path.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        for words in asked
    ]
    changed, commit = (one.stdout.strip() for one in found)
    if any(one.returncode for one in found) or changed or not commit:
        raise ValueError(f"{path} is not committed as it is; commit it before its runs, or try them with --steps")
    return commit
