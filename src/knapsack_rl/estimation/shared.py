r"""Knowledge that prompts share: what the outcomes of prompts that are alike in a feature say about each other.

The prompts of one value of a column (a level, a topic, a bin of lengths) have logits that spread around a center c with
a standard deviation s. A prompt of which L(g) is known, the likelihood of its outcomes as a function of its logit g,
says of the center

    message(c) = \int Normal(g; c, s^2) L(g) dg

The belief about a center is a distribution on the grid. Between two batches it walks, in a variance v per batch, and
with a small chance it jumps to any rate of the population, with all its prompts. A visit multiplies it by the ratio of
the prompt's messages after and before, so that the outcomes of a prompt count once, however they are divided over
visits. The belief, smoothed by the same s, is a prior for every prompt of the value.

Each triple of a column, a spread s and a speed v is an expert with such a prior; the population is one more. Their
mixture is the prior of the prompt. An expert's weight is multiplied by how well it predicts the outcomes of a batch
*together with what is known of the prompts themselves*, and before each batch a part of all weight is shared anew. So
columns that say nothing, or mislead, lose their weight within a few batches, and what a prompt's own outcomes say
outweighs the prior as they come.

Source: empirical Bayes with covariates (Fay & Herriot 1979); messages of a hierarchical model (Pearl 1988); mixtures of
experts by predictive likelihood with a fixed share (Herbster & Warmuth 1998).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.estimation.bayes import BayesFilterEstimator
from knapsack_rl.estimation.features import MOST_COLUMNS, MOST_VALUES, Features
from knapsack_rl.estimation.products import product
from knapsack_rl.ids import PromptId

SPREADS = np.array([0.5, 1.2, 3.0])
"""Standard deviations, in logits, of the prompts of one value around their center. Where a value holds prompts near 0
and near 1 that are learned together, 2.0 in place of 3.0 predicts too many gradients."""

SPEEDS = np.array([0.001, 0.03])
"""Variances, in squared logits per batch, of the walk of a center."""

JUMPS = 0.01
"""Chance per batch that a center jumps."""

SHARE, SHARE_VISITS = 0.02, 64
"""Weight shared before a batch of at least so many visits, and in proportion before a smaller one."""

IN_USE = 1e-3
"""Experts of less weight are left out of a prior."""

_STRIDE = MOST_COLUMNS + 1
_EXPERTS = SPREADS.size * SPEEDS.size


class SharedKnowledge:
    """Priors of prompts by their features.

    Args:
        grid: the estimator of single prompts; only its grid is used.

    Attributes:
        features: codes of the prompts.
        weights: (1 + columns x spreads x speeds,) probability of each expert; the first is the population.
        clock: batches learned from.
    """

    def __init__(self, grid: BayesFilterEstimator) -> None:
        self.features = Features()
        self.weights = np.ones(1)
        self.clock = 0
        self._grid = grid
        self._row_of = np.full(MOST_VALUES * _STRIDE, -1)  # by number of the value
        self._beliefs = np.empty((0, _EXPERTS, grid.grid.size), dtype=np.float32)
        self._seen = np.empty(0, dtype=np.int64)  # newest batch of the value in each row
        self._known = 0  # rows in use

    @property
    def _first(self) -> FloatArray:
        """Weights before anything is known: half for the population."""
        others = len(self.features.columns) * _EXPERTS
        return np.array([0.5] + [0.5 / others] * others) if others else np.ones(1)

    def note(self, ids: Sequence[PromptId], features: Mapping[str, ArrayLike]) -> None:
        """Keep the features of prompts, see :meth:`knapsack_rl.estimation.features.Features.note`."""
        new = not self.features.columns
        self.features.note(ids, features)
        if new:
            self.weights = self._first

    def trust(self) -> dict[str, float]:
        """Return the weight of each column by its name; the rest is that of the population."""
        by_column = self.weights[1:].reshape(-1, _EXPERTS).sum(axis=1)
        return {column.name: float(w) for column, w in zip(self.features.columns, by_column, strict=True)}

    def prior(self, ids: Sequence[PromptId], population: FloatArray) -> FloatArray | None:
        """Return the (M, grid_points) prior of each prompt, None if no prompt has features.

        Args:
            ids: M prompts.
            population: (grid_points,) prior of a prompt without features.
        """
        codes = self.features.codes(ids)
        has = np.flatnonzero((codes >= 0).any(axis=1))  # none where there are no columns
        if not has.size:
            return None
        used = np.flatnonzero(self.weights[1:] >= IN_USE)
        by_column = self.weights[1:].reshape(-1, _EXPERTS)
        found = np.tile(population, (len(ids), 1))
        found[has] *= 1.0 - self.weights[1:][used].sum()
        for column in np.unique(used // _EXPERTS).tolist():
            experts = np.flatnonzero(by_column[column] >= IN_USE)
            values, which = _values(codes[has], [column])
            now = self._now(values, experts, population)
            found[has] += np.einsum("e,veg->vg", by_column[column, experts], self._spread(now, experts))[which[:, 0]]
        return found

    def learn(
        self,
        ids: Sequence[PromptId],
        population: FloatArray,
        known: FloatArray,
        visit: FloatArray,
    ) -> None:
        """Weigh the experts by how well they predicted the outcomes of a batch, then learn from them.

        Args:
            ids: M prompts.
            population: (grid_points,) prior of a prompt without features.
            known: (M, grid_points) likelihood of what was observed of each prompt before.
            visit: (M, grid_points) likelihood of its outcomes now.
        """
        codes = self.features.codes(ids)
        has = np.flatnonzero((codes >= 0).any(axis=1))  # none where there are no columns
        if not has.size:
            return
        values, which = _values(codes[has], range(codes.shape[1]))
        before = known[has]
        before = (1.0 - JUMPS) * before + JUMPS * product(before, population)[:, None]  # a jump ends a history
        after = before * visit[has]
        now = self._now(values, np.arange(_EXPERTS), population)
        priors = self._spread(now, np.arange(_EXPERTS))

        def predicted(likelihood: FloatArray) -> FloatArray:
            """Log probability of what a likelihood is of, by every expert: (experts, M)."""
            of_columns = [np.einsum("meg,mg->em", priors[at], likelihood) for at in which.T]
            return np.log(np.concatenate([product(likelihood, population)[None], *of_columns]))

        self._weigh((predicted(after) - predicted(before)).sum(axis=1), has.size)
        now *= self._messages(before, after, which, values.size)
        now /= now.sum(axis=2, keepdims=True)
        self.clock += 1
        rows = self._rows(values)
        self._beliefs[rows], self._seen[rows] = np.maximum(now, self._grid.FLOOR), self.clock

    def _weigh(self, scores: FloatArray, visits: int) -> None:
        """Share a part of the weights, then multiply them by the probability of the visits."""
        share = SHARE * min(visits / SHARE_VISITS, 1.0)
        weights = ((1.0 - share) * self.weights + share * self._first) * np.exp(scores - scores.max())
        self.weights = weights / weights.sum()

    def _now(self, values: IntArray, experts: IntArray, population: FloatArray) -> FloatArray:
        """Return the (V, experts, grid_points) beliefs about centers in the coming batch."""
        rows = self._row_of[values]
        found = np.broadcast_to(population, (values.size, experts.size, population.size)).copy()
        old = np.flatnonzero(rows >= 0)
        if old.size:
            age = (self.clock + 1 - self._seen[rows[old]])[:, None]
            walked = self._grid.walked(self._beliefs[rows[old]][:, experts], SPEEDS[experts % SPEEDS.size] * age)
            stays = ((1.0 - JUMPS) ** age)[:, :, None]
            found[old] = stays * walked / walked.sum(axis=2, keepdims=True) + (1.0 - stays) * population
        return found

    def _spread(self, centers: FloatArray, experts: IntArray) -> FloatArray:
        """Return the (V, experts, grid_points) priors of prompts around centers."""
        found = self._grid.walked(centers, np.broadcast_to(SPREADS[experts // SPEEDS.size] ** 2, centers.shape[:2]))
        return found / found.sum(axis=2, keepdims=True)

    def _messages(self, before: FloatArray, after: FloatArray, which: IntArray, values: int) -> FloatArray:
        """Return the (values, experts, grid_points) likelihood of a batch given the centers.

        Args:
            before: (M, grid_points) likelihood of what was known of each prompt.
            after: (M, grid_points) likelihood of all outcomes.
            which: (M, columns) position of each prompt's values.
            values: their number.
        """
        rows = np.stack([after, before])[:, :, None]
        logs = np.log(self._grid.walked(rows, np.broadcast_to(SPREADS**2, (1, 1, SPREADS.size))))
        order = np.argsort(which, axis=None, kind="stable")
        starts = np.searchsorted(which.ravel()[order], np.arange(values))
        together = np.add.reduceat((logs[0] - logs[1])[order // which.shape[1]], starts, axis=0)
        return np.exp(together - together.max(axis=2, keepdims=True)).repeat(SPEEDS.size, axis=1)

    def _rows(self, values: IntArray) -> IntArray:
        """Return the row of each value, a new one for a value never seen."""
        new = values[self._row_of[values] < 0]
        size = self._known + new.size
        if size > self._seen.size:
            more = max(size, 2 * self._seen.size) - self._seen.size
            self._beliefs = np.concatenate([self._beliefs, np.empty((more, *self._beliefs.shape[1:]), np.float32)])
            self._seen = np.concatenate([self._seen, np.empty(more, np.int64)])
        self._row_of[new] = np.arange(self._known, size)
        self._known = size
        return self._row_of[values]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all that was learned."""
        values = np.flatnonzero(self._row_of >= 0)
        values = values[np.argsort(self._row_of[values])]
        return self.features.state_dict() | {
            "weights": self.weights.copy(),
            "clock": np.array([self.clock]),
            "values": values,
            "beliefs": self._beliefs[: self._known].copy(),
            "seen": self._seen[: self._known].copy(),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what was learned.

        Raises:
            ValueError: a part is missing or damaged.
        """
        self.features.load_state_dict(state)
        weights, clock, values, beliefs, seen = (
            np.asarray(state.get(name, ())) for name in ("weights", "clock", "values", "beliefs", "seen")
        )
        if weights.shape != self._first.shape or not (weights >= 0).all() or not np.isclose(weights.sum(), 1.0):
            raise ValueError(f"the saved weights of shared knowledge must be a distribution, got {weights!r}")
        if clock.shape != (1,) or clock.dtype != np.int64 or clock[0] < 0:
            raise ValueError(f"the saved clock of shared knowledge must be a count, got {clock!r}")
        sizes = np.array([column.size for column in self.features.columns])
        if values.ndim != 1 or values.dtype != np.int64 or np.unique(values).size < values.size:
            raise ValueError("the saved values of shared knowledge must be distinct numbers")
        column, code = values % _STRIDE, values // _STRIDE
        if values.size and ((values < 0).any() or (column >= sizes.size).any() or (code >= sizes[column]).any()):
            raise ValueError("a saved value of shared knowledge does not belong to a column")
        shape = (values.size, *self._beliefs.shape[1:])
        if (
            beliefs.shape != shape
            or beliefs.dtype != np.float32
            or not np.allclose(beliefs.sum(axis=2), 1.0, atol=1e-3)
        ):
            raise ValueError(f"the saved beliefs of shared knowledge must be distributions of shape {shape}")
        if not (beliefs > 0).all():
            raise ValueError("the saved beliefs of shared knowledge must be above 0")
        if seen.shape != values.shape or seen.dtype != np.int64 or (seen < 1).any() or (seen > clock[0]).any():
            raise ValueError(f"the saved batches of shared knowledge must be from 1 to {clock[0]}")
        self.weights, self.clock = weights.astype(np.float64), int(clock[0])
        self._beliefs, self._seen, self._known = beliefs.copy(), seen.copy(), values.size
        self._row_of[:] = -1
        self._row_of[values] = np.arange(values.size)


def _values(codes: IntArray, columns: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Return the distinct numbers of the values in some columns, and the (M, columns) position of each among them."""
    distinct, which = np.unique(codes[:, columns] * _STRIDE + np.asarray(columns), return_inverse=True)
    return distinct, which.reshape(codes.shape[0], len(columns))
