"""Gradients of single prompts against loops of autograd, and what is made of the measurements."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import gradient_fit, values
from experiments.contract import Options, Row
from knapsack_rl.allocation.value import nonzero_gradient_probability

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from experiments import catalogue, gradient_value  # noqa: E402
from experiments.gradient_measure import (  # noqa: E402
    ArithmeticModel,
    Directions,
    PromptScores,
    Rollouts,
    advantages_of,
    policy_gradient,
)
from knapsack_rl.tasks import base_model_path  # noqa: E402

torch.set_num_threads(1)
MEDIUM = {"prompt": "47+385=", "answer": "234"}


@pytest.fixture(scope="module")
def model() -> ArithmeticModel:
    return ArithmeticModel(base_model_path())


def step_by_step(model: ArithmeticModel, prompt, completion):
    """Log-probability of a completion, one token after the other, with nothing padded."""
    total = torch.zeros(())
    for k, token in enumerate(completion):
        logits = model.model(input_ids=torch.tensor([[*prompt, *completion[:k]]])).logits[0, -1]
        total = total + torch.log_softmax(logits, dim=-1)[token]
    return total


def gradient_by_backward(model: ArithmeticModel, objective) -> torch.Tensor:
    model.model.zero_grad()
    objective.backward()
    found = torch.cat([p.grad.reshape(-1) for p in model.model.parameters()])
    model.model.zero_grad(set_to_none=True)
    return found


def test_log_probabilities_are_those_of_one_token_after_the_other(model) -> None:
    rows = [MEDIUM, {"prompt": "1+2=", "answer": "3"}, {"prompt": "9999+9999=", "answer": "89991"}]
    pairs = model.pairs(rows)
    assert [len(completion) for _, completion in pairs] == [4, 2, 6]
    expected = [float(step_by_step(model, *pair).detach()) for pair in pairs]
    assert model.log_probabilities(pairs).tolist() == pytest.approx(expected, abs=1e-5)
    assert model.success_rates(pairs) == pytest.approx(np.exp(expected), rel=1e-4)


def test_probabilities_of_all_short_completions_sum_to_one(model) -> None:
    """Every completion of two tokens, and the one that ends at once: a partition of what the model may write."""
    (prompt, _), end = model.pairs([MEDIUM])[0], model.tokenizer.eos_token_id
    size = model.model.config.vocab_size
    others = [token for token in range(size) if token != end]
    every = [(end,), *itertools.product(others, range(size))]
    total = model.success_rates([(prompt, completion) for completion in every]).sum()
    assert total == pytest.approx(1.0, abs=1e-5)


def test_the_exact_success_rate_is_the_frequency_of_success(model) -> None:
    torch.manual_seed(0)
    rollouts = model.sample([MEDIUM, {"prompt": "12+7=", "answer": "91"}], 600)
    for pair, group in zip(model.pairs([MEDIUM, {"prompt": "12+7=", "answer": "91"}]), rollouts, strict=True):
        p = float(model.success_rates([pair])[0])
        assert group.prompt == pair[0]
        assert abs(group.rewards.mean() - p) < 4 * math.sqrt(p * (1 - p) / 600) + 1e-3


def groups_of(model: ArithmeticModel) -> list[Rollouts]:
    """Two prompts with rollouts written by hand, and one whose rewards are equal."""
    (first, right), (second, other) = model.pairs([MEDIUM, {"prompt": "12+7=", "answer": "91"}])
    wrong = (*right[:-2], 3, right[-1])
    return [
        Rollouts(first, [right, wrong, wrong, right, wrong], np.array([1.0, 0.0, 0.0, 1.0, 0.0])),
        Rollouts(second, [other, wrong, (2, 3, 4, 5, 6, 7)], np.array([1.0, 0.0, 0.0])),
        Rollouts(second, [other, other], np.array([1.0, 1.0])),
    ]


def test_the_policy_gradient_is_that_of_the_summed_loss(model) -> None:
    groups = groups_of(model)
    objective = torch.zeros(())
    rollouts = sum(len(group.completions) for group in groups)
    for group in groups:
        deviation = group.rewards - group.rewards.mean()
        advantages = deviation / (group.rewards.std(ddof=1) + 1e-4) if deviation.any() else deviation
        for completion, advantage in zip(group.completions, advantages, strict=True):
            objective = objective + float(advantage) / rollouts * step_by_step(model, group.prompt, completion)
    expected = gradient_by_backward(model, objective)
    found = policy_gradient(model, groups)
    assert found is not None
    assert float((found - expected).norm()) < 1e-4 * float(expected.norm())
    assert policy_gradient(model, groups[2:]) is None


def test_scores_are_gradients_of_single_completions(model) -> None:
    pairs = [(group.prompt, completion) for group in groups_of(model) for completion in group.completions]
    found = model.score_gradients(pairs)
    for row, pair in zip(found, pairs, strict=True):
        expected = gradient_by_backward(model, step_by_step(model, *pair))
        assert float((row - expected).norm()) < 1e-4 * float(expected.norm())


def test_advantages_by_number_of_successes() -> None:
    for_success, for_failure = advantages_of(4)
    assert for_success[[0, 4]].tolist() == [0, 0] == for_failure[[0, 4]].tolist()
    deviation = math.sqrt((0.75**2 + 3 * 0.25**2) / 3) + 1e-4
    assert for_success[1] == pytest.approx(0.75 / deviation)
    assert for_failure[1] == pytest.approx(-0.25 / deviation)


@pytest.fixture(scope="module")
def scores(model) -> tuple[PromptScores, Rollouts]:
    torch.manual_seed(1)
    rollouts = model.sample([MEDIUM], 64)[0]
    return PromptScores(model, model.pairs([MEDIUM])[0], rollouts), rollouts


def test_groups_are_those_of_their_rollouts(model, scores) -> None:
    """Norm, cosine and slopes of a group, from the gradient of the loss of rollouts with the same composition."""
    prompt, right = model.pairs([MEDIUM])[0]
    found, rollouts = scores
    wrong = list(dict.fromkeys(c for c, r in zip(rollouts.completions, rollouts.rewards, strict=True) if not r))
    generator = torch.Generator().manual_seed(0)
    size = model.start.numel()
    along = Directions(torch.randn(size, generator=generator), torch.randn(size, generator=generator))
    drawn = found.groups(8, 6, along, np.random.default_rng(0))
    for k in np.flatnonzero(drawn.norm > 0):
        negative = drawn.weights[k, 1:]
        # One failure's share is the smallest weight or a divisor of it: all are multiples of the same advantage.
        successes = next(s for s in range(1, 8) if np.isclose(drawn.weights[k, 0], advantages_of(8)[0][s] * s / 8))
        failures = np.rint(negative * 8 / advantages_of(8)[1][successes]).astype(int)
        assert successes + failures.sum() == 8
        completions = [right] * successes + [c for c, times in zip(wrong, failures, strict=True) for _ in range(times)]
        group = Rollouts(prompt, completions, np.array([1.0] * successes + [0.0] * int(failures.sum())))
        expected = policy_gradient(model, [group])
        assert expected is not None
        assert drawn.norm[k] == pytest.approx(float(expected.norm()), rel=1e-4)
        cosine = float(torch.cosine_similarity(expected, along.batch, dim=0))
        assert drawn.cosine[k] == pytest.approx(cosine, abs=1e-4)
        assert drawn.population[k] == pytest.approx(float(expected @ along.population), rel=1e-3, abs=1e-3)
        assert float((found.gradient(drawn.weights[k]) - expected).norm()) < 1e-3 * float(expected.norm())
        step = 1e-3 * expected
        before = model.success_rates([(prompt, right)])[0]
        model.move(step)
        gain = (model.success_rates([(prompt, right)])[0] - before) / 1e-3
        model.move(None)
        assert drawn.own[k] == pytest.approx(gain, rel=0.05)


def test_the_mean_slope_is_that_of_the_expected_gradient(model, scores) -> None:
    """E[gradient] = E[k(N-k)/N^2 / (deviation + eps)] / (p(1-p)) * gradient of p, because scores have mean zero."""
    found = PromptScores(model, model.pairs([MEDIUM])[0], model.sample([MEDIUM], 1500)[0])
    p, size = found.rate, 8
    k = np.arange(1, size)
    deviation = np.sqrt(k * (size - k) / (size * (size - 1))) + 1e-4
    factor = float((stats.binom.pmf(k, size, p) * k * (size - k) / size**2 / deviation).sum())
    slope = p**2 * float(found.scores[0] @ found.scores[0])
    along = Directions(found.scores[0], found.scores[0])
    drawn = found.groups(size, 4000, along, np.random.default_rng(0))
    assert drawn.own.mean() == pytest.approx(factor / (p * (1 - p)) * slope, rel=0.1)


def test_a_prompt_without_failures_is_refused(model) -> None:
    prompt, right = model.pairs([MEDIUM])[0]
    with pytest.raises(ValueError, match="no rollout failed"):
        PromptScores(model, (prompt, right), Rollouts(prompt, [right], np.ones(1)))


def test_prompts_are_drawn_evenly_from_the_strata() -> None:
    rates = np.concatenate([np.zeros(50), np.full(100, 0.05), np.full(3, 0.4), np.full(100, 0.8), np.ones(50)])
    chosen = gradient_value.stratified(rates, 15, np.random.default_rng(0))
    values, counts = np.unique(rates[chosen], return_counts=True)
    assert values.tolist() == [0.05, 0.4, 0.8]
    assert counts.tolist() == [6, 3, 6]
    assert len(set(chosen.tolist())) == 15


def test_correlations_are_those_of_scipy() -> None:
    """In one stage Spearman's and Pearson's coefficients are scipy's; over stages their mean."""
    rng = np.random.default_rng(0)
    rows = made_up_rows(1.0, 2.0, noise=1.0)
    measured = gradient_fit.Measured.of(rows)
    x, y = rng.integers(0, 5, measured.by_target["own"].shape).astype(float), measured.by_target["own"]
    for by_rank, scipys in ((True, stats.spearmanr), (False, stats.pearsonr)):
        expected = np.mean([scipys(x[mine].ravel(), y[mine].ravel()).statistic for mine in measured.stages])
        found = gradient_fit.correlation(measured, x, y, by_rank=by_rank)
        assert found.mean == pytest.approx(expected)
        assert found.low < found.mean < found.high


