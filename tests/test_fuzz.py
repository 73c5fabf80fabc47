"""A small fuzz run, and every input that once failed: see ``fuzz.py`` and ``make fuzz``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fuzz

KEPT = sorted(fuzz.CORPUS.glob("*.json"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_random_input_ends_in_documented_errors_only(name: str, tmp_path: Path) -> None:
    cases = max(int(6000 * fuzz.TARGETS[name][1]), 20)
    refused = sum(fuzz.run_case(name, seed, tmp_path) for seed in range(cases))
    assert refused < cases, "no input was ever good"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_what_once_failed(path: Path, tmp_path: Path) -> None:
    kept = json.loads(path.read_text())
    fuzz.run_case(kept["target"], kept["seed"], tmp_path)
