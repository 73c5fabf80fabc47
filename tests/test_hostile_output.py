"""Model output is compared and never run; every answer takes bounded time and memory."""

from __future__ import annotations

import os
import signal
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hostile
from knapsack_rl.tasks import arithmetic, exact_match_reward, gsm8k, gsm8k_reward, math_answers, math_reward
from knapsack_rl.tasks.extraction import MAX_ANSWER, MAX_TEXT, last_boxed, text_of
from knapsack_rl.tasks.gsm8k import final_number
from knapsack_rl.tasks.math_answers import MathVerifier

RIGHT = hostile.RIGHT


def judge(check, number: int, folder: Path, monkeypatch, seed: int = 0) -> float:
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


CHECKS = {
    "arithmetic": lambda text: arithmetic.is_correct(text, "123456"),
    "exact match": lambda text: exact_match_reward([text], [RIGHT])[0] > 0,
    "gsm8k": lambda text: gsm8k.is_correct(text, RIGHT),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_ten_thousand_texts_against_the_verifiers_in_python(check, tmp_path: Path, monkeypatch) -> None:
    longest = judge(check, 10_000, tmp_path, monkeypatch)
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


@pytest.mark.parametrize(("right", "texts"), hostile.TRICKS.items())
def test_what_python_takes_for_a_number_is_not_therefore_right(right: str, texts: tuple[str, ...]) -> None:
    for text in texts:
        for framed in (text, f"#### {text}", f"\\boxed{{{text}}}", f"The answer is {text}."):
            assert not gsm8k.is_correct(framed, right), framed
            assert not arithmetic.is_correct(framed, right), framed
            assert not exact_match_reward([framed], [right])[0], framed


# --- gsm8k ---


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("6 * 12 = 72\n#### 72", 72),
        ("#### 1\nno, 3\n#### 2", 2),
        ("####72\nand 5 more words", 72),
        ("#### $1,234.50", Fraction("1234.5")),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### −7", -7),
        ("#### 72 dollars.", 72),
        ("#### 50%", 50),
        ("#### 3/4", Fraction(3, 4)),
        ("#### .5", Fraction(1, 2)),
        ("#### 5.", 5),
        ("#### 1.5e3", 1500),
        ("#### 2e-2", Fraction(1, 50)),
        ("so \\boxed{42}", 42),
        ("\\boxed{1} or rather \\boxed{1{,}000}", 1000),
        ("\\boxed{\\frac{1}{3}}", Fraction(1, 3)),
        ("\\boxed{-\\dfrac{1}{3}}", Fraction(-1, 3)),
        ("\\boxed{\\$5}", 5),
        ("\\boxed{50\\%}", 50),
        ("\\boxed{12\\text{ cm}}", None),  # a unit inside the box is not a number
        ("It is 3 or 4, I say 4.", 4),
        ("between 3-5", 5),
        ("the sum is -5", -5),
        ("it costs $1,000,000.", 10**6),
        ("x = 1/2.", Fraction(1, 2)),
        ("no number", None),
        ("", None),
        ("72\n####", None),
        ("72\n#### none", None),
        ("#### 1,23", None),
        ("#### 1,2345", None),
        ("#### 1/0", None),
        ("#### 5^2", None),
        ("#### 5²", None),
        ("#### 5 * 3", None),
        ("#### 5!", None),
        ("#### 1 2", None),
        ("#### 1e100", None),
        ("#### 1.2.3", None),
        ("#### ４２", None),
        ("\\boxed{42", None),
        ("\\boxed{x=42}", None),
        ("####" + "9" * 65, None),
    ],
)
def test_final_numbers(text: str, number) -> None:
    assert final_number(text) == number


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
        assert final_number(frame.format(written)) == exact


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    for given_text in (text, f"#### {text}", f"\\boxed{{{text}}}", f"7 {text}"):
        number = final_number(given_text)
        assert number is None or abs(number) < 10**200


def test_text_beyond_the_bound_is_wrong_unread() -> None:
    assert gsm8k.is_correct("7" + " " * (MAX_TEXT - 1), "7")
    assert not gsm8k.is_correct("7" + " " * MAX_TEXT, "7")


def test_a_right_answer_that_is_none_is_an_error_of_the_data() -> None:
    for answer in ("", "none", "#### ?"):
        with pytest.raises(ValueError, match="must hold a number"):
            gsm8k.is_correct("7", answer)
    with pytest.raises(ValueError, match="equally long, got 2 and 1"):
        gsm8k_reward(["1", "2"], ["1"])


def test_rewards_in_the_form_that_trainers_call() -> None:
    solution = "He has 3 + 4 = <<3+4=7>>7.\n#### 7"
    completions = ["it is 7", [{"role": "assistant", "content": "7.0"}], [{"role": "assistant"}], [], "8"]
    assert gsm8k_reward(completions, [solution] * 5, prompt_id=[1] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert exact_match_reward([" a ", [{"content": "a"}], "b"], ["a"] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("odd", [None, [], [None], [{}], [{"content": None}], [{"content": [1]}], ["a"], 7])
def test_what_is_no_text_is_the_empty_text(odd) -> None:
    assert text_of(odd) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{a}", "a"),
        ("\\boxed{a}\\boxed{b{c}d}e", "b{c}d"),
        ("\\boxed{}", ""),
        ("\\boxed{", None),
        ("\\boxed{{}", None),
        ("boxed{a}", None),
        ("\\boxed{" + "x" * MAX_ANSWER + "}", "x" * MAX_ANSWER),
        ("\\boxed{" + "x" * (MAX_ANSWER + 1) + "}", None),
    ],
)
def test_boxes(text: str, found) -> None:
    assert last_boxed(text) == found


