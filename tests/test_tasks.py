"""Arithmetic task: splits, verifier, and the base checkpoint that ships with the package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from knapsack_rl.tasks import (
    EOS_TOKEN,
    MAX_COMPLETION_TOKENS,
    PAD_TOKEN,
    PretrainSampler,
    Problem,
    accuracy_reward,
    base_model_path,
    is_correct,
    make_splits,
    to_rows,
)

SPLITS = make_splits()
TOKENIZER = AutoTokenizer.from_pretrained(base_model_path())
CHARACTERS = "0123456789+="
SAMPLES = 8


def operands(problem: Problem) -> tuple[int, str, int]:
    match = re.fullmatch(r"([0-9]+)([-+*])([0-9]+)=", problem.prompt)
    assert match is not None, problem
    return int(match[1]), match[2], int(match[3])


def identity(problem: Problem) -> tuple[str, int, int]:
    a, sign, b = operands(problem)
    return sign, max(a, b), min(a, b)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_importing_the_tasks_needs_no_heavy_package() -> None:
    code = (
        "import sys, knapsack_rl.tasks;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- splits ---------------------------------------------------------------------------------------------


def test_splits_have_the_sizes_asked_for_and_share_no_problem() -> None:
    for sizes in [(2048, 512), (1, 1), (7, 30), (5000, 100)]:
        splits = make_splits(3, *sizes)
        assert (len(splits.train), len(splits.held_out)) == sizes
        pretrain = splits.pretrain.sample(5000, random.Random(1))
        reserved = [identity(p) for p in (*splits.train, *splits.held_out)]
        assert len(set(reserved)) == sum(sizes), sizes
        assert not set(reserved) & {identity(p) for p in pretrain}, sizes
        assert len({p.prompt_id for p in (*splits.train, *splits.held_out)}) == sum(sizes), sizes


def test_a_reserved_sum_is_not_pretrained_with_exchanged_operands() -> None:
    tiny = [p for p in SPLITS.train if p.digits == 1]
    seen = {identity(p) for p in SPLITS.pretrain.sample(20_000, random.Random(0))}
    small_sums = {key for key in seen if key[1] < 10}
    held = [p for p in SPLITS.held_out if p.digits == 1]
    # 27 of the 55 are reserved, and every other one turns up.
    assert len(small_sums) == 28
    assert len(tiny) + len(held) == 27


def test_a_seed_decides_the_splits() -> None:
    again = make_splits(seed=0)
    assert (again.train, again.held_out) == (SPLITS.train, SPLITS.held_out)
    other = make_splits(seed=1)
    assert {identity(p) for p in other.train} != {identity(p) for p in SPLITS.train}
    draws = [SPLITS.pretrain.sample(50, random.Random(5)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_answers_agree_with_integer_arithmetic() -> None:
    for problem in (*SPLITS.train, *SPLITS.held_out, *SPLITS.pretrain.sample(3000, random.Random(2))):
        a, sign, b = operands(problem)
        assert sign == "+"
        result = a + b
        assert problem.answer == "".join(reversed(str(result)))
        assert problem.prompt_id + "=" == problem.prompt
        assert problem.digits == max(len(str(a)), len(str(b))) <= 4
        assert len(problem.answer) + 1 <= MAX_COMPLETION_TOKENS


def test_train_and_held_out_have_the_same_shares() -> None:
    train, held_out = (Counter(p.digits for p in split) for split in (SPLITS.train, SPLITS.held_out))
    assert train.keys() == held_out.keys()
    for group, count in train.items():
        # Each group is at most four strata, each rounded by less than one.
        assert abs(count / 4 - held_out[group]) <= 4


def test_impossible_sizes_are_refused_before_drawing() -> None:
    for sizes in [(0, 5), (5, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="must be at least 1 and at most"):
            make_splits(0, *sizes)
    with pytest.raises(ValueError, match="half of all problems"):
        make_splits(train=10**9)


def test_a_sampler_without_unreserved_problems_is_refused() -> None:
    every_small_sum = [Problem(f"{a}+{b}=", str(a + b)[::-1], f"{a}+{b}", 1) for a in range(10) for b in range(10)]
    with pytest.raises(ValueError, match="all 55 problems with 1 and 1 digits"):
        PretrainSampler(every_small_sum)
    with pytest.raises(ValueError, match="got -1"):
        SPLITS.pretrain.sample(-1, random.Random(0))


def test_rows_carry_every_field() -> None:
    problem = SPLITS.train[0]
    assert to_rows([problem]) == [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "prompt_id": problem.prompt_id,
            "digits": problem.digits,
        }
    ]


# --- verifier -------------------------------------------------------------------------------------------


def test_nothing_but_the_answer_is_right() -> None:
    for text in ("0964", " 0964\n", "\t0964 \r\n"):
        assert is_correct(text, "0964", "exact"), text
    for text in [
        *("", " ", EOS_TOKEN, "4690", "964", "09640", "00964", "09 64", "0\n964", EOS_TOKEN + "0964"),
        *("0964" + PAD_TOKEN, "0964" + EOS_TOKEN + "1", "+0964", "0_964", "0964.0", "0964\x00", "\u00a00964", "٠٩٦٤"),
        "0964".translate({ord("0") + d: 0xFF10 + d for d in range(10)}),
        *("²", "{answer}", "%s", "{0.__class__}", "__import__('os').system('true')", "0964" * 10),
        "0964" + " " * 10**6,
        "9" * 10**7,
    ]:
        assert not is_correct(text, "0964", "exact"), text[:80]


@given(st.text(max_size=80), st.integers(0, 99999))
def test_the_exact_verifier_compares_strings(text: str, value: int) -> None:
    answer = str(value)[::-1]
    typed = {answer, answer + ".0"} if answer == str(int(answer)) else {answer}  # "12.0" is 12, "0964.0" is not "0964"
    assert is_correct(text, answer, "exact") == (re.sub(r"\.0+$", ".0", text.strip(" \t\r\n\f\v")) in typed)
    assert is_correct(answer, answer, "exact")


# --- tokenizer and checkpoint ---------------------------------------------------------------------------


@given(st.text(alphabet=CHARACTERS, max_size=30))
def test_tokenizer_round_trip(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert not set(ids) & {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id}
    padded = [*([TOKENIZER.pad_token_id] * 2), *ids, TOKENIZER.eos_token_id]
    assert TOKENIZER.batch_decode([padded], skip_special_tokens=True) == [text]


def test_tokenizer_pads_on_the_left_with_a_separate_token() -> None:
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token) == (PAD_TOKEN, EOS_TOKEN)
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    batch = TOKENIZER(["1+2=", "10+20="], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert batch["input_ids"][0][:2] == [TOKENIZER.pad_token_id] * 2
    assert TOKENIZER("1" + EOS_TOKEN)["input_ids"][-1] == TOKENIZER.eos_token_id


def test_tokenizer_refuses_characters_that_the_model_never_saw() -> None:
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER("1/2=")


def test_checkpoint_has_the_promised_size() -> None:
    folder = base_model_path()
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 * 2**20
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 200_000 <= model.num_parameters() <= 2_000_000
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(TOKENIZER)
    assert model.generation_config.eos_token_id == TOKENIZER.eos_token_id
    assert model.generation_config.pad_token_id == TOKENIZER.pad_token_id


def test_checkpoint_was_pretrained_on_these_splits() -> None:
    training = json.loads((base_model_path() / "training.json").read_text(encoding="utf-8"))
    for name, split in (("train_prompts", SPLITS.train), ("held_out_prompts", SPLITS.held_out)):
        text = "\n".join(problem.prompt for problem in split)
        # A change here means that the checkpoint may have seen the held-out problems: pre-train it again.
        assert training[name]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.usefixtures("one_thread")
def test_spectrum_of_the_checkpoint() -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model_path()).eval()
    generation = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=MAX_COMPLETION_TOKENS,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    rewards: list[float] = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(11)
        for start in range(0, len(SPLITS.train), 128):
            problems = SPLITS.train[start : start + 128]
            inputs = TOKENIZER([p.prompt for p in problems], return_tensors="pt", padding=True)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=generation,
            )
            texts = TOKENIZER.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            rewards += accuracy_reward(texts, [p.answer for p in problems for _ in range(SAMPLES)])
    successes = torch.tensor(rewards).view(len(SPLITS.train), SAMPLES).sum(dim=1)
    unsolved = (successes == 0).float().mean().item()
    solved = (successes == SAMPLES).float().mean().item()
    mean = successes.mean().item() / SAMPLES
    # The standard errors over samples are below 0.01 (shares) and 0.004 (mean): the bounds leave room for
    # other kernels and seeds.
    assert unsolved >= 0.15, (unsolved, solved, mean)
    assert solved >= 0.10, (unsolved, solved, mean)
    assert 0.25 <= mean <= 0.60, (unsolved, solved, mean)
    recorded = json.loads((base_model_path() / "training.json").read_text(encoding="utf-8"))
    assert mean == pytest.approx(recorded["train_prompts"]["spectrum_expected"]["mean"], abs=0.02)


# --- pre-training script --------------------------------------------------------------------------------


@pytest.fixture
def pretrain_base(one_thread: None) -> Iterator[ModuleType]:
    path = Path(__file__).parents[1] / "scripts" / "pretrain_base.py"
    spec = importlib.util.spec_from_file_location("pretrain_base", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["pretrain_base"] = module
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        spec.loader.exec_module(module)
        yield module
    torch.use_deterministic_algorithms(deterministic)
    del sys.modules["pretrain_base"]


QUICK = ["--width", "8", "--layers", "1", "--max-steps", "3", "--eval-every", "3"]
ANY_SPECTRUM = ["--unsolved", "0", "1", "--solved", "0", "--mean", "0", "1"]


def test_pretraining_repeats_exactly(pretrain_base: ModuleType, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert pretrain_base.main([*QUICK, *ANY_SPECTRUM, "--out", str(tmp_path / name)]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert json.loads((tmp_path / "first" / "training.json").read_text(encoding="utf-8"))["steps"] == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "first")("1+2=")["input_ids"] == [3, 12, 4, 13]


def test_pretraining_writes_nothing_without_the_target(
    pretrain_base: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_base.main([*QUICK, "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
    assert "nothing was written" in capsys.readouterr().err


def test_pretraining_refuses_wrong_settings(pretrain_base: ModuleType) -> None:
    for wrong in (["--width", "12"], ["--lr", "0"], ["--ema", "1"], ["--batch", "0"]):
        with pytest.raises(SystemExit) as refused:
            pretrain_base.parse_args(wrong)
        assert refused.value.code == 2, wrong
