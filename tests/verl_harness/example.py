"""The launch line of the example script, as the shell makes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "verl_qwen25_math_7b.sh"


def launch_line(folder: Path, *more: str, **environment: str) -> list[str]:
    """Run the script with a `python` that writes down its arguments, and return those for ``main_ppo``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, line in {
        "python": 'printf "%s\\n" "$@"',
        "knapsack-rl": f'exec "{sys.executable}" -m knapsack_rl "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), *more],
        env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    given = done.stdout.splitlines()
    if given[:2] != ["-m", "verl.trainer.main_ppo"]:
        raise ValueError(f"the script starts {given[:2]}")
    return given[2:]
