"""The optimality experiment: its oracles against each other and against loops, and that a wrong solver would show."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import catalogue, optimality, optimality_cases
from experiments.contract import Options, Row, select
from experiments.optimality_cases import CASE_VALUES, Case, draw_case
from experiments.pieces import Piece, run_pieces

TINY = optimality.Sizes(4, 3, 1, (8,), (8,), 8, 1, 64, 1)


def best_by_loops(case: Case) -> float:
    price = [1] * case.rates.size if case.costs is None else case.costs.tolist()
    found = []
    for counts in itertools.product(range(case.low, case.high + 1), repeat=case.rates.size):
        spent = sum(c * n for c, n in zip(price, counts, strict=True))
        if spent == case.budget if case.costs is None else spent <= case.budget:
            found.append(sum(case.table[i, n] for i, n in enumerate(counts)))
    return max(found)


@pytest.mark.parametrize("value", CASE_VALUES)
def test_all_methods_reach_the_best_of_a_loop_over_all_allocations(value: str) -> None:
    rng = np.random.default_rng(CASE_VALUES.index(value))
    for priced, (low, high) in itertools.product((False, True), ((0, 3), (1, 5), (2, 4))):
        case = draw_case(rng, value, 3, low, high, priced=priced)
        best = best_by_loops(case)
        found = [
            optimality_cases.solve_by_enumeration(case),
            optimality_cases.solve_by_highs(case),
            optimality_cases.solve_ours(case)[0],
        ]
        if not priced:
            found.append(optimality_cases.solve_by_paper(case))
        for counts in found:
            assert counts is not None
            assert case.feasible(counts)
            assert case.worth(counts) == pytest.approx(best, rel=1e-12, abs=1e-14)


def test_what_breaks_a_bound_or_the_budget_is_not_feasible() -> None:
    table = np.zeros((2, 5))
    plain = Case("any table", np.zeros(2), table, 5, 1, 4, None)
    assert plain.feasible(np.array([1, 4]))
    assert not plain.feasible(np.array([0, 5]))
    assert not plain.feasible(np.array([2, 2]))
    priced = Case("any table", np.zeros(2), table, 100, 1, 4, np.array([20, 40]))
    assert priced.feasible(np.array([1, 2]))
    assert not priced.feasible(np.array([2, 2]))


def test_a_solver_that_misses_the_optimum_or_the_budget_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(case: Case):
        choices = np.array(list(itertools.product(range(case.low, case.high + 1), repeat=case.rates.size)))
        price = np.ones(case.rates.size) if case.costs is None else case.costs
        spent = choices @ price
        allowed = choices[spent == case.budget] if case.costs is None else choices[spent <= case.budget]
        counts = allowed[np.argmin(case.table[np.arange(case.rates.size), allowed].sum(axis=1))]
        return counts, optimality_cases.Certificate(case.worth(counts), case.worth(counts))

    monkeypatch.setattr(optimality, "solve_ours", worst)
    rows = select(optimality.small_gaps(0, optimality.Sizes(40, 20)), method="ours")
    assert sum(row["optimal"] for row in rows) < sum(row["instances"] for row in rows)
    assert sum(row["false_certificates"] for row in rows) > 0
    assert max(row["largest_gap"] for row in rows) > 0


def test_true_rates_lose_nothing_and_other_rules_something() -> None:
    rows = optimality.rules(0, TINY)
    assert all(0.0 <= row["lost"] < 1.0 for row in rows)
    for mixture in optimality_cases.MIXTURES:
        lost = {row["rule"]: row["lost"] for row in select(rows, mixture=mixture)}
        assert lost["uniform"] == max(lost.values()) > 0


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Options]:
    options = Options(seeds=1, quick=True, workers=1, runs=tmp_path_factory.mktemp("runs"))
    reported: list[str] = []
    rows = optimality.measure(options, reported.append)
    assert len(reported) == optimality.pieces(options)
    return rows, options


def test_the_quick_version_measures_all_methods_and_its_solver_is_optimal(quick) -> None:
    rows, _ = quick
    assert json.loads(json.dumps(rows)) == rows
    gaps = select(rows, part="gaps")
    assert {row["method"] for row in gaps} == {"ours", "the paper's dynamic program", "HiGHS"}
    assert all(row["optimal"] == row["instances"] for row in select(gaps, method="ours", costs=False))
    assert all(row["false_certificates"] == 0 for row in select(gaps, method="ours"))  # with costs there may be a gap
    assert all(row["milliseconds"] > 0 for row in select(rows, part="time"))
    verdicts = [finding.verdict for finding in optimality.findings(rows)]
    assert verdicts[0] == verdicts[2] == "holds"


def test_text_and_figure_follow_the_rows(quick, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [dict(row) for row in quick[0]]
    catalogue.draw("optimality", rows, tmp_path)
    assert set(optimality.tables(rows)) == {"times", "losses"}
    assert optimality.figures(rows)("false certificates") == "0"
    broken = select(rows, part="gaps", method="ours", size="small", costs=False)[0]
    broken["optimal"] -= 1
    broken["largest_gap"] = 0.25
    assert optimality.findings(rows)[0].verdict == "does not hold"
    assert "largest gap 25.0 %" in optimality.findings(rows)[0].ours


def test_an_interrupted_experiment_goes_on_where_it_stopped(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, options = quick
    (options.runs / "optimality" / "rules-seed0-quick.jsonl").unlink()
    for part in ("small_gaps", "medium_gaps", "timed"):
        monkeypatch.setattr(optimality, part, lambda *_: pytest.fail("this piece was done before"), raising=True)
        replaced = getattr(optimality, part)
        replaced.__module__, replaced.__name__, replaced.__qualname__ = optimality.__name__, part, part
    assert optimality.measure(options, lambda _: None) == rows


def squares(upto: int) -> list[Row]:
    return [{"seed": 0, "number": k * k} for k in range(upto)]


def test_pieces_are_done_again_for_other_arguments_select(tmp_path: Path) -> None:
    reported: list[str] = []
    assert run_pieces([Piece("a", squares, (3,))], tmp_path, 1, reported.append) == squares(3)
    assert run_pieces([Piece("a", squares, (3,))], tmp_path, 1, reported.append) == squares(3)
    assert run_pieces([Piece("a", squares, (4,))], tmp_path, 1, reported.append) == squares(4)
    assert reported == ["a", "a: kept from an earlier run", "a"]


def test_pieces_side_by_side_keep_their_order(tmp_path: Path) -> None:
    pieces = [Piece(f"p{k}", squares, (k,)) for k in range(4)]
    assert run_pieces(pieces, tmp_path, 2, lambda _: None) == [row for k in range(4) for row in squares(k)]


KILLED = """
import os, time
from experiments.pieces import processes
if __name__ == "__main__":
    pool = processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it is there
        parent.kill()
        try:
            parent.communicate(timeout=60)  # the output ends with the last process that holds it
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise


def test_the_quick_version_has_two_seeds_at_most() -> None:
    assert list(Options(seeds=5, quick=True).seed_range) == [0, 1]
    assert list(Options(seeds=5).seed_range) == [0, 1, 2, 3, 4]
