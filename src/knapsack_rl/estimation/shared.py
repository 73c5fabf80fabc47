r"""Knowledge that prompts share: what the outcomes of prompts that are alike in a feature say about each other.

The prompts of one value of a column (a level, a topic, a bin of lengths) have logits that spread around a centre with a
standard deviation s. The likelihood of a prompt's visit as a function of the centre c is that of its logit g, smoothed:

    L(c) = \int Normal(g; c, s^2) Binomial(successes | n, g) dg

and the product over prompts goes into a Bayes filter over centres, which moves with training as the rates of single
prompts do, in amounts that it learns. The posterior of the centre, smoothed by the same s, is a prior for every prompt
of the value. Each pair of a column and a spread s gives such a prior, and the population is one more. Their mixture is
the prior of the prompt: weights are multiplied by how well each predicts the outcomes *together with what is known of
the prompt itself*, and a part is shared before each batch (fixed share). So features that say nothing, or mislead, lose
their weight within a few batches; and what a prompt's own outcomes say outweighs the prior as they come.

Source: empirical Bayes with covariates (Fay & Herriot 1979); mixtures of experts by predictive likelihood with a fixed
share (Herbster & Warmuth 1998).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.estimation.bayes import BayesFilterEstimator
from knapsack_rl.estimation.features import MOST_COLUMNS, Features
from knapsack_rl.estimation.tracker import Tracker
from knapsack_rl.ids import PromptId

SPREADS = (0.5, 1.0, 2.0)
"""Standard deviations, in logits, of the prompts of one value around their centre."""

SHARE = 0.02
"""Weight shared before each batch."""

_STRIDE = MOST_COLUMNS + 1


class _Level:
    """The centres of all values of all columns, if prompts spread around them by one standard deviation."""

    def __init__(self, spread: float, grid_points: int, iterations: int) -> None:
        self.spread = spread
        self.filter = BayesFilterEstimator(grid_points, iterations)
        self.tracker = Tracker(self.filter.evidence_size)
        self.at_refit = np.zeros(2, dtype=np.int64)  # batches and values

    def priors(self, values: IntArray) -> FloatArray:
        """Return the (V, grid_points) priors of the prompts of values."""
        found = self.filter.spread(self.filter.posterior(self.tracker.lookup(values.tolist())), self.spread)
        return found / found.sum(axis=1, keepdims=True)

    def learn(self, values: IntArray, visit: FloatArray, prompt_R: IntArray, success_R: NDArray[np.bool_]) -> None:
        """Move the centres.

        Args:
            values: (M, columns) values of the prompts of a batch.
            visit: (M, grid_points) likelihood of each prompt's outcomes.
            prompt_R: (R,) position of each rollout's prompt.
            success_R: (R,) whether it succeeded.
        """
        distinct, which = np.unique(values, return_inverse=True)
        which = which.reshape(values.shape)
        smooth = np.log(self.filter.spread(visit, self.spread))
        order = np.argsort(which, axis=None, kind="stable")
        starts = np.searchsorted(which.ravel()[order], np.arange(distinct.size))
        together = np.add.reduceat(smooth[order // values.shape[1]], starts, axis=0)
        together = np.exp(together - together.max(axis=1, keepdims=True))
        ids, tracker = distinct.tolist(), self.tracker
        tracker.record(
            ids,
            which[prompt_R].ravel(),
            np.repeat(success_R, values.shape[1]),
            evidence=self.filter.absorb_likelihood(tracker.lookup(ids), together),
        )
        batches, known = self.at_refit.tolist()
        if tracker.refit_due(batches, known):
            self.filter.refit(tracker.records())
            self.at_refit[:] = tracker.clock, len(tracker)


class SharedKnowledge:
    """Priors of prompts by their features.

    Args:
        grid_points: of the estimator of single prompts.
        iterations: likewise.

    Attributes:
        features: codes of the prompts.
        weights: (1 + columns x spreads,) probability of each prior; the first is that of the population.
    """

    def __init__(self, grid_points: int, iterations: int) -> None:
        self.features = Features()
        self._levels = [_Level(spread, grid_points, iterations) for spread in SPREADS]
        self.weights = np.ones(1)

    @property
    def _first(self) -> FloatArray:
        """Weights before anything is known: half for the population."""
        others = len(self.features.columns) * len(SPREADS)
        return np.array([0.5] + [0.5 / others] * others)

    def note(self, ids: Sequence[PromptId], features: Mapping[str, ArrayLike]) -> None:
        """Keep the features of prompts, see :meth:`knapsack_rl.estimation.features.Features.note`."""
        new = not self.features.columns
        self.features.note(ids, features)
        if new:
            self.weights = self._first

    def trust(self) -> dict[str, float]:
        """Return the weight of the priors of each column, by its name; the rest is that of the population."""
        by_column = self.weights[1:].reshape(-1, len(SPREADS)).sum(axis=1)
        return {column.name: float(w) for column, w in zip(self.features.columns, by_column, strict=True)}

    def prior(self, ids: Sequence[PromptId], population: FloatArray) -> FloatArray | None:
        """Return the (M, grid_points) prior of each prompt, None if no prompt has features.

        Args:
            ids: M prompts.
            population: (grid_points,) prior of a prompt without features.
        """
        codes = self.features.codes(ids)
        known = np.flatnonzero((codes >= 0).all(axis=1))
        if not known.size:
            return None
        found = np.tile(population, (len(ids), 1))
        found[known] = np.einsum("e,emg->mg", self.weights, self._priors(codes[known], population))
        return found

    def learn(
        self,
        ids: Sequence[PromptId],
        population: FloatArray,
        known: FloatArray,
        visit: FloatArray,
        prompt_R: IntArray,
        success_R: NDArray[np.bool_],
    ) -> None:
        """Weigh the priors by how well they predicted the outcomes of a batch, then learn from them.

        Args:
            ids: M prompts.
            population: (grid_points,) prior of a prompt without features.
            known: (M, grid_points) likelihood of what was observed of each prompt before.
            visit: (M, grid_points) likelihood of its outcomes now.
            prompt_R: (R,) position of each rollout's prompt.
            success_R: (R,) whether it succeeded.
        """
        codes = self.features.codes(ids)
        has = (codes >= 0).all(axis=1)
        if not has.any():
            return
        rows = np.flatnonzero(has)
        priors = self._priors(codes[rows], population)
        predicted = np.einsum("emg,mg->em", priors, known[rows] * visit[rows])
        predicted /= np.einsum("emg,mg->em", priors, known[rows])
        score = np.log(predicted).sum(axis=1)
        weights = ((1.0 - SHARE) * self.weights + SHARE * self._first) * np.exp(score - score.max())
        self.weights = weights / weights.sum()
        kept, place = has[prompt_R], np.cumsum(has) - 1
        for level in self._levels:
            level.learn(_values(codes[rows]), visit[rows], place[prompt_R[kept]], success_R[kept])

    def _priors(self, codes: IntArray, population: FloatArray) -> FloatArray:
        """Return the (priors, M, grid_points) prior of each prompt by the population, then by column and spread."""
        distinct, which = np.unique(_values(codes), return_inverse=True)
        which = which.reshape(codes.shape).T
        by_level = [level.priors(distinct)[which] for level in self._levels]
        of_columns = np.stack(by_level, axis=1).reshape(-1, codes.shape[0], population.size)
        everyone = np.broadcast_to(population, (1, codes.shape[0], population.size))
        return np.concatenate([everyone, of_columns])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all that was learned."""
        found = self.features.state_dict() | {"weights": self.weights.copy()}
        for level in self._levels:
            parts = {"tracker": level.tracker.state_dict(), "filter": level.filter.state_dict()}
            for part, arrays in parts.items():
                found |= {f"{level.spread}.{part}.{name}": array for name, array in arrays.items()}
            found[f"{level.spread}.at_refit"] = level.at_refit.copy()
        return found

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what was learned.

        Raises:
            ValueError: a part is missing or damaged.
        """
        self.features.load_state_dict(state)
        weights = np.asarray(state.get("weights", ()), dtype=np.float64)
        if weights.shape != self._first.shape or not (weights >= 0).all() or not np.isclose(weights.sum(), 1.0):
            raise ValueError(f"the saved weights of shared knowledge must be a distribution, got {weights!r}")
        self.weights = weights.copy()
        for level in self._levels:
            for part, target in (("tracker", level.tracker), ("filter", level.filter)):
                start = f"{level.spread}.{part}."
                target.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
            at_refit = np.asarray(state.get(f"{level.spread}.at_refit", ()))
            if at_refit.shape != (2,) or at_refit.dtype != np.int64 or (at_refit < 0).any():
                raise ValueError(f"at_refit of shared knowledge must be two counts, got {at_refit!r}")
            level.at_refit = at_refit.copy()


def _values(codes: IntArray) -> IntArray:
    """Return (M, columns) numbers that tell the values of all columns apart."""
    return codes * _STRIDE + np.arange(codes.shape[1])
