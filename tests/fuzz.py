"""Random input to every public function and to the readers of files; what is allowed is stated, all else is a failure.

``python tests/fuzz.py --cases 1000000 --seed 0`` counts its cases; ``make fuzz`` runs it so. A case is one call with
input drawn anew. The first input on which a target fails is kept in ``tests/fuzz_corpus/`` as its seed;
``test_fuzz.py`` runs a few thousand cases and all kept ones.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

import hostile
import knapsack_rl as kr
from knapsack_rl import balance, groups, logs, prompt_ids, runfiles, statefile
from knapsack_rl.cli import main as command
from knapsack_rl.report import page
from knapsack_rl.report.runlog import RunLog
from knapsack_rl.reward_logs import read_reward_log
from knapsack_rl.tasks import arithmetic, exact_match_reward, gsm8k
from knapsack_rl.tasks.extraction import last_boxed, text_of
from knapsack_rl.value import marginal_values, nonzero_gradient_probability
from knapsack_rl.value import value as value_of

CORPUS = Path(__file__).parent / "fuzz_corpus"
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    0.5,
    1e-300,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**63,
    -(2**70),
    10**400,
)
ODD = (None, "", "7", b"x", [], {}, [[1]], True, object(), 1j, "a" * 99, np.float32(0.3), np.array([]), ("a",))

Target = Callable[[random.Random, Path], None]


def number(dice: random.Random) -> Any:
    """Mostly a usable number."""
    kind = dice.random()
    if kind < 0.6:
        return dice.randrange(12)
    return dice.choice(NUMBERS) if kind < 0.9 else dice.choice(ODD)


def numbers(dice: random.Random, size: int) -> Any:
    """An array that is fine, nearly fine, or not at all."""
    kind = dice.random()
    if kind < 0.7:
        return [dice.choice((0.0, 1.0, dice.random())) for _ in range(size)]
    if kind < 0.9:
        return [number(dice) for _ in range(max(size + dice.choice((-1, 0, 0, 1)), 0))]
    return dice.choice(ODD)


def ids(dice: random.Random, size: int) -> Any:
    if dice.random() < 0.1:
        return [dice.choice((*ODD, *NUMBERS)) for _ in range(size)]
    pool: list[Any] = [*range(6), "a", "b", "7", "é", "\x00", "\ud800", -3, 2**65]
    return [dice.choice(pool) for _ in range(size)] if dice.random() < 0.3 else dice.sample(pool, min(size, len(pool)))


def check_counts(counts: Any, prompts: int, budget: int) -> None:
    assert counts.shape == (prompts,), counts
    assert counts.dtype == np.int64, counts.dtype
    assert (counts >= 0).all() and counts.sum() == budget, (counts, budget)


def allocate(dice: random.Random, folder: Path) -> None:
    rates = numbers(dice, dice.randrange(1, 6))
    budget, low, high = dice.randrange(30), dice.randrange(3), dice.randrange(3, 12)
    if dice.random() < 0.2:
        budget, low, high = number(dice), number(dice), number(dice)
    found = kr.allocate(rates, budget, low, high, fallback=dice.random() < 0.5)
    check_counts(found.counts, len(rates), budget)
    assert (found.counts >= low).all() and (found.counts <= high).all(), "a count beyond its bounds"


def allocator(dice: random.Random, folder: Path) -> None:
    """A short life of an allocator; after an error the same object must still serve a sane batch."""
    one = kr.KnapsackAllocator(
        dice.choice(("beta", "window", "empirical-bayes", "bayes-filter")),
        dice.choice((0, 1, 2, 3)),
        dice.choice((4, 16)),
    )
    for _ in range(3):
        try:
            batch, budget = ids(dice, dice.randrange(5)), number(dice)
            found = one.allocate(batch, budget)
            check_counts(found.counts, len(batch), budget)
            rollouts = [batch[i] for i in found.expand()]
            lengths = None if dice.random() < 0.5 else numbers(dice, len(rollouts))
            one.observe(rollouts, numbers(dice, len(rollouts)), lengths)
            one.belief(ids(dice, 3))
            one.predicted_lengths(ids(dice, 3))
        except ValueError:
            pass
        check_counts(one.allocate(["sane", 1], 9).counts, 2, 9)
        assert one.metrics()["allocation_failures"] == 0, "the estimator failed"
    again = kr.KnapsackAllocator(one.estimator_name, one.min_rollouts, one.max_rollouts)
    again.load_state_dict(one.state_dict())
    assert again.allocate(["sane", "b"], 8).counts.tolist() == one.allocate(["sane", "b"], 8).counts.tolist()


def values(dice: random.Random, folder: Path) -> None:
    function = dice.choice((value_of, nonzero_gradient_probability))
    function(numbers(dice, 3) if dice.random() < 0.5 else number(dice), numbers(dice, 3))


def marginals(dice: random.Random, folder: Path) -> None:
    rates = numbers(dice, 3)
    table = marginal_values(rates if isinstance(rates, list) else [rates], dice.randrange(20))
    assert np.isfinite(table).all() and (table >= 0).all()


def ragged(dice: random.Random, folder: Path) -> None:
    size = dice.randrange(8)
    group, reward = ids(dice, size), numbers(dice, size)
    if dice.random() < 0.5:
        found = kr.group_advantages(np.array(group), reward, dice.choice(("group", "batch", "none", "odd")))
        assert np.isfinite(found).all()
    else:
        groups.group_statistics(np.array(group), reward)


def balancing(dice: random.Random, folder: Path) -> None:
    work, workers = numbers(dice, dice.randrange(6)), dice.choice((1, 2, 5, number(dice)))
    found = balance.partition(work, workers)
    assert sorted(int(k) for worker in range(workers) for k in found.indices(worker)) == list(range(len(work)))


def identities(dice: random.Random, folder: Path) -> None:
    found = prompt_ids.check_prompt_ids(dice.choice((ids(dice, 4), dice.choice(ODD))))
    assert all(isinstance(one, (str, int)) for one in found)
    prompt_ids.stable_order(found)
    for one in found:
        twin = prompt_ids.other_type(one)
        assert twin is None or (str(twin) == str(one) and type(twin) is not type(one))


def text(dice: random.Random) -> str:
    kind = dice.random()
    if kind < 0.3:
        return "".join(
            chr(dice.choice((dice.randrange(128), dice.randrange(0x11000)))) for _ in range(dice.randrange(40))
        )
    if kind < 0.6:
        pieces = ("####", "\\boxed{", "}", "1", "-", ",", ".", "/", "e", "%", "$", " ", "\n", "\\frac{", "{", "½")
        return "".join(dice.choice(pieces) for _ in range(dice.randrange(20)))
    return next(iter(hostile.texts(1, dice.randrange(2**30))))[:2000] if kind < 0.7 else f"#### {dice.randrange(10**6)}"


def verifiers(dice: random.Random, folder: Path) -> None:
    written = text(dice)
    found = gsm8k.final_number(written)
    assert found is None or abs(found) < 10**200
    assert gsm8k.is_correct(written, "-8675309.125") is False
    arithmetic.is_correct(written, "123")
    exact_match_reward([written], ["x"])
    last_boxed(written)
    text_of(dice.choice((written, *ODD, [{"content": written}])))


def escaping(dice: random.Random, folder: Path) -> None:
    shown = page.escape(text(dice))
    assert not set('<>"') & set(shown)
    if dice.random() < 0.05:
        whole = page.document(text(dice), [page.table([text(dice)], [[text(dice)]], caption=text(dice))])
        assert "<script" not in whole


def mutated(dice: random.Random, whole: bytes) -> bytes:
    """A file with bytes changed, cut, doubled or replaced by what parsers dislike."""
    content = bytearray(whole)
    for _ in range(dice.choice((0, 1, 1, 2, 8))):
        at = dice.randrange(len(content) + 1)
        kind = dice.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = dice.choice(
                (b"\x00", b"\xff\xfe", b'"', b"[" * 3000, b"9" * 5000, b"1e999", b"null", b"\n\n", b"{", b",,")
            )
        elif kind == 3:
            content[at:at] = content[at : at + dice.randrange(200)]
        else:
            del content[at : at + dice.randrange(40)]
    return bytes(content)


ROW = {"step": 1, "prompt_ids": ["a", 7], "counts": [3, 2], "successes": [1, 0], "scored": [3, 2], "seconds": 0.1}
RUN_ROW = ROW | {"effective": [True, False], "estimate": [None, 0.5], "predicted": [0.5, 0.2], "reason": ""}
FILES = {
    "rates.csv": b"prompt_id,success_rate\na,0.5\nb,0.1\nc,\n",
    "rewards.csv": b"prompt_id,reward,step\na,1,1\na,0,1\nb,1,2\n",
    "rewards.jsonl": b'{"prompt_id": "a", "reward": 1, "step": 1}\n{"prompt_id": 7, "reward": 0.5, "step": 2}\n',
}


def state_files(dice: random.Random, folder: Path) -> None:
    path = folder / "state.npz"
    if not path.exists():
        one = kr.KnapsackAllocator("beta")
        one.observe(["a", "a", 7], [1.0, 0.0, 1.0])
        one.save(path)
    (folder / "mutated.npz").write_bytes(mutated(dice, path.read_bytes()))
    header, arrays = statefile.read_state(folder / "mutated.npz")
    twin = kr.KnapsackAllocator("beta")
    twin.load_state_dict({"header": header, "arrays": arrays})
    assert twin.tracker.prompt_ids == ["a", 7], "damage went unnoticed"


def tables(dice: random.Random, folder: Path) -> None:
    name = dice.choice(list(FILES))
    (folder / name).write_bytes(mutated(dice, FILES[name]))
    columns = logs.read_columns(folder / name)
    assert len({len(values) for values in columns.values()}) == 1
    read_reward_log(folder / name)


def run_folders(dice: random.Random, folder: Path) -> None:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_bytes(mutated(dice, b"allocation: knapsack\nsteps: 2\nprompts_per_step: 2\nseed: 0\n"))
    rows = json.dumps(RUN_ROW).encode() + b"\n" + json.dumps(RUN_ROW | {"step": 2}).encode() + b"\n"
    (run / "allocations.jsonl").write_bytes(mutated(dice, rows))
    (run / "metrics.jsonl").write_bytes(mutated(dice, b'{"step": 1, "rollouts": 5, "reward": 0.5}\n'))
    runfiles.read_rows(run / "metrics.jsonl")
    dice.choice((RunLog.load, read_reward_log))(run)


def command_line(dice: random.Random, folder: Path) -> None:
    """Commands end with a status, never with a traceback."""
    name = dice.choice(list(FILES))
    (folder / name).write_bytes(mutated(dice, FILES[name]))
    arguments = ["allocate", str(folder / name), *dice.choice(([], ["--budget", str(dice.randrange(-2, 40))]))]
    arguments += dice.choice(
        ([], ["--min-rollouts", str(dice.randrange(4))], ["--estimator", "beta"], ["--format", "json"])
    )
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        status = command(arguments)
    assert status in (0, 2)


TARGETS: dict[str, tuple[Target, float]] = {
    "identities": (identities, 0.17),
    "verifiers": (verifiers, 0.2),
    "escaping": (escaping, 0.15),
    "values": (values, 0.15),
    "balancing": (balancing, 0.1),
    "ragged": (ragged, 0.08),
    "allocate": (allocate, 0.08),
    "marginals": (marginals, 0.03),
    "tables": (tables, 0.015),
    "state files": (state_files, 0.01),
    "allocator": (allocator, 0.01),
    "run folders": (run_folders, 0.003),
    "command line": (command_line, 0.002),
}
"""Targets with their shares of the cases: the cheap ones get most."""

DOCUMENTED = (ValueError, FileNotFoundError)
WRONG_KIND = re.compile(
    r"float\(\) argument must be|too large to convert|is not iterable|setting an array element|must be real number|"
    r"not supported between instances of|unhashable type|only .*arrays can be converted|has no len"
)
"""What Python says to an argument of another kind than asked for, or to a whole number beyond the range of floats."""


def run_case(name: str, seed: int, folder: Path) -> bool:
    """Run one case; return whether it ended in a documented error. Anything else is raised."""
    try:
        with np.errstate(all="ignore"):
            TARGETS[name][0](random.Random(f"{name} {seed}"), folder)
    except DOCUMENTED:
        return True
    except (TypeError, OverflowError) as error:
        if not WRONG_KIND.search(str(error)):
            raise
        return True
    return False


def fuzz(
    cases: int, first_seed: int, folder: Path, targets: Sequence[str]
) -> tuple[dict[str, tuple[int, int, float]], dict[tuple[str, int], str]]:
    """Cases, documented errors and seconds by target; and tracebacks by (target, seed), one per kind of failure."""
    counted: dict[str, tuple[int, int, float]] = {}
    failed: dict[tuple[str, int], str] = {}
    for name in targets:
        share = TARGETS[name][1]
        refused, seen = 0, set()
        number_of_cases = max(round(cases * share), 1)
        started = time.perf_counter()
        for seed in range(first_seed, first_seed + number_of_cases):
            try:
                refused += run_case(name, seed, folder)
            except Exception as error:  # noqa: BLE001 - what it is about
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = (type(error), where.filename, where.lineno)
                if kind not in seen:
                    seen.add(kind)
                    failed[name, seed] = traceback.format_exc()
        counted[name] = number_of_cases, refused, time.perf_counter() - started
    return counted, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parsed = parser.parse_args()
    # A case that wants more is a failure, and not the end of the machine.
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    with tempfile.TemporaryDirectory() as folder:
        counted, failed = fuzz(parsed.cases, parsed.seed * 10**9, Path(folder), parsed.targets)
    for name, (number_of_cases, refused, seconds) in counted.items():
        print(f"{name:>14}: {number_of_cases:>8} cases, {refused:>8} ended in a documented error, {seconds:6.0f} s")
    print(f"{sum(row[0] for row in counted.values())} cases, {len(failed)} failures")
    CORPUS.mkdir(exist_ok=True)
    for (name, seed), trace in failed.items():
        (CORPUS / f"{name.replace(' ', '-')}-{seed}.json").write_text(json.dumps({"target": name, "seed": seed}) + "\n")
        print(f"\n{name}, seed {seed}\n{trace}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