def test_the_explained_share_is_that_of_least_squares() -> None:
    measured = gradient_fit.Measured.of(made_up_rows(1.0, 2.0, noise=0.5))
    predicted = np.random.default_rng(0).random(measured.by_target["own"].shape)
    shares = []
    for mine in measured.stages:
        x, y = predicted[mine].ravel(), measured.by_target["own"][mine].ravel()
        rest = np.linalg.lstsq(x[:, None], y, rcond=None)[1][0]
        shares.append(1 - rest / (y @ y))
    assert gradient_fit.explained(measured, predicted, "own") == pytest.approx(np.mean(shares))


def made_up_rows(a: float, b: float, noise: float = 0.0) -> list[Row]:
    """Rows as if gains were (1 - p^N - (1-p)^N) p^a (1-p)^b, on another scale in every stage."""
    rng = np.random.default_rng(0)
    counts = np.array(gradient_fit.GROUP_SIZES)
    rows: list[Row] = []
    for seed, step in itertools.product(range(2), (0, 100)):
        rows.append({"part": "stage", "seed": seed, "step": step, "mean_rate": 0.3})
        for p in rng.random(40):
            gains = (1 + step) * nonzero_gradient_probability(counts, p) * p**a * (1 - p) ** b
            gains = gains * np.exp(noise * rng.normal(size=counts.size))
            row = {"part": "prompt", "seed": seed, "step": step, "p": float(p)}
            row |= {name: gains.tolist() for name in ("norm", "cosine", "own", "population")}
            rows.append(row | {"step_taken": [gains[2] * 1.01, gains[2], gains[2], gains[2]]})
    return rows


