"""Rules of the field as :class:`~experiments.rounds.Rounds`: oversample, skip, balance, pilot, conformal stop.

Each follows its source in what is sampled when; the rest (loss, learning rate, size of the training batch) is that
of all other policies here. Nothing imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.groups import GroupOutcomes
from knapsack_rl.ids import PromptId


class Oversample:
    """Draw batches of prompts until enough groups hold both outcomes; train on those alone.

    A step ends after ``max_rounds`` batches or once the data set is used up, with what there is.

    Args:
        ids: prompts of the data set, distinct.
        prompts: groups that a step trains on.
        rollouts: rollouts per prompt.
        seed: of the order in which prompts are drawn.
        max_rounds: batches generated per step at most, verl's ``max_num_gen_batches``.

    Source: dynamic sampling of DAPO (arXiv 2503.14476).
    """

    def __init__(
        self, ids: Sequence[PromptId], prompts: int, rollouts: int, *, seed: int = 0, max_rounds: int = 10
    ) -> None:
        self.ids, self.prompts, self.rollouts, self.max_rounds = list(ids), prompts, rollouts, max_rounds
        self._rng = np.random.default_rng(seed)
        self._order: list[int] = []
        self._at = 0

    def start(self, prompts: list[PromptId]) -> None:
        """Begin a step; the rule draws prompts from its own order, because a step needs more than the batch."""
        self._effective: list[PromptId] = []
        self._used: set[PromptId] = set()
        self._rounds = 0

    def request(self) -> Mapping[PromptId, int]:
        """The next batch of prompts, N rollouts each."""
        if len(self._effective) >= self.prompts or self._rounds >= self.max_rounds:
            return {}
        self._rounds += 1
        return dict.fromkeys(self._draw(self._size()), self.rollouts)

    def observe(self, prompts: list[PromptId], outcomes: GroupOutcomes) -> None:
        """Note the groups that hold both outcomes."""
        self._effective += [prompt for prompt, good in zip(prompts, outcomes.effective, strict=True) if good]

    def keep(self, prompts: list[PromptId], group_R: IntArray, success_R: IntArray) -> IntArray:
        """Rows of the first effective groups, as many as a step trains on; of the first groups if none is."""
        wanted = set((self._effective or prompts)[: self.prompts])
        return np.flatnonzero(np.array([prompt in wanted for prompt in prompts])[group_R]).astype(np.int64)

    def _size(self) -> int:
        return self.prompts

    def _takes(self, prompt: PromptId) -> bool:
        """Whether a prompt whose turn it is gets rollouts."""
        return True

    def _draw(self, size: int) -> list[PromptId]:
        """The next prompts in order, none twice in a step; a second pass over the data set takes what was refused."""
        found: list[PromptId] = []
        for passed in range(2 * len(self.ids)):
            if len(found) == size:
                break
            if self._at == len(self._order):
                self._order, self._at = self._shuffled(), 0
            prompt = self.ids[self._order[self._at]]
            self._at += 1
            if prompt not in self._used and (passed >= len(self.ids) or self._takes(prompt)):
                found.append(prompt)
                self._used.add(prompt)
        return found

    def _shuffled(self) -> list[int]:
        """A new order of the data set, by position."""
        return self._rng.permutation(len(self.ids)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The order and the position in it."""
        return {"order": self._order, "at": self._at, "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in the order."""
        self._order, self._at = list(state["order"]), int(state["at"])
        self._rng.bit_generator.state = state["rng"]


class Skip(Oversample):
    """Before generating, skip a prompt by how often its last visits in a row had no variance; then oversample.

    A prompt with z such visits is taken with probability e^z; e is kept apart for prompts that were last all right
    and all wrong, and moves by a hundredth a step so that a quarter of the groups has no variance, a third of them
    easy. The second and later batches of a step are only as large as needed.

    Args:
        ids: as :class:`Oversample`.
        prompts: as :class:`Oversample`.
        rollouts: as :class:`Oversample`.
        seed: as :class:`Oversample`.
        max_rounds: as :class:`Oversample`.

    Source: GRESO (arXiv 2506.02177).
    """

    TARGETS: ClassVar[dict[str, float]] = {"easy": 0.25 / 3, "hard": 0.5 / 3}
    START, STEP, LEAST, MOST = 0.5, 0.01, 0.05, 0.95
    SAFETY = 1.25

    def __init__(
        self, ids: Sequence[PromptId], prompts: int, rollouts: int, *, seed: int = 0, max_rounds: int = 10
    ) -> None:
        super().__init__(ids, prompts, rollouts, seed=seed, max_rounds=max_rounds)
        self._explore = dict.fromkeys(self.TARGETS, self.START)
        self._flat: dict[PromptId, tuple[str, int]] = {}
        self._seen = {"easy": 0, "hard": 0, "all": 0}

    def start(self, prompts: list[PromptId]) -> None:
        """Adjust the probabilities to the last step, and begin."""
        super().start(prompts)
        if self._seen["all"]:
            for kind, target in self.TARGETS.items():
                sign = -1 if self._seen[kind] / self._seen["all"] >= target else 1
                self._explore[kind] = min(max(self._explore[kind] + sign * self.STEP, self.LEAST), self.MOST)
        self._seen = dict.fromkeys(self._seen, 0)

    def observe(self, prompts: list[PromptId], outcomes: GroupOutcomes) -> None:
        """Count visits in a row without variance."""
        super().observe(prompts, outcomes)
        for prompt, good, total, effective in zip(
            prompts, outcomes.successes, outcomes.totals, outcomes.effective, strict=True
        ):
            self._seen["all"] += 1
            if effective:
                self._flat.pop(prompt, None)
            else:
                kind = "easy" if 0 < good == total else "hard"
                self._seen[kind] += 1
                self._flat[prompt] = (kind, self._flat.get(prompt, (kind, 0))[1] + 1)

    def _size(self) -> int:
        if self._rounds == 1:
            return self.prompts
        flat = self._seen["easy"] + self._seen["hard"]
        share = min(flat / max(self._seen["all"], 1), self.MOST)
        needed = self.SAFETY * (self.prompts - len(self._effective)) / (1.0 - share)
        return min(self.prompts, math.ceil(needed))

    def _takes(self, prompt: PromptId) -> bool:
        kind, visits = self._flat.get(prompt, ("hard", 0))
        return bool(self._rng.random() < self._explore[kind] ** visits)

    def state_dict(self) -> dict[str, Any]:
        """The order, the probabilities and the visits without variance."""
        flat = [[prompt, kind, visits] for prompt, (kind, visits) in self._flat.items()]
        return super().state_dict() | {"explore": self._explore, "flat": flat, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the order, the probabilities and the visits."""
        super().load_state_dict(state)
        self._explore, self._seen = dict(state["explore"]), dict(state["seen"])
        self._flat = {prompt: (kind, visits) for prompt, kind, visits in state["flat"]}


class Sequential:
    """Sample the prompts of a batch in rounds; one that holds N/2 outcomes of either kind stops.

    After ``max_rounds`` rounds of N rollouts the rest stops too. Each group is cut down to N rows, as balanced as it
    can be, so that a step trains on as many rows as under uniform allocation; advantages are those of the whole group.

    Args:
        rollouts: N.
        max_rounds: rounds per step at most.

    Source: Reinforce-Ada (arXiv 2510.04996), its balanced stopping rule.
    """

    def __init__(self, rollouts: int, *, max_rounds: int = 4) -> None:
        self.rollouts, self.max_rounds = rollouts, max_rounds

    def start(self, prompts: list[PromptId]) -> None:
        """All prompts of the batch are open."""
        self._counts = dict.fromkeys(prompts, (0, 0))
        self._rounds = 0

    def request(self) -> Mapping[PromptId, int]:
        """N more rollouts for every prompt that is not balanced yet."""
        if self._rounds >= self.max_rounds:
            return {}
        self._rounds += 1
        half = self.rollouts // 2
        return {prompt: self.rollouts for prompt, counts in self._counts.items() if min(counts) < half}

    def observe(self, prompts: list[PromptId], outcomes: GroupOutcomes) -> None:
        """Add up successes and failures."""
        for prompt, good, total in zip(prompts, outcomes.successes.tolist(), outcomes.totals.tolist(), strict=True):
            successes, failures = self._counts[prompt]
            self._counts[prompt] = (successes + good, failures + total - good)

    def keep(self, prompts: list[PromptId], group_R: IntArray, success_R: IntArray) -> IntArray:
        """N rows of each group: up to N/2 of the rarer outcome, the rest of the other."""
        kept: list[int] = []
        for group in range(len(prompts)):
            rows = np.flatnonzero(group_R == group)
            good, bad = rows[success_R[rows] == 1], rows[success_R[rows] == 0]
            half = self.rollouts // 2
            most_good = min(good.size, max(half, self.rollouts - bad.size))
            kept += [*good[:most_good], *bad[: self.rollouts - most_good]]
        return np.sort(np.array(kept, dtype=np.int64))

    def state_dict(self) -> dict[str, Any]:
        """Empty: the rule keeps nothing between steps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class PilotCommit(Oversample):
    """Draw prompts and give each a pilot, until enough pilots have a success rate within bounds; commit to those alone.

    A step trains on the pilot and the committed rollouts of its prompts, N each. A prompt below the bounds comes again
    in the next pass over the data set. One above them is skipped; it is left out of later passes once
    ``EVIDENCE`` rollouts of its pilots in a row were right.

    Scaled as in the source, where pilots are a quarter of the N of the GRPO runs beside it (16 of 64, 32 of 128): 2 of
    8, 4 of 16. There one pilot of 16 without a failure leaves a prompt out. Two rollouts are no evidence for that, so
    as many are collected over several pilots. A round of pilots has the prompts of a step and a step 30 rounds, in the
    source three times the prompts and 10 rounds.

    Different from the source: there, pilots run a round ahead, and what exceeds a step's prompts waits up to 4 steps in
    a buffer, whose old rollouts are trained on as if they were new. Here all rollouts are of the step, so prompts that
    wait come first in the next step, with a new pilot.

    Args:
        ids: as :class:`Oversample`.
        prompts: as :class:`Oversample`.
        rollouts: N, pilot and commit together, >= 3.
        seed: as :class:`Oversample`.
        max_rounds: rounds of pilots per step at most.

    Raises:
        ValueError: N is too small.

    Source: Pilot-Commit (arXiv 2605.26606) and its code, ``recipe/pc`` of ``databricks/pilot-commit``, with the bounds
    of its ``train_scripts``.
    """

    LOW, HIGH = 0.125, 0.75
    EVIDENCE = 16

    def __init__(
        self, ids: Sequence[PromptId], prompts: int, rollouts: int, *, seed: int = 0, max_rounds: int = 30
    ) -> None:
        if rollouts < 3:
            raise ValueError(f"a pilot and a commit need at least 3 rollouts per prompt, got {rollouts}")
        pilot = max(rollouts // 4, 2)  # the rate of one rollout is never within the bounds
        super().__init__(ids, prompts, pilot, seed=seed, max_rounds=max_rounds)
        self.commit = rollouts - pilot
        self._right: dict[PromptId, int] = {}
        self._waiting: list[PromptId] = []

    def start(self, prompts: list[PromptId]) -> None:
        """Begin with pilots."""
        super().start(prompts)
        self._committed = False

    def request(self) -> Mapping[PromptId, int]:
        """Pilots of the next prompts, then the rest of the rollouts of those within the bounds."""
        if self._committed:
            return {}
        if pilots := super().request():
            return pilots
        self._committed, self._waiting = True, self._effective[self.prompts :] + self._waiting
        return dict.fromkeys(self._effective[: self.prompts], self.commit)

    def observe(self, prompts: list[PromptId], outcomes: GroupOutcomes) -> None:
        """Judge the pilots."""
        if self._committed:
            return
        for prompt, good, total in zip(prompts, outcomes.successes.tolist(), outcomes.totals.tolist(), strict=True):
            if self.LOW <= good / max(total, 1) <= self.HIGH:
                self._effective.append(prompt)
            self._right[prompt] = self._right.get(prompt, 0) + good if good == total else 0

    def _draw(self, size: int) -> list[PromptId]:
        """Prompts that wait, then the next ones in order."""
        first, self._waiting = self._waiting[:size], self._waiting[size:]
        self._used.update(first)
        return first + super()._draw(size - len(first))

    def _shuffled(self) -> list[int]:
        """Without the prompts that are left out, unless that leaves too few for a step."""
        order = super()._shuffled()
        left = [place for place in order if self._right.get(self.ids[place], 0) < self.EVIDENCE]
        return left if len(left) >= self.prompts else order

    def state_dict(self) -> dict[str, Any]:
        """The order, the prompts that wait, and successes in a row."""
        right = [[prompt, good] for prompt, good in self._right.items() if good]
        return super().state_dict() | {"right": right, "waiting": self._waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the order, the prompts that wait, and the successes."""
        super().load_state_dict(state)
        self._right, self._waiting = dict(state["right"]), list(state["waiting"])


class Conformal(Oversample):
    """Sample each prompt up to 2, 4, 8, ..., N rollouts; one with a success early enough stops.

    Early enough is a first success at place j of k with j / k at most the threshold of k. Thresholds are the conformal
    quantiles of that score (1 without a success) over prompts that are never trained on, sampled N times each in the
    first and every 50th step; these rollouts count. The quantile is the share of those prompts that were solved, less
    0.05.

    Of the scores in the source this is the one for verified tasks: a rule here sees outcomes. The default there, for
    answers that can be compared, also stops where wrong answers agree. The largest size is N, as there, where the sizes
    2 to 32 take the place of 32 rollouts. As many prompts calibrate as a step has; there it is up to the user.

    Args:
        ids: prompts of the data set, distinct, more than ``prompts``.
        prompts: groups that a step trains on, and prompts that calibrate.
        rollouts: N, >= 2.
        seed: of the choice and the order of prompts.

    Raises:
        ValueError: no prompts are left to train on.

    Source: C-GRPO, package ``trl-cgrpo`` 0.2.0, score ``first_success``.
    """

    EVERY = 50
    MARGIN, LEAST, MOST = 0.05, 0.05, 0.95

    def __init__(self, ids: Sequence[PromptId], prompts: int, rollouts: int, *, seed: int = 0) -> None:
        if len(ids) <= prompts:
            raise ValueError(f"{prompts} prompts calibrate, so the data set must have more than that, got {len(ids)}")
        order = np.random.default_rng(seed).permutation(len(ids)).tolist()
        self.calibration = [ids[place] for place in order[:prompts]]
        super().__init__([ids[place] for place in sorted(order[prompts:])], prompts, rollouts, seed=seed)
        self.sizes = [2**power for power in range(1, rollouts.bit_length()) if 2**power < rollouts] + [rollouts]
        self._thresholds: list[float] = []
        self._age = 0

    def start(self, prompts: list[PromptId]) -> None:
        """Begin a step; the rule draws prompts from its own order, because some are never trained on."""
        super().start(prompts)
        self._passes: dict[PromptId, list[bool]] = {}
        self._age += 1

    @property
    def _calibrates(self) -> bool:
        return not self._thresholds or self._age > self.EVERY

    def request(self) -> Mapping[PromptId, int]:
        """All rollouts of the prompts that calibrate, if that is due; then those up to the next size."""
        if self._calibrates:
            return dict.fromkeys(self.calibration, self.rollouts)
        if self._rounds == len(self.sizes):
            return {}
        if not self._passes:
            self._passes = {prompt: [] for prompt in self._draw(self.prompts)}
        size, before = self.sizes[self._rounds], self.sizes[self._rounds - 1] if self._rounds else 0
        self._rounds += 1
        goes_on = [p for p, passes in self._passes.items() if len(passes) == before and not self._stops(passes)]
        return dict.fromkeys(goes_on, size - before)

    def observe(self, prompts: list[PromptId], outcomes: GroupOutcomes) -> None:
        """Add the outcomes up, or calibrate."""
        found = [outcomes.success_R[outcomes.group_R == group].tolist() for group in range(len(prompts))]
        if self._calibrates:
            self._calibrate(found)
        else:
            for prompt, passes in zip(prompts, found, strict=True):
                self._passes[prompt] += passes

    def keep(self, prompts: list[PromptId], group_R: IntArray, success_R: IntArray) -> IntArray:
        """All rows but those that calibrated."""
        trained = np.array([prompt in self._passes for prompt in prompts])
        return np.flatnonzero(trained[group_R]).astype(np.int64)

    def _stops(self, passes: list[bool]) -> bool:
        """Whether a prompt with the rollouts of a size has a success, early enough."""
        return any(passes) and _first_success(passes) <= self._thresholds[self.sizes.index(len(passes))]

    def _calibrate(self, found: list[list[bool]]) -> None:
        scores = np.sort([[_first_success(passes[:size]) for size in self.sizes] for passes in found], axis=0)
        solved = float(np.mean(scores[:, -1] < 1.0))
        share = 1.0 - min(max(1.0 - solved + self.MARGIN, self.LEAST), self.MOST)
        place = min(max(math.ceil((len(found) + 1) * share), 1), len(found)) - 1
        self._thresholds, self._age = scores[place].tolist(), 1

    def state_dict(self) -> dict[str, Any]:
        """The order, the thresholds and their age."""
        return super().state_dict() | {"thresholds": self._thresholds, "age": self._age}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the order, the thresholds and their age; the prompts that calibrate are those of the seed."""
        super().load_state_dict(state)
        self._thresholds, self._age = list(state["thresholds"]), int(state["age"])


def _first_success(passes: Sequence[bool]) -> float:
    """Place of the first success over the number of rollouts; 1 without a success."""
    return (passes.index(True) + 1) / len(passes) if True in passes else 1.0


RULES: dict[str, Callable[[Sequence[PromptId], int, int, int], Any]] = {
    "oversample": lambda ids, prompts, rollouts, seed: Oversample(ids, prompts, rollouts, seed=seed),
    "skip": lambda ids, prompts, rollouts, seed: Skip(ids, prompts, rollouts, seed=seed),
    "sequential": lambda ids, prompts, rollouts, seed: Sequential(rollouts),
    "pilot-commit": lambda ids, prompts, rollouts, seed: PilotCommit(ids, prompts, rollouts, seed=seed),
    "c-grpo": lambda ids, prompts, rollouts, seed: Conformal(ids, prompts, rollouts, seed=seed),
}
"""Rules by name: made from the prompts of the data set, prompts and rollouts per prompt of a step, and a seed."""
