"""The task whose answers vary in length."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from knapsack_rl.tasks.arithmetic import EOS_TOKEN, PAD_TOKEN
from knapsack_rl.tasks.running_sums import MAX_COMPLETION_TOKENS, MAX_POSITIONS, make_running_sums
from knapsack_rl.training.data import load_task
from knapsack_rl.training.settings import TrainSettings


def test_answers_are_the_running_totals():
    sums = make_running_sums(train=300, held_out=60)
    for problem in [*sums.train, *sums.held_out]:
        digits = [int(part) for part in problem.prompt.removesuffix("=").split("+")]
        assert len(digits) == problem.digits
        assert problem.answer.split("=") == [str(sum(digits[: k + 1])) for k in range(1, len(digits))]
        assert len(problem.answer) + 1 <= MAX_COMPLETION_TOKENS
        assert len(problem.prompt) + len(problem.answer) + 1 <= MAX_POSITIONS
    lengths = [len(problem.answer) + 1 for problem in sums.train]
    assert (min(lengths), max(lengths)) == (2, MAX_COMPLETION_TOKENS)


def test_the_sets_are_disjoint_spread_over_sizes_and_repeat():
    sums = make_running_sums()
    train, held_out = ({problem.prompt for problem in part} for part in (sums.train, sums.held_out))
    assert (len(train), len(held_out)) == (2048, 512)
    assert not train & held_out
    drawn = sums.pretrain.sample(5000, random.Random(1))
    assert not {problem.prompt for problem in drawn} & (train | held_out)
    assert set(Counter(problem.digits for problem in drawn)) == set(range(2, 8))
    sizes = Counter(problem.digits for problem in sums.train)
    assert sizes[2] == 32  # of half of the 81 sums of two digits the share that is not held out
    assert {sizes[size] for size in range(4, 8)} <= {431, 432}
    assert make_running_sums().train == sums.train
    assert make_running_sums(seed=1).train != sums.train


def test_sizes_that_cannot_be_are_refused():
    for train, held_out in [(0, 5), (5, 0), (10**8, 1)]:
        with pytest.raises(ValueError, match="train and held_out must be at least 1 and at most"):
            make_running_sums(train=train, held_out=held_out)


def test_a_run_can_name_the_task():
    task = load_task(TrainSettings(dataset="running-sums", train_prompts=70, prompts_per_step=70, held_out_prompts=7))
    assert (len(task.train), len(task.held_out), task.max_completion_tokens) == (70, 7, MAX_COMPLETION_TOKENS)
    row = task.train[0]
    assert task.reward(completions=[row["answer"], row["answer"] + "1"], answer=[row["answer"]] * 2) == [1.0, 0.0]


def test_every_character_has_a_token():
    pytest.importorskip("torch")
    from knapsack_rl.tasks.pretraining import build_tokenizer

    tokenizer = build_tokenizer(MAX_POSITIONS)
    for problem in make_running_sums(train=50, held_out=5).train:
        text = problem.prompt + problem.answer + EOS_TOKEN
        ids = tokenizer(text).input_ids
        assert len(ids) == len(problem.prompt) + len(problem.answer) + 1
        assert tokenizer.convert_tokens_to_ids(PAD_TOKEN) not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == problem.prompt + problem.answer