# --- formulas ---


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify")
    with MathVerifier() as one:
        one.start()
        yield one


@pytest.fixture
def patient():
    """With so much time that a busy machine does not turn a right answer into a wrong one."""
    pytest.importorskip("math_verify")
    with MathVerifier(seconds=60.0) as one:
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
    ]:
        assert patient.is_correct(given_text, right) is equal, (given_text, right)
    assert patient.refused == 0


def test_formulas_that_only_look_right_are_wrong(patient) -> None:
    for right, texts in hostile.TRICKS.items():
        for text in texts:
            assert not patient.is_correct(f"\\boxed{{{text}}}", right), (text, right)
    for text, right in hostile.NEARLY:
        assert not patient.is_correct(f"\\boxed{{{text}}}", right), (text, right)
    assert patient.refused == 0


def test_text_and_numbers_are_compared_without_the_worker() -> None:
    pytest.importorskip("math_verify")
    one = MathVerifier()
    assert one.is_correct("so $\\pi$", "so $\\pi$")
    assert one.is_correct("\\boxed{ \\pi }", "$\\pi$")
    assert one.is_correct("\\boxed{0.50}", "1/2")
    assert not one.is_correct("\\boxed{3}", "4")
    assert not one.is_correct("x" * (MAX_TEXT + 1), "4")
    assert not one.is_correct("\\boxed{" + "x" * 600 + "}", "4")
    assert not one.is_correct("", "4")
    assert one._worker is None
    for answer in ("", "x" * 600):
        with pytest.raises(ValueError, match="1 to 512 characters"):
            one.is_correct("7", answer)


def test_the_worker_evaluates_nothing(patient, tmp_path: Path, monkeypatch) -> None:
    """In a worker with all the time it wants, so that time limits cannot be what saves the day."""
    monkeypatch.chdir(tmp_path)
    for text in hostile.CODE:
        assert not patient.is_correct(f"\\boxed{{{text}}}", "\\pi")
        assert not patient.is_correct(f"$ {text} $", "\\pi")
    assert not list(tmp_path.iterdir())
    assert patient.is_correct("\\boxed{x+x}", "2x"), "the worker lives on"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_hang_is_killed_and_the_next_answer_is_judged() -> None:
    """Stopped processes stand for work that listens to nothing; a killed one must come back at once."""
    pytest.importorskip("math_verify")
    with MathVerifier(seconds=2.0) as one:
        assert one.is_correct("\\boxed{x+x}", "2x")
        worker = one._worker
        (child,) = children_of(worker.pid)
        os.kill(child, signal.SIGSTOP)
        assert not one.is_correct("\\boxed{y+y}", "2y")
        assert one.refused == 1
        assert one.is_correct("\\boxed{y+y}", "2y"), "the next answer is judged, by the same worker"
        assert one._worker is worker
        assert child not in children_of(worker.pid)
        (child,) = children_of(worker.pid)
        os.kill(child, signal.SIGKILL)  # while it had nothing to do: no answer is lost
        wait_for_the_end_of(child)
        assert one.is_correct("\\boxed{z+z}", "2z")
        assert one.refused == 1


def test_a_worker_that_dies_or_hangs_itself_is_replaced(monkeypatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(math_answers, "GRACE_SECONDS", 0.5)
    with MathVerifier(seconds=2.0) as one:
        one.start()
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            first = one._worker
            (child,) = children_of(first.pid)
            os.kill(first.pid, signal_number)
            assert not one.is_correct("\\boxed{y+y}", "2y")
            assert first.poll() is not None, "the worker was not ended"
            wait_for_the_end_of(child)
            assert one.is_correct("\\boxed{y+y}", "2y")
        assert one.refused == 2
        last = children_of(one._worker.pid)
    assert one._worker is None
    wait_for_the_end_of(*last)


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
            MathVerifier(**settings)


def test_a_missing_extra_names_the_install_line(monkeypatch) -> None:
    monkeypatch.setattr(math_answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install \"knapsack-rl\[math\]\""):
        MathVerifier()


def test_the_shared_verifier_rewards() -> None:
    pytest.importorskip("math_verify")
    assert math_reward(["\\boxed{1}", "\\boxed{2}"], ["1", "1"], prompt_id=[1, 1]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="equally long"):
        math_reward(["1"], [])


def slowest_answer(verifier, number: int, folder: Path, monkeypatch) -> tuple[float, str]:
    """Longest wall-clock time of one text, whatever happened to the worker before, and that text."""
    monkeypatch.chdir(folder)
    verifier.start()
    longest = (0.0, "")
    for text in hostile.texts(number, seed=1):
        started = time.monotonic()
        assert not verifier.is_correct(text, "\\frac{1+\\sqrt{8675309}}{125}"), text[:200]
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
