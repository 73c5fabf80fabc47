"""A small fuzz run by seeds and by Hypothesis, and every case that once failed: see ``fuzz.py`` and ``make fuzz``."""

from __future__ import annotations

import inspect
import json
import random
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz
from fuzz_input import BytesDice
from knapsack_rl import state as statefile
from knapsack_rl.offline import tables as logs
from knapsack_rl.offline.recorded import read_run
from knapsack_rl.offline.reward_logs import read_reward_log
from knapsack_rl.offline.rollouts import read_rollouts
from knapsack_rl.runs import files as runfiles
from knapsack_rl.runs.log import RunLog
from knapsack_rl.training.settings import read_yaml
from test_api import callables

KEPT = sorted(fuzz.CORPUS.glob("*.json"))
QUICK = [name for name in fuzz.TARGETS if name not in ("conformance", "allocator", "command line", "run folders")]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_random_input_ends_in_documented_errors_only(name: str, tmp_path: Path) -> None:
    cases = max(int(2500 * fuzz.TARGETS[name][1]), 20)
    refused = sum(fuzz.run_case(name, random.Random(f"{name} {seed}"), tmp_path) for seed in range(cases))
    assert refused < cases, "no input was ever good"


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in fuzz.TARGETS])
def test_bytes_that_hypothesis_searches_end_in_documented_errors_only(name: str, shared_folder: Path) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=600))
    def search(content: bytes) -> None:
        fuzz.run_case(name, BytesDice(content), shared_folder)

    search()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_many_bytes_that_hypothesis_searches(name: str, shared_folder: Path) -> None:
    @settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=600))
    def search(content: bytes) -> None:
        fuzz.run_case(name, BytesDice(content), shared_folder)

    search()


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_what_once_failed(path: Path, tmp_path: Path) -> None:
    case = json.loads(path.read_text())
    fuzz.run_case(case["target"], fuzz.dice_of(case), tmp_path)


def test_something_is_kept() -> None:
    assert KEPT


def test_bytes_drive_the_dice() -> None:
    one, same, other = (BytesDice(content) for content in (b"\x01\x02\x03" * 9, b"\x01\x02\x03" * 9, b"\xf1" * 27))

    def drawn(dice: random.Random) -> list:
        return [dice.randrange(100), dice.random(), dice.choice("abcdefgh"), dice.sample(range(14), 3)]

    assert drawn(one) == drawn(same) != drawn(other)
    assert drawn(BytesDice(b""))[:3] == [0, 0.0, "a"]


READERS = {
    "read_columns": logs.read_columns,
    "read_reward_log": read_reward_log,
    "read_rollouts": read_rollouts,
    "read_run": read_run,
    "RunLog.load": RunLog.load.__func__,
    "read_rows": runfiles.read_rows,
    "read_config": runfiles.read_config,
    "read_yaml": read_yaml,
    "read_state": statefile.read_state,
}


def test_every_public_function_and_reader_is_reached(tmp_path: Path) -> None:
    """The calls of the targets are recorded, so that a new public function without a target fails here."""
    called: set[types.CodeType] = set()

    def watch(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.add(frame.f_code)

    sys.setprofile(watch)
    try:
        for name in fuzz.TARGETS:
            for seed in range(12 if name in ("conformance", "command line") else 60):
                fuzz.run_case(name, random.Random(f"{name} {seed}"), tmp_path)
    finally:
        sys.setprofile(None)
    functions = {name: function for name, function in callables() if inspect.isfunction(inspect.unwrap(function))}
    assert len(functions) > 25
    missed = [name for name, f in (functions | READERS).items() if inspect.unwrap(f).__code__ not in called]
    assert missed == []
