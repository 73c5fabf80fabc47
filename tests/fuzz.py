"""Random input to every public function and to the readers of files; any error that is not documented is a failure.

``python tests/fuzz.py --cases 1000000`` draws cases from seeds and counts them; ``--engine atheris`` lets coverage
steer the bytes behind the draws; ``test_fuzz.py`` lets Hypothesis do so, on few cases. ``make fuzz`` runs the first
two. A case is one call of a target with input drawn anew. Cases that failed once are kept in ``tests/fuzz_corpus/``, as
seed or bytes, and are tried again by ``test_fuzz.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuzz_input import BytesDice

CORPUS = Path(__file__).parent / "fuzz_corpus"

if "--steered" in sys.argv:  # modules imported from here on report their branches to atheris
    import atheris

    with atheris.instrument_imports(include=["knapsack_rl"]):
        import fuzz_calls as calls
        import fuzz_files as files
else:
    import fuzz_calls as calls
    import fuzz_files as files

TARGETS: dict[str, tuple[calls.Target, float]] = {
    "identities": (calls.identities, 0.16),
    "verifiers": (calls.verifiers, 0.18),
    "escaping": (calls.escaping, 0.15),
    "values": (calls.values, 0.15),
    "balancing": (calls.balancing, 0.1),
    "predictions": (calls.predictions, 0.01),
    "ragged": (calls.ragged, 0.08),
    "allocate": (calls.allocate, 0.08),
    "marginals": (calls.marginals, 0.03),
    "conformance": (calls.conformance, 0.001),
    "allocator": (calls.allocator, 0.008),
    "states": (calls.states, 0.008),
    "session": (calls.session, 0.005),
    "state files": (files.state_files, 0.008),
    "settings files": (files.settings_files, 0.005),
    "tables": (files.tables, 0.015),
    "reward logs": (files.reward_logs, 0.01),
    "run folders": (files.run_folders, 0.003),
    "command line": (files.command_line, 0.002),
}
"""Targets with their shares of the cases: the cheap ones get most."""

DOCUMENTED = (ValueError, FileNotFoundError)
WRONG_KIND = re.compile(
    r"float\(\) argument must be|too large to convert|is not iterable|setting an array element|must be real number|"
    r"not supported between instances of|unhashable type|only .*arrays can be converted|has no len"
)
"""Python's messages for an argument of the wrong kind, and for a whole number beyond the range of floats.

A file that holds such a value is damaged: readers must raise a ``ValueError``.
"""


def run_case(name: str, dice: random.Random, folder: Path) -> bool:
    """Run one case; return whether it ended in a documented error. Anything else is raised."""
    try:
        with np.errstate(all="ignore"):
            TARGETS[name][0](dice, folder)
    except DOCUMENTED:
        return True
    except (TypeError, OverflowError) as error:
        if TARGETS[name][0].__module__ == files.__name__ or not WRONG_KIND.search(str(error)):
            raise
        return True
    return False


def dice_of(case: dict[str, Any]) -> random.Random:
    """Return the dice of a kept case."""
    return (
        BytesDice(bytes.fromhex(case["bytes"]))
        if "bytes" in case
        else random.Random(f"{case['target']} {case['seed']}")
    )


def keep(case: dict[str, Any]) -> Path:
    """Keep a case that failed."""
    CORPUS.mkdir(exist_ok=True)
    text = json.dumps(case, sort_keys=True)
    path = CORPUS / f"{case['target'].replace(' ', '-')}-{hashlib.sha1(text.encode()).hexdigest()[:10]}.json"
    path.write_text(text + "\n")
    return path


def seeded(
    cases: int, first_seed: int, folder: Path, targets: Sequence[str]
) -> tuple[dict[str, tuple[int, int, float]], list[tuple[dict[str, Any], str]]]:
    """Cases, documented errors and seconds by target; and failed cases with their tracebacks, one per kind."""
    counted: dict[str, tuple[int, int, float]] = {}
    failed: list[tuple[dict[str, Any], str]] = []
    for name in targets:
        refused, seen = 0, set()
        number_of_cases = max(round(cases * TARGETS[name][1]), 1)
        started = time.perf_counter()
        for seed in range(first_seed, first_seed + number_of_cases):
            case = {"target": name, "seed": seed}
            try:
                refused += run_case(name, dice_of(case), folder)
            except Exception as error:  # noqa: BLE001 - any failure is a finding
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = (type(error), where.filename, where.lineno)
                if kind not in seen:
                    seen.add(kind)
                    failed.append((case, traceback.format_exc()))
        counted[name] = number_of_cases, refused, time.perf_counter() - started
        print(f"{name:>14}: {number_of_cases:>8} cases, {refused:>8} refused, {counted[name][2]:6.0f} s", flush=True)
    return counted, failed


def steered(name: str, runs: int, seed: int) -> None:
    """Let atheris run one target; ends the process. The input on which it fails is kept."""
    folder = Path(tempfile.mkdtemp())

    def one(content: bytes) -> None:
        try:
            run_case(name, BytesDice(content), folder)
        except BaseException:
            print("kept as", keep({"target": name, "bytes": content.hex()}), flush=True)
            raise

    options = [f"-runs={runs}", f"-seed={seed + 1}", "-max_len=600", "-rss_limit_mb=4096", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/"], one)
    atheris.Fuzz()


def steered_each(cases: int, seed: int, targets: Sequence[str]) -> tuple[int, list[str]]:
    """Run every target under atheris, in a separate process; return cases and the targets that failed."""
    total, failed = 0, []
    for name in targets:
        runs = max(round(cases * TARGETS[name][1]), 50)
        arguments = ["--steered", name, "--cases", str(runs), "--seed", str(seed)]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
        ended = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
        coverage = re.findall(r"cov: (\d+)", done.stderr)
        if done.returncode or not ended:
            failed.append(name)
            print(f"{name}: failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}", flush=True)
            continue
        total += int(ended[1])
        print(f"{name:>14}: {ended[1]:>8} cases, coverage {coverage[-1]:>6}, {ended[2]:>6} s", flush=True)
    return total, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("seeds", "atheris"), default="seeds")
    parser.add_argument("--steered", metavar="TARGET", help="one target under atheris, in this process")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parsed = parser.parse_args()
    logging.disable()  # readers log the lines that they skip
    if parsed.steered:
        steered(parsed.steered, parsed.cases, parsed.seed)
    if parsed.engine == "atheris":
        total, names = steered_each(parsed.cases, parsed.seed, parsed.targets)
        print(f"{total} cases under atheris, {len(names)} failures")
        return 1 if names else 0
    # A case that needs more memory is a failure and must not bring the machine down.
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    with tempfile.TemporaryDirectory() as folder:
        counted, failed = seeded(parsed.cases, parsed.seed * 10**9, Path(folder), parsed.targets)
    for case, trace in failed:
        print(f"\n{case}, kept as {keep(case)}\n{trace}")
    print(f"{sum(row[0] for row in counted.values())} cases, {len(failed)} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
