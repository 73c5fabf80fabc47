"""Fuzz targets: the readers of files, alone and through the command line."""

from __future__ import annotations

import gzip
import io
import json
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

import knapsack_rl as kr
from fuzz_input import mutated
from knapsack_rl import state as statefile
from knapsack_rl.cli import main as command
from knapsack_rl.offline import tables as logs
from knapsack_rl.offline.recorded import read_run
from knapsack_rl.offline.reward_logs import read_reward_log
from knapsack_rl.offline.rollouts import read_rollouts
from knapsack_rl.runs import files as runfiles
from knapsack_rl.runs.log import RunLog
from knapsack_rl.training.settings import read_yaml, settings_from

ROW = {
    "step": 1,
    "prompt_ids": ["a", 7],
    "counts": [3, 2],
    "arrived": [3, 2],
    "successes": [1, 0],
    "scored": [3, 2],
    "seconds": 0.1,
}
RUN_ROW = ROW | {"effective": [True, False], "estimate": [None, 0.5], "predicted": [0.5, 0.2], "reason": ""}
CONFIG = b"allocation: knapsack\nsteps: 2\nprompts_per_step: 2\nseed: 0\n"


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    table = pyarrow.table({"prompt_id": ["a", "a", "b"], "reward": [1.0, 0.0, 1.0], "step": [1, 1, 2]})
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


FILES = {
    "rates.csv": b"prompt_id,success_rate\na,0.5\nb,0.1\nc,\n",
    "rewards.csv": b"prompt_id,reward,step\na,1,1\na,0,1\nb,1,2\n",
    "rewards.jsonl": b'{"prompt_id": "a", "reward": 1, "step": 1}\n{"prompt_id": 7, "reward": 0.5, "step": 2}\n',
    "rewards.parquet": parquet(),
}


LOGS = FILES | {
    "rewards.json": b'{"columns": ["prompt_id", "reward", "step"], "data": [["a", true, 1], [["b"], -Infinity, 2]]}',
    "rewards.jsonl.gz": gzip.compress(FILES["rewards.jsonl"] * 2),
    "rows.jsonl": json.dumps(RUN_ROW).encode() + b"\n",
}


def state_files(dice: random.Random, folder: Path) -> None:
    path = folder / "state.npz"
    if not path.exists():
        one = kr.KnapsackAllocator("beta")
        one.observe(["a", "a", 7], [1.0, 0.0, 1.0])
        one.save(path)
    content = mutated(dice, path.read_bytes())
    damaged = folder / "mutated.npz"
    damaged.write_bytes(content)
    try:
        header, arrays = statefile.read_state(damaged)
        twin = kr.KnapsackAllocator.load(damaged)
    finally:
        assert damaged.read_bytes() == content, "the file was changed"
    twin.load_state_dict({"header": header, "arrays": arrays})
    assert twin.tracker.prompt_ids == ["a", 7], "damage went unnoticed"
    np.testing.assert_array_equal(twin.tracker.records().rollouts, [2, 1])


def tables(dice: random.Random, folder: Path) -> None:
    name = dice.choice(list(FILES))
    (folder / name).write_bytes(mutated(dice, FILES[name]))
    columns = logs.read_columns(folder / name)
    assert len({len(values) for values in columns.values()}) <= 1
    read_reward_log(folder / name)


def reward_logs(dice: random.Random, folder: Path) -> None:
    """Each reader alone, on a file or on a folder of two numbered ones."""
    name = dice.choice(list(LOGS))
    place = folder / "log"
    place.mkdir(exist_ok=True)
    for file in place.iterdir():
        file.unlink()
    path = place / name
    if dice.random() < 0.5:
        path, suffixes = place, name.partition(".")[2]
        for number in (1, 2):
            (place / f"{number}.{suffixes}").write_bytes(mutated(dice, LOGS[name]))
    else:
        path.write_bytes(mutated(dice, LOGS[name]))
    dice.choice((read_reward_log, read_rollouts, read_run))(path)


def write_run_folder(dice: random.Random, run: Path) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_bytes(mutated(dice, CONFIG))
    rows = json.dumps(RUN_ROW).encode() + b"\n" + json.dumps(RUN_ROW | {"step": 2}).encode() + b"\n"
    (run / "allocations.jsonl").write_bytes(mutated(dice, rows))
    (run / "metrics.jsonl").write_bytes(mutated(dice, b'{"step": 1, "rollouts": 5, "reward": 0.5}\n'))


def run_folders(dice: random.Random, folder: Path) -> None:
    run = folder / "run"
    write_run_folder(dice, run)
    runfiles.read_rows(run / "metrics.jsonl")
    dice.choice((RunLog.load, read_reward_log))(run)


def settings_files(dice: random.Random, folder: Path) -> None:
    path = folder / "settings.yaml"
    path.write_bytes(mutated(dice, CONFIG))
    settings_from(read_yaml(path), "settings")


def command_line(dice: random.Random, folder: Path) -> None:
    """Commands end with a status, never with a traceback."""
    name = dice.choice(list(FILES))
    (folder / name).write_bytes(mutated(dice, FILES[name]))
    kind = dice.random()  # the page of a report takes a second
    if kind < 0.8:
        arguments = ["allocate", str(folder / name)]
        arguments += dice.choice(([], ["--budget", str(dice.randrange(-2, 40))]))
        arguments += dice.choice(
            ([], ["--min-rollouts", str(dice.randrange(4))], ["--estimator", "beta"], ["--format", "json"])
        )
    elif kind < 0.85:
        arguments = ["replay", str(folder / name), "--seeds", "1", "--no-page", "--json", "--quiet"]
    elif kind < 0.855:
        write_run_folder(dice, folder / "run")
        arguments = ["report", str(folder / "run")]
    else:
        (folder / "settings.yaml").write_bytes(mutated(dice, CONFIG))
        arguments = ["train", "--config", str(folder / "settings.yaml"), "--print-config"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        status = command(arguments)
    assert status in (0, 2), (arguments, status)
