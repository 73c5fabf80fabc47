"""Rules of the field in the lab: their rollouts, rows and advantages against the rule played without a model."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import tiny  # noqa: E402
from experiments.accelerator.policy import Rollouts  # noqa: E402
from experiments.accelerator.train import train  # noqa: E402
from experiments.lab.rounds import joined  # noqa: E402
from experiments.lab.run import QUICK, LabTrainer  # noqa: E402
from experiments.pool import ARMS  # noqa: E402
from experiments.rules import RULES, Conformal  # noqa: E402
from experiments.trl_rounds import RoundsGRPOTrainer  # noqa: E402
from knapsack_rl.tasks import base_model_path  # noqa: E402
from test_rules import play  # noqa: E402

FOLLOWING = [name for name, arm in ARMS.items() if arm.rule in RULES]


def scripted(prompt, k, past=None):
    """Outcome k of a prompt after those of the past; a quarter of the prompts never succeeds, a quarter always."""
    k += past[prompt] if past else 0
    kind = zlib.crc32(str(prompt).encode()) % 4
    return int(kind == 3 or (kind > 0 and zlib.crc32(f"{prompt} {k}".encode()) % 3 == 0))


class Watched(LabTrainer):
    """Notes what is generated and what the update gets; outcomes are scripted."""

    def __init__(self, settings, outcome=scripted):
        super().__init__(settings, base_model_path(), "cpu")
        self.outcome, self.seen, self.generated, self.answers, self.updates = outcome, Counter(), [], [], []
        plain = self.policy.update

        def update(prompts, rollouts, advantages, iterations):
            self.updates.append((prompts, rollouts, advantages))
            return plain(prompts, rollouts, advantages, iterations)

        self.policy.update = update

    def _score(self, rows, sampled):
        ids, rewards = [row["prompt_id"] for row in rows], []
        for prompt in ids:
            rewards.append(float(self.outcome(prompt, self.seen[prompt])))
            self.seen[prompt] += 1
        self.generated.append(ids)
        self.answers += [row[:n] for row, n in zip(sampled.tokens.tolist(), sampled.lengths.tolist(), strict=True)]
        return rewards


@pytest.mark.parametrize("arm", FOLLOWING)
def test_a_step_generates_counts_and_trains_as_the_rule_says(arm):
    trainer = Watched(replace(QUICK, arm=arm, seed=5))
    mean = 4 * ARMS[arm].multiple
    ids = [row["prompt_id"] for row in trainer.data.train]
    rule, before = RULES[ARMS[arm].rule](ids, 8, mean, 5), Counter()
    for number, batch in zip(range(1, 4), trainer.batches(), strict=False):
        trainer.generated, trainer.answers, trainer.updates, already = [], [], [], trainer.rollouts
        tokens = trainer.tokens
        trainer.step(batch, number)

        # The same rule without a model, with outcomes that go on where the last step ended.
        rounds, prompts, group_R, success_R = play(
            rule, partial(scripted, past=Counter(before)), [row["prompt_id"] for row in batch]
        )
        before.update(prompts[group] for group in group_R)
        assert [Counter(asked) for asked in trainer.generated] == [Counter(wanted) for wanted in rounds]
        assert trainer.rollouts - already == sum(sum(wanted.values()) for wanted in rounds) == group_R.size
        assert trainer.tokens - tokens == sum(map(len, trainer.answers))

        kept = rule.keep(prompts, group_R, success_R)
        advantages = tiny.reference_advantages(group_R.tolist(), [success_R.tolist()])
        ((given, rollouts, found),) = trainer.updates
        of = {row["prompt_id"]: tokens for row, tokens in zip(trainer.data.train,
              trainer.tokens_of(trainer.data.train), strict=True)}  # fmt: skip
        assert given == [of[prompts[group_R[row]]] for row in kept]
        np.testing.assert_allclose(found.numpy(), np.array(advantages)[kept], atol=1e-6)
        answers = [row[:n] for row, n in zip(rollouts.tokens.tolist(), rollouts.lengths.tolist(), strict=True)]
        assert answers == [trainer.answers[row] for row in kept]
    assert len(trainer.session.allocator.tracker) == len(before)
    assert trainer.session.allocator.tracker.records().rollouts.sum() == trainer.rollouts  # the allocator watches
    assert all(trainer.seconds.values())


class Noted:
    """A rule that notes its requests and the outcomes, by prompt and in order."""

    def __init__(self, rule):
        self.rule, self.requests, self.outcomes = rule, [[]], []
        self.load_state_dict, self.state_dict, self.keep = rule.load_state_dict, rule.state_dict, rule.keep

    def start(self, prompts):
        self.drawn = getattr(self, "drawn", [])
        self.drawn.append(prompts)
        self.requests.append([])
        self.rule.start(prompts)

    def request(self):
        wanted = self.rule.request()
        self.requests[-1].append(dict(wanted))
        return wanted

    def observe(self, prompts, outcomes):
        self.outcomes += outcomes.success_R.tolist()
        self.rule.observe(prompts, outcomes)


@pytest.mark.parametrize("name", RULES)
def test_the_trl_trainer_and_the_lab_ask_for_the_same_rollouts_after_the_same_outcomes(name, tmp_path):
    """The prompts of both are matched by their place in the data; the lab gets the outcomes of the TRL trainer."""
    theirs = [f"p{place}" for place in range(24)]
    there = Noted(RULES[name](theirs, 4, 4, 7))
    tiny.trainer(RoundsGRPOTrainer, tmp_path, tiny.has_digit_five, extra={"rounds": there}, max_steps=3).train()

    outcomes = iter(there.outcomes)
    settings = replace(QUICK, arm=name, seed=7, prompts_per_step=4, train_prompts=24)
    trainer = Watched(settings, lambda *_: next(outcomes))
    here = trainer.rule = Noted(trainer.rule)
    rows = dict(zip(theirs, trainer.data.train, strict=True))
    for number, drawn in enumerate(there.drawn, start=1):
        trainer.step([rows[prompt] for prompt in drawn], number)
    assert len(there.drawn) == 3
    assert sum(map(len, there.requests)) > 6
    assert here.requests == [
        [{rows[prompt]["prompt_id"]: count for prompt, count in wanted.items()} for wanted in step]
        for step in there.requests
    ]
    assert next(outcomes, None) is None


def test_rollouts_of_rounds_are_joined_whatever_their_lengths():
    one = Rollouts(torch.tensor([[5, 1], [1, 9]]), torch.tensor([2, 1]))
    two = Rollouts(torch.tensor([[5, 6, 7]]), torch.tensor([3]))
    both = joined([one, two], 1)
    assert both.tokens.tolist() == [[5, 1, 1], [1, 9, 1], [5, 6, 7]]
    assert both.lengths.tolist() == [2, 1, 3]


def test_seconds_of_a_part_inside_of_another_count_once():
    trainer = LabTrainer(QUICK, base_model_path(), "cpu")
    clock = iter([0.0, 1.0, 4.0, 10.0])
    trainer._now = lambda: next(clock)
    with trainer.timed("allocation"), trainer.timed("generation"):
        pass
    assert trainer.seconds == {"allocation": 7.0, "generation": 3.0, "scoring": 0.0, "update": 0.0}


class Counting(LabTrainer):
    """Notes the rollouts after each step and before each evaluation."""

    runs: ClassVar[list] = []

    def __init__(self, *arguments):
        self.after, self.evaluated = [], []
        super().__init__(*arguments)
        Counting.runs.append(self)

    def step(self, batch, number):
        super().step(batch, number)
        self.after.append(self.rollouts)

    def log(self, step):
        self.evaluated.append(self.rollouts)
        return super().log(step)


@pytest.mark.parametrize("arm", ["uniform", "uniform-2n", "oversample", "c-grpo"])
def test_runs_at_equal_rollouts_end_and_are_evaluated_at_those_of_uniform(arm):
    settings = replace(QUICK, arm=arm, steps=6, eval_every=2, equal_rollouts=True)
    row = train(settings, base_model_path(), "cpu", kind=Counting)
    run = Counting.runs.pop()
    end, every = 6 * 8 * 4, 2 * 8 * 4  # rollouts of uniform N
    assert row["finished"]
    assert row["steps"] == len(run.after)
    assert run.after[-1] >= end > run.after[-2]
    crossed = [next(n for n in run.after if n >= mark) for mark in range(every, end + 1, every)]
    assert run.evaluated == row["evaluations"]["rollouts"] == [0, *dict.fromkeys(crossed)]
    assert row["rollouts"] == run.after[-1]
    if arm.startswith("uniform"):
        assert row["steps"] == {"uniform": 6, "uniform-2n": 3}[arm]


def test_a_run_at_equal_rollouts_that_is_out_of_time_is_not_finished():
    row = train(replace(QUICK, equal_rollouts=True), base_model_path(), "cpu", 0.0, LabTrainer)
    assert (row["steps"], row["finished"]) == (1, False)


def test_prompts_that_calibrate_are_never_trained_on():
    trainer = Watched(replace(QUICK, arm="c-grpo"))
    assert isinstance(trainer.rule, Conformal)
    own = {tuple(tokens) for tokens in trainer.tokens_of([row for row in trainer.data.train
           if row["prompt_id"] in trainer.rule.calibration])}  # fmt: skip
    for number, batch in zip(range(1, 30), trainer.batches(), strict=False):
        trainer.step(batch, number)
    trained = {tuple(tokens) for prompts, *_ in trainer.updates for tokens in prompts}
    assert len(own) == 8
    assert len(trained) == 96 - 8
    assert not own & trained
