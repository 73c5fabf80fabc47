"""Model output is compared and never run; every answer takes bounded time and memory."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hostile
from knapsack_rl.tasks import accuracy_reward, is_correct, math_process, math_reward, number_reward
from knapsack_rl.tasks.math_process import MathProcess
from knapsack_rl.tasks.verifier import MAX_ANSWER, MAX_TEXT, gold_answer, judge, last_boxed, literal, text_of

RIGHT = hostile.RIGHT


def judge_all(check, number: int, folder: Path, monkeypatch, seed: int = 0) -> float:
    """Run a verifier over hostile texts in an empty folder; return the longest time that one took."""
    monkeypatch.chdir(folder)
    longest = 0.0
    for text in hostile.texts(number, seed):
        assert len(text) < 3 * 10**6
        started = time.process_time()
        assert not check(text), text[:200]
        longest = max(longest, time.process_time() - started)
    assert not list(folder.iterdir()), "a text was run"
    return longest


def test_the_texts_are_hostile() -> None:
    texts = list(hostile.texts(10_000))
    assert max(map(len, texts)) >= 10**6
    assert sum(hostile.TRAP in text for text in texts) > 300
    assert sum("\x00" in text for text in texts) > 100
    assert any(any("\ud800" <= sign <= "\udfff" for sign in text) for text in texts)
    assert len(set(texts)) > 3000
    assert texts == list(hostile.texts(10_000))


def never(given: str, right: str) -> bool:
    """In place of the comparison of formulas: which answer is compared, and that no literal is."""
    assert 0 < len(given) <= MAX_ANSWER
    assert literal(given) is None or literal(right) is None
    return False


CHECKS = {
    "exact": lambda text: is_correct(text, RIGHT, "exact"),
    "number": lambda text: judge(text, RIGHT, "number", never),
    "math": lambda text: judge(text, RIGHT, "math", never),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_ten_thousand_texts_against_the_verifiers_in_python(check, tmp_path: Path, monkeypatch) -> None:
    longest = judge_all(check, 10_000, tmp_path, monkeypatch)
    print(f"10000 texts, slowest {longest:.3f} s of processor time")
    assert longest < 1.0  # processor time, which other work on the machine does not lengthen


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_memory_is_bounded(check) -> None:
    longest = sorted(hostile.texts(3000), key=len)[-30:]
    assert len(longest[-1]) >= 10**6
    tracemalloc.start()
    try:
        for text in longest:
            check(text)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_what_python_takes_for_a_number_is_not_therefore_right(patient) -> None:
    for right, texts in hostile.TRICKS.items():
        for text in texts:
            for framed in (text, f"#### {text}", f"\\boxed{{{text}}}", f"The answer is {text}."):
                for verifier in ("exact", "number"):
                    assert not judge(framed, right, verifier, patient.equal), (framed, right, verifier)


# --- numbers ---

NUMBERS = [
    ("#### 72", 72),
    ("6 * 12 = 72\n#### 72", 72),
    ("#### 1\nno, 3\n#### 2", 2),
    ("####72\nand 5 more words", 72),
    ("#### $1,234.50", Fraction("1234.5")),
    ("#### -$5", -5),
    ("#### $-5", -5),
    ("#### −7", -7),
    ("#### 72 dollars.", 72),
    ("#### **72** dollars", 72),
    ("#### \\$72", 72),
    ("#### \\boxed{72}", 72),
    ("#### 50%", 50),
    ("#### 3/4", Fraction(3, 4)),
    ("#### 3 1/2", Fraction(7, 2)),
    ("#### .5", Fraction(1, 2)),
    ("#### 5.", 5),
    ("#### 1.5e3", 1500),
    ("#### 2e-2", Fraction(1, 50)),
    ("#### 5^2", 25),
    ("#### 5 * 3", 15),
    ("#### 5!", 120),
    ("so \\boxed{42}", 42),
    ("\\boxed{x=42}", 42),
    ("\\boxed{12\\text{ cm}}", 12),
    ("\\boxed{1} or rather \\boxed{1{,}000}", 1000),
    ("\\boxed{12\\ 345}", 12345),
    ("\\boxed{\\frac{1}{3}}", Fraction(1, 3)),
    ("\\boxed{-\\dfrac{1}{3}}", Fraction(-1, 3)),
    ("\\boxed{\\$5}", 5),
    ("\\boxed{50\\%}", 50),
    ("It is 3 or 4, I say 4.", 4),
    ("between 3-5", 5),
    ("the sum is -5", -5),
    ("it costs $1,000,000.", 10**6),
    ("The answer is $9{,}500.", 9500),
    ("x = 1/2.", Fraction(1, 2)),
]
NO_NUMBERS = [
    *("no number", "", "72\n####", "72\n#### none", "#### 1,23", "#### 1,2345", "#### 1/0", "#### 5²", "#### 1 2"),
    *("#### 1e100", "#### 1.2.3", "#### ４２", "\\boxed{42", "####" + "9" * (MAX_ANSWER + 1)),
]


def test_final_numbers(patient) -> None:
    for text, number in NUMBERS:
        assert judge(text, str(number), "number", patient.equal), (text, number)
        if "####" in text or "boxed" in text:  # a solution may be the gold answer
            assert judge(str(number), text, "number", patient.equal), (text, number)
        for other in (number + 1, -number, 10 * number, number + Fraction(1, 1000)):
            assert not judge(text, str(other), "number", patient.equal), (text, other)
    wrong = ("1", "2", "3", "12", "123", "12345", "5", "25", "42", "72", "1.2", "2.3", "9" * MAX_ANSWER)
    for text in NO_NUMBERS:
        assert not any(judge(text, number, "number", patient.equal) for number in wrong), text
    assert patient.refused == 0


@given(
    st.integers(-(10**15), 10**15),
    st.integers(0, 6),
    st.sampled_from(["#### {}", "\\boxed{{{}}}", "so {}", "it is {}."]),
)
def test_a_number_is_read_as_the_fraction_that_it_is(number: int, places: int, frame: str) -> None:
    exact = Fraction(number, 10**places)
    digits = f"{abs(number):0{places + 1}d}"
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
    for grouped in (whole, f"{int(whole):,}"):
        written = ("-" if number < 0 else "") + grouped + ("." + decimals if places else "")
        assert literal(gold_answer(frame.format(written), "number")) == exact
        assert judge(frame.format(written), str(exact), "number", never)
        assert not judge(frame.format(written), str(exact + Fraction(1, 10**7)), "number", never)


@given(st.text())
def test_any_text_is_judged(text: str) -> None:
    for given_text in (text, f"#### {text}", f"\\boxed{{{text}}}", f"7 {text}"):
        for check in CHECKS.values():
            assert not check(given_text)


def test_text_beyond_the_bound_is_wrong_unread() -> None:
    for verifier in ("exact", "number", "math"):
        assert is_correct("7" + " " * (MAX_TEXT - 1), "7", verifier), verifier
        assert not is_correct("7" + " " * MAX_TEXT, "7", verifier), verifier


def test_a_gold_answer_that_nothing_can_match_is_an_error_of_the_data() -> None:
    for gold in ("", "none", "#### ?"):
        with pytest.raises(ValueError, match="gold must hold a number"):
            is_correct("7", gold, "number")
    for gold in ("", "x" * (MAX_ANSWER + 1)):
        with pytest.raises(ValueError, match="1 to 512 characters"):
            is_correct("7", gold)
    with pytest.raises(ValueError, match="verifier must be one of math, number, exact, got 'sympy'"):
        is_correct("7", "7", "sympy")


def test_rewards_in_the_form_that_trainers_call() -> None:
    solution = "He has 3 + 4 = <<3+4=7>>7.\n#### 7"
    completions = ["it is 7", [{"role": "assistant", "content": "7.0"}], [{"role": "assistant"}], [], "8"]
    assert number_reward(completions, [solution] * 5, prompt_id=[1] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert accuracy_reward([" a ", [{"content": "a"}], "b"], ["a"] * 3) == [1.0, 1.0, 0.0]
    for reward in (accuracy_reward, number_reward, math_reward):
        assert reward([], []) == []
        assert reward(["\\boxed{1}", "1"], ["\\boxed{1}", "2"], prompts=["a", "b"]) == [1.0, 0.0]
        with pytest.raises(ValueError, match="equally long, got 2 and 1"):
            reward(["1", "2"], ["1"])


def test_a_completion_without_text_is_the_empty_text() -> None:
    for odd in (None, [], [None], [{}], [{"content": None}], [{"content": [1]}], ["a"], 7):
        assert text_of(odd) == "", odd


def test_boxes() -> None:
    for text, found in [
        ("\\boxed{a}", "a"),
        ("\\fbox{a}", "a"),
        ("\\boxed 2$.", "2"),
        ("\\boxed{a}\\boxed{b{c}d}e", "b{c}d"),
        ("\\boxed{}", ""),
        ("\\boxed{", ""),
        ("\\boxed{{}", ""),
        ("boxed{a}", None),
        ("\\boxedx{a}", None),
        ("\\boxed{" + "x" * MAX_ANSWER + "}", "x" * MAX_ANSWER),
        ("\\boxed{" + "x" * (MAX_ANSWER + 1) + "}", ""),
    ]:
        assert last_boxed(text) == found, text


# --- formulas ---


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify")
    with MathProcess() as one:
        one.start()
        yield one


@pytest.fixture
def patient():
    """With so much time that a busy machine does not turn a right answer into a wrong one."""
    pytest.importorskip("math_verify")
    with MathProcess(seconds=60.0) as one:
        yield one


def test_equal_formulas_are_right_and_others_are_not(patient) -> None:
    for given_text, right, equal in [
        ("\\boxed{x^2-1}", "(x-1)(x+1)", True),
        ("\\boxed{\\frac{\\sqrt{3}}{3}}", "\\frac{1}{\\sqrt{3}}", True),
        ("The answer is\n$\\frac{1}{2}$", "0.5", True),
        ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", True),
        ("\\boxed{x^2+1}", "(x-1)(x+1)", False),
        ("\\boxed{(1,2)}", "(2,1)", False),
        ("\\boxed{\\text{no idea}}", "\\pi", False),
        # several symbols, for which sympy would compile code
        ("\\boxed{\\frac{x^2-y^2}{x-y}}", "x+y", True),
        ("\\boxed{\\frac{x^2-y^2}{x-y}}", "x-y", False),
        ("\\boxed{\\sin^2 x+\\cos^2 x}", "1", True),
        ("\\boxed{\\frac{(n+1)!}{n!}}", "n+1", True),
        ("\\boxed{\\frac{x^2}{4}+\\frac{y^2}{3}=1}", "3x^2+4y^2=12", True),
        # small exact numbers
        ("\\boxed{2^{-60}}", "2^{-61}", False),
        ("\\boxed{\\frac{1}{2^{60}}}", "2^{-60}", True),
        ("\\boxed{\\left(\\frac56\\right)^{200}}", "\\left(\\frac56\\right)^{201}", False),
        ("\\boxed{\\sqrt{5+2\\sqrt{6}}-\\sqrt{2}-\\sqrt{3}}", "0", True),
        ("\\boxed{12.5\\%}", "\\frac{1}{8}", True),
        ("\\boxed{12.5\\%}", "0.25", False),
        ("\\boxed{\\infty}", "+\\infty", True),
        # other ways to write and to frame
        ("\\boxed{1\\,000}", "1000", True),
        ("\\boxed{√2}", "\\sqrt{2}", True),
        ("\\boxed{90°}", "90", True),
        ("\\boxed{–5}", "-5", True),
        ("\\boxed 2", "2", True),
        ("\\fbox{2}", "2", True),
        ("\\boxed{3 1/2}", "3.5", True),
        ("\\boxed{4 2}", "6", False),
    ]:
        assert judge(given_text, right, "math", patient.equal) is equal, (given_text, right)
    assert patient.refused == 0


def test_formulas_that_only_look_right_are_wrong(patient) -> None:
    for right, texts in hostile.TRICKS.items():
        for text in texts:
            assert not judge(f"\\boxed{{{text}}}", right, "math", patient.equal), (text, right)
    for text, right in hostile.NEARLY:
        assert not judge(f"\\boxed{{{text}}}", right, "math", patient.equal), (text, right)
    assert patient.refused == 0


def test_text_and_literals_are_compared_without_the_worker() -> None:
    for given_text, right, equal in [
        ("so $\\pi$", "so $\\pi$", True),
        ("\\boxed{ \\pi }", "$\\pi$", True),
        ("\\boxed{0.50}", "1/2", True),
        ("\\boxed{3}", "4", False),
        ("x" * (MAX_TEXT + 1), "4", False),
        ("\\boxed{" + "x" * 600 + "}", "4", False),
        ("", "4", False),
    ]:
        assert judge(given_text, right, "math", never) is equal, (given_text, right)


def test_the_worker_evaluates_nothing(patient, tmp_path: Path, monkeypatch) -> None:
    """In a worker with all the time it wants, so that time limits cannot be what saves the day."""
    monkeypatch.chdir(tmp_path)
    for text in hostile.CODE:
        assert not patient.equal(text, "\\pi")
        for verifier in ("math", "number"):
            assert not judge(f"\\boxed{{1+{text}}}", "3", verifier, patient.equal)
    assert not list(tmp_path.iterdir())
    assert patient.equal("x+x", "2x"), "the worker lives on"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_hang_is_killed_and_the_next_answer_is_judged() -> None:
    """Stopped processes play the part of work that ignores signals; a killed one must come back at once."""
    pytest.importorskip("math_verify")
    with MathProcess(seconds=2.0) as one:
        assert one.equal("x+x", "2x")
        worker = one._worker
        (child,) = children_of(worker.pid)
        os.kill(child, signal.SIGSTOP)
        assert not one.equal("y+y", "2y")
        assert one.refused == 1
        assert one.equal("y+y", "2y"), "the next answer is judged, by the same worker"
        assert one._worker is worker
        assert child not in children_of(worker.pid)
        (child,) = children_of(worker.pid)
        os.kill(child, signal.SIGKILL)  # while it had nothing to do: no answer is lost
        wait_for_the_end_of(child)
        assert one.equal("z+z", "2z")
        assert one.refused == 1


def test_a_worker_that_dies_or_hangs_itself_is_replaced(monkeypatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(math_process, "GRACE_SECONDS", 0.5)
    with MathProcess(seconds=2.0) as one:
        one.start()
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            first = one._worker
            (child,) = children_of(first.pid)
            os.kill(first.pid, signal_number)
            assert not one.equal("y+y", "2y")
            assert first.poll() is not None, "the worker was not ended"
            wait_for_the_end_of(child)
            assert one.equal("y+y", "2y")
        assert one.refused == 2
        last = children_of(one._worker.pid)
    assert one._worker is None
    wait_for_the_end_of(*last)


def test_a_forked_process_leaves_the_worker_of_its_parent_alone() -> None:
    pytest.importorskip("math_verify")
    code = """
