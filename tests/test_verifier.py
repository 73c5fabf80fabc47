"""The verifier on answers as people write them, and on gold answers as data sets hold them."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from knapsack_rl.tasks import accuracy_reward, is_correct, math_reward, number_reward, verifier
from knapsack_rl.tasks.math_process import MathProcess
from knapsack_rl.tasks.verifier import answer_text, gold_answer, judge

CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def patient():
    """With so much time that a busy machine does not turn a right answer into a wrong one."""
    pytest.importorskip("math_verify")
    with MathProcess(seconds=60.0) as one:
        yield one


def framed(answer: str, kind: str) -> str:
    """The answer as a completion that the verifier finds it in."""
    if any(sign in answer for sign in ("boxed", "fbox", "####", "answer is")) or kind == "exact":
        return answer
    return f"\\boxed{{{answer}}}" if kind == "math" else f"#### {answer}"


@pytest.mark.parametrize("case", CASES, ids=[f"{case['kind']}: {case['gold']}, {case['answer']}" for case in CASES])
def test_answers_from_the_field(case, patient) -> None:
    answer = framed(case["answer"], case["verifier"])
    assert judge(answer, case["gold"], case["verifier"], patient.equal) is case["equal"]
    assert patient.refused == 0


PAIRS = [
    ("math", "a + b + c", "c+b+a", True),  # math-verify takes a last letter for a unit
    ("math", "3t", "3", False),
    ("math", "3t", "t+2t", True),
    ("math", "\\sin^2 t", "1-\\cos^2 t", True),
    ("math", "18\\text{ m}", "18", True),
    ("math", "\\dfrac{2469}{20,\\!000}", "0.12345", True),
    ("math", "43_5.", "43_5", True),
    ("math", "30^\\circ.", "30", True),
    ("math", "1,\\ 234", "1234", False),  # a pair
    ("math", "2", "2.", True),
    ("number", "2 x 10^5", "200000", True),
    ("number", "2 × 10^{-3}", "0.002", True),
    ("number", "2\\times 10^5", "20", False),
    ("number", "18 m^2", "18", True),
    ("number", "18", "18 m^2", True),
    ("number", "18", "18 cm²", True),
    ("number", "60", "60 km/h", True),
    ("number", "18", "so the answer is 18 m^2.", True),
    ("number", "18", "so the answer is 18m^{2} in all", True),
    ("number", "2", "so the answer is 18 m^2.", False),
    ("number", "32", "the answer is 2^5", False),  # the last number is 5
    ("number", "12 345", "12345", False),  # two numbers or one: neither is guessed
    ("number", "18 apples and 3 pears", "3", False),
]


@pytest.mark.parametrize(("kind", "gold", "answer", "equal"), PAIRS)
def test_further_ways_to_write_an_answer(kind, gold, answer, equal, patient) -> None:
    assert judge(framed(answer, kind), gold, kind, patient.equal) is equal


NUMBERS_18 = r"""
#### *18*|#### __18__|#### `18`|#### ***18***|**18**|The answer is **18**.|#### **18** dollars|#### $18$|#### \(18\)
#### \text{18}|#### 18\text{ dollars}|#### 18\\|\boxed{18.}|\boxed{\$18.00}|\boxed{18\ \text{m}^2}
\boxed{18~\mathrm{km}}|#### 18 (eighteen)|#### ≈ 18|#### The answer is 18|#### Answer: 18|#### US$ 18
#### Rs. 18|#### 18€|#### 1.8 x 10^1|#### x = 18|It costs 18 dollars.
"""
FORMULAS_18 = r"""
18|$18$|\(18\)|\[18\]|**18**|`18`|The answer is $18$.|**Answer:** 18|**Answer: 18**|\boxed{18}.
\boxed{\text{18}}|\fbox{$18$}|\boxed{18 \mathrm{~cm}}|\boxed{x = 18}|\boxed{$18$}|\boxed{**18**}|\boxed{18\\}
\boxed{18\ }|\boxed{\boxed{18}}|\boxed {18}|\boxed{\approx 18}
"""
INVISIBLE = ["#### 18\u200b", "####\u00a018", "####\n18"]


@pytest.mark.parametrize(("kind", "texts"), [("number", NUMBERS_18), ("math", FORMULAS_18)])
def test_markdown_latex_and_words_around_an_answer(kind, texts, patient) -> None:
    for text in [*texts.strip().replace("\n", "|").split("|"), *(INVISIBLE if kind == "number" else [])]:
        assert judge(text, "18", kind, patient.equal), text
        for other in ("8", "0", "1", "180", "-18", "19"):
            assert not judge(text, other, kind, patient.equal), (text, other)


@pytest.mark.parametrize(
    ("gold", "completion", "equal"),
    [
        *[("1.0", "1", True), ("1", "1.0", True), ("1.0", "1.0", True), ("-3", "-3.00", True), ("0.0", "0", True)],
        *[("1.5", "1", False), ("1.0", "10", False), ("1", "1.", False), ("1", "01.0", False), ("1", "+1.0", False)],
        *[("0964", "0964.0", False), ("0964", "964", False), ("v1.0", "v1", False), ("1.0", "1.0.0", False)],
        *[("10", "1.0", False), ("1", "1.0e0", False), ("1", "١.0", False)],
    ],
)
def test_a_whole_number_in_a_column_of_floats_is_the_whole_number(gold, completion, equal) -> None:
    assert is_correct(completion, gold, "exact") is equal


def test_gold_answers_may_be_numbers_of_any_type() -> None:
    for value, text in [
        *[(0, "0"), (0.0, "0"), (7.0, "7"), (-7.0, "-7"), (0.5, "0.5"), (1e15, "1" + "0" * 15), ("1.0", "1.0")],
        *[
            (np.int64(7), "7"),
            (np.float32(0.4), "0.4"),
            (np.float64(7), "7"),
            (np.array(7), "7"),
            (Decimal("7.0"), "7"),
        ],
        *[(Decimal("7.0"), "7"), (np.str_("x"), "x"), (True, "True")],
    ]:
        assert answer_text(value) == text, value
        for kind in ("exact", "math") if value is True or text == "x" else ("exact", "math", "number"):
            assert is_correct(text, value, kind), (value, kind)
            assert not is_correct("8", value, kind), (value, kind)


UNUSABLE = [None, "", "  ", math.nan, math.inf, np.float64("nan"), Decimal("NaN"), ["7"], {"a": 7}, b"7", "x" * 200_000]


@pytest.mark.parametrize("gold", UNUSABLE, ids=lambda gold: repr(gold)[:20])
def test_a_gold_answer_that_nothing_can_match_is_refused(gold) -> None:
    for kind in ("exact", "math", "number"):
        with pytest.raises(ValueError, match=r"gold must|an answer must be text or a finite number"):
            gold_answer(gold, kind)


def test_an_unusable_gold_answer_ends_no_run(monkeypatch, caplog) -> None:
    monkeypatch.setattr(verifier, "_warned", set())
    golds = [*UNUSABLE, 7]
    with caplog.at_level(logging.WARNING):
        for reward in (accuracy_reward, number_reward, math_reward):
            for completion in ("7", "", "nan", "None"):
                right = [0.0] * len(UNUSABLE) + [float(completion == "7")]
                assert reward([completion] * len(golds), golds) == right
    assert len(caplog.records) == 3, "once for each verifier"
    assert "an answer must be text or a finite number, got 'None'" in caplog.text


def test_a_gold_answer_is_parsed_once_for_all_rollouts_of_its_prompt() -> None:
    pytest.importorskip("math_verify")
    code = """
import math_verify
from knapsack_rl.tasks import math_worker
parsed, parse = [], math_verify.parse
math_verify.parse = lambda text, *rest, **settings: parsed.append(text) or parse(text, *rest, **settings)
check = math_worker._make_check()
parsed.clear()
print([check("2x", given) for given in ("x+x", "3x", "4x-2x", "x")], len(parsed))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, False, True, False] 5"


def test_gold_answers_that_are_no_number_are_found_by_the_worker(patient) -> None:
    for text, number, readable in [
        ("\\frac{1}{3}", True, True),
        ("12.5\\%", True, True),
        ("2\\pi", True, True),
        ("x+1", True, False),
        ("x+1", False, True),
        ("\\frac{1}{", False, False),
        ("18 apples and 3 pears", True, False),
    ]:
        assert patient.readable(text, number=number) is readable, text
