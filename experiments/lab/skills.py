"""The bed of many graded skills: prompts whose success rates are known before training, and spread over all sizes.

A prompt ``"07+482="`` asks skill 7. A skill is a code of four digits, the right answer whatever the question 482 is.
The base model is pre-trained to write each digit of the code with a chance that depends on the skill, and a little on
the question, so that its success rates are those of :meth:`Skills.target_rates`, and prompts of one skill share their
fate without being equal. Most other answers hold digits of a rival code, so that a model that merely becomes surer of
itself loses the hard skills for good: they must be sampled right and reinforced one by one. Characters are those of
:mod:`knapsack_rl.tasks.arithmetic`.

Rows have three columns to pool prompts by: ``informative`` names the skill, ``useless`` is drawn at random, and
``misleading`` names pairs of skills, the hardest with the easiest, so that a pool of them says the same of both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.tasks.data import Row, TaskData
from knapsack_rl.tasks.generated import Problem, below, draw_distinct, draw_splits
from knapsack_rl.tasks.pretraining import EOS_ID, VOCABULARY, build_model, build_tokenizer
from knapsack_rl.tasks.verifier import accuracy_reward

QUESTION, ANSWER = 3, 4
"""Digits of a question and of an answer."""

QUESTIONS = 10**QUESTION

SPREAD = 1.0
"""Most that a question moves the logit of its success rate, up or down."""

RIVAL = 0.9
"""Share of wrong digits that are those of the rival code."""

PROMPT_TOKENS = 2 + 1 + QUESTION + 1
MAX_COMPLETION_TOKENS = ANSWER + 1

_ZERO = VOCABULARY["0"]


@dataclass(frozen=True)
class Skills:
    """A set of skills; two with different seeds have nothing in common.

    Attributes:
        seed: of codes, rates, prompts and the base model.
        count: number of skills, at most 100.
        lowest: success rate of the base model on the hardest skill; 1e-4 is that of pure chance.
        highest: on the easiest skill.
    """

    seed: int = 20250929
    count: int = 96
    lowest: float = 1e-4
    highest: float = 0.9

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng(self.seed + number)

    def logits(self) -> FloatArray:
        """(count,) logit of the base model's success rate by skill, evenly spaced and in no order."""
        low, high = (np.log(rate / (1 - rate)) for rate in (self.lowest, self.highest))
        return self._random(0).permutation(np.linspace(low, high, self.count))

    def codes(self) -> IntArray:
        """(count, ANSWER) digits of the right answer of each skill."""
        return self._random(1).integers(0, 10, (self.count, ANSWER))

    def rivals(self) -> IntArray:
        """(count, ANSWER) digits of the most frequent wrong answer of each skill, none of them right."""
        return (self.codes() + self._random(4).integers(1, 10, (self.count, ANSWER))) % 10

    def target_rates(self, skills: IntArray, questions: IntArray) -> FloatArray:
        """(P,) success rates of the base model on prompts; the first digit of a question makes it easier or harder.

        Args:
            skills: (P,) below count.
            questions: (P,) below QUESTIONS.
        """
        offsets = self._random(2).permutation(np.linspace(-SPREAD, SPREAD, 10))
        return 1 / (1 + np.exp(-(self.logits()[skills] + offsets[questions // (QUESTIONS // 10)])))

    def problem(self, skill: int, question: int) -> Problem:
        """The problem that asks a skill a question."""
        name = f"{skill:02d}+{question:0{QUESTION}d}"
        answer = "".join(map(str, self.codes()[skill]))
        return Problem(prompt=f"{name}=", answer=answer, prompt_id=name, digits=ANSWER)

    def task(self, train: int, held_out: int) -> TaskData:
        """Return prompts of all skills in equal parts; those held out are drawn with the others and then set aside.

        Args:
            train: prompts to train on.
            held_out: prompts never trained on.
        """

        def draw(skill: int, count: int, rng: random.Random) -> list[Problem]:
            return [self.problem(skill, question) for question in draw_distinct(count, rng, partial(below, QUESTIONS))]

        splits = draw_splits(0, train, held_out, [1.0] * self.count, [QUESTIONS] * self.count, draw)
        rng = random.Random(self.seed)  # noqa: S311 - reproducible data, not a secret
        rows = [[self._row(problem, rng) for problem in part] for part in splits]
        return TaskData(
            train=rows[0], held_out=rows[1], reward=accuracy_reward, max_completion_tokens=MAX_COMPLETION_TOKENS
        )

    def _row(self, problem: Problem, rng: random.Random) -> Row:
        skill, _ = parts_of(problem.prompt)
        rank = int((self.logits() < self.logits()[skill]).sum())
        return {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "prompt_id": problem.prompt_id,
            "informative": f"skill {skill}",
            "useless": f"label {below(self.count, rng)}",
            "misleading": f"pair {min(rank, self.count - 1 - rank)}",
        }

    def batch(self, skills: IntArray, questions: IntArray, rng: np.random.Generator) -> tuple[Any, Any]:
        """Prompts with answers drawn from the targets, and the (B, tokens, vocabulary) targets of the answers' tokens.

        Args:
            skills: (B,) below count.
            questions: (B,) below QUESTIONS.
            rng: draws the answers.
        """
        chance = self.target_rates(skills, questions)[:, None] ** (1 / ANSWER)
        rows, places = np.arange(skills.size)[:, None], np.arange(ANSWER)
        digits = np.repeat((1 - chance)[:, :, None] * (1 - RIVAL) / 8, ANSWER, axis=1).repeat(10, axis=2)
        digits[rows, places, self.rivals()[skills]] = (1 - chance) * RIVAL
        digits[rows, places, self.codes()[skills]] = chance
        targets = np.zeros((skills.size, MAX_COMPLETION_TOKENS, len(VOCABULARY)), dtype=np.float32)
        targets[:, :ANSWER, _ZERO : _ZERO + 10] = digits
        targets[:, ANSWER, EOS_ID] = 1.0
        # The first digit at which the cumulative chance exceeds a uniform number is a sample.
        written = (digits.cumsum(-1) > rng.random((skills.size, ANSWER, 1))).argmax(-1)
        asked = questions[:, None] // 10 ** np.arange(QUESTION - 1, -1, -1) % 10
        plus, equals = (np.full((skills.size, 1), VOCABULARY[sign]) for sign in "+=")
        name = np.column_stack([skills // 10, skills % 10]) + _ZERO
        tokens = np.concatenate([name, plus, asked + _ZERO, equals, written + _ZERO], axis=1)
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def make_base_model(self, folder: Path, quick: bool) -> None:
        """Pre-train the base model: every digit of an answer has the chance of its skill.

        The targets are probabilities rather than drawn answers, so that rare successes are learned as well as others.

        Args:
            folder: of the model and its tokenizer; the tokenizer is written last.
            quick: make a tiny model that is good for nothing but tests.
        """
        schedule = Schedule(width=16, layers=1, steps=20, batch=32) if quick else Schedule()
        task = self.task(2048, 512)
        torch.manual_seed(self.seed)
        model = build_model(
            schedule.width, schedule.layers, PROMPT_TOKENS + MAX_COMPLETION_TOKENS, MAX_COMPLETION_TOKENS
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.lr, total_steps=schedule.steps)
        rng = self._random(3)
        reserved = [parts_of(row["prompt"]) for row in (*task.train, *task.held_out)]
        taken = [skill * QUESTIONS + question for skill, question in reserved]
        free = np.setdiff1d(np.arange(self.count * QUESTIONS), taken)
        for _ in range(schedule.steps):
            tokens, targets = self.batch(*np.divmod(rng.choice(free, schedule.batch), QUESTIONS), rng)
            logits = model(input_ids=tokens, use_cache=False).logits[:, -MAX_COMPLETION_TOKENS:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
        model.save_pretrained(folder)
        build_tokenizer(PROMPT_TOKENS + MAX_COMPLETION_TOKENS).save_pretrained(folder)


def parts_of(prompt: str) -> tuple[int, int]:
    """Skill and question of a prompt."""
    skill, question = prompt.removesuffix("=").split("+")
    return int(skill), int(question)


@dataclass(frozen=True)
class Schedule:
    """Settings of the pre-training.

    Attributes:
        width: hidden size of the model.
        layers: of the model.
        steps: of AdamW, the learning rate falling to zero along a cosine.
        batch: prompts of a step.
        lr: largest learning rate.
    """

    width: int = 64
    layers: int = 2
    steps: int = 1000
    batch: int = 256
    lr: float = 4e-3


REPORTED = Skills()
DEVELOPMENT = Skills(seed=77, count=90, lowest=1e-4, highest=0.1)
"""For choosing settings; nothing that is chosen on it is reported from it."""