import os, sys
from knapsack_rl.tasks.math_process import MathProcess
with MathProcess(seconds=60.0) as one:
    one.start()
    child = os.fork()
    if not child:
        sys.exit(0)
    os.waitpid(child, 0)
    print(one.equal("x+x", "2x"), one.refused)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True 0"


def test_a_worker_ends_with_the_last_reference_to_it() -> None:
    pytest.importorskip("math_verify")
    one = MathProcess()
    one.start()
    worker = one._worker
    children = children_of(worker.pid)
    del one
    gc.collect()
    assert worker.returncode is not None
    wait_for_the_end_of(*children)


def wait_for_the_end_of(*pids: int) -> None:
    """Fail if a process is still there after a while; one that is dead and not yet collected counts as gone."""
    for pid in pids:
        for _ in range(100):
            status = Path(f"/proc/{pid}/stat")
            if not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX":
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"process {pid} is left over")


def test_limits_that_make_no_sense_are_refused() -> None:
    pytest.importorskip("math_verify")
    for settings in ({"seconds": 0.0}, {"seconds": float("nan")}, {"megabytes": 10}):
        with pytest.raises(ValueError, match="seconds must be > 0"):
            MathProcess(**settings)


def test_a_missing_extra_names_the_install_line(monkeypatch) -> None:
    monkeypatch.setattr(math_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install \"knapsack-rl\[math\]\""):
        MathProcess()


def slowest_answer(verifier, number: int, folder: Path, monkeypatch) -> tuple[float, str]:
    """Longest wall-clock time of one text, whatever happened to the worker before, and that text."""
    monkeypatch.chdir(folder)
    verifier.start()
    longest = (0.0, "")
    for text in hostile.texts(number, seed=1):
        for kind, right in (("math", "\\frac{1+\\sqrt{8675309}}{125}"), ("number", "8675309^{-1}")):
            started = time.monotonic()
            assert not judge(text, right, kind, verifier.equal), text[:200]
            longest = max(longest, (time.monotonic() - started, text[:80]))
    assert not list(folder.iterdir()), "a text was run"
    return longest


def test_a_sample_of_texts_against_formulas(verifier, tmp_path: Path, monkeypatch) -> None:
    slowest_answer(verifier, 120, tmp_path, monkeypatch)


@pytest.mark.slow
def test_ten_thousand_texts_against_formulas(verifier, tmp_path: Path, monkeypatch) -> None:
    before = verifier.refused
    longest, text = slowest_answer(verifier, 10_000, tmp_path, monkeypatch)
    print(f"10000 texts, slowest {longest:.3f} s ({text!r}), {verifier.refused - before} ended for time or memory")
    assert longest < 1.0