def test_the_fit_finds_planted_exponents() -> None:
    for a, b in ((1.0, 2.0), (1.5, 0.5), (0.0, 3.2)):
        found = gradient_fit.fit(gradient_fit.Measured.of(made_up_rows(a, b)))
        assert found["success_exponent"] == pytest.approx(a, abs=0.02)
        assert found["failure_exponent"] == pytest.approx(b, abs=0.02)
        assert found["explained"]["fitted"] > 0.999
        assert found["prompts"] == 80


def test_verdicts_follow_the_rows() -> None:
    right = gradient_value.findings(made_up_rows(1.0, 2.0))
    assert [finding.verdict for finding in right] == ["holds"] * 6
    wrong = gradient_value.findings(made_up_rows(3.0, 0.0))
    assert wrong[-2].verdict == wrong[-1].verdict == "does not hold"
    assert "p^3.00 (1 − p)^0.00" in wrong[-1].ours


def test_the_quick_version(tmp_path: Path) -> None:
    for package in ("trl", "datasets", "matplotlib"):
        pytest.importorskip(package)
    options = Options(seeds=1, quick=True, workers=1, runs=tmp_path)
    reported: list[str] = []
    rows = gradient_value.measure(options, reported.append)
    assert len(reported) == gradient_value.pieces(options)
    assert json.loads(json.dumps(rows)) == rows
    prompts = [row for row in rows if row["part"] == "prompt"]
    assert {row["step"] for row in prompts} == {0, 1}
    assert all(0 < row["p"] < 1 and len(row["own"]) == len(gradient_fit.GROUP_SIZES) for row in prompts)
    assert gradient_value.measure(options, reported.append) == rows  # from what the folder holds
    assert json.loads((tmp_path / "gradient_value" / "fitted_value.json").read_text())["target"] == gradient_fit.TARGET
    assert len(gradient_value.findings(rows)) == 6
    assert gradient_value.figures(rows)("prompts") == str(len(prompts))
    assert set(gradient_value.tables(rows)) == {"Spearman", "sizes"}
    catalogue.draw("gradient-value", rows, tmp_path)


def test_the_shipped_value_is_the_fit_to_the_shipped_rows() -> None:
    lines = (Path(__file__).parent.parent / "docs" / "evidence" / "gradient-value.jsonl").read_text().splitlines()
    shipped = json.loads(values.FITTED_VALUE.read_text(encoding="utf-8"))
    measured = gradient_fit.Measured.of([json.loads(line) for line in lines])
    assert gradient_fit.fit(measured) == shipped
