"""Success rates of prompts in an earlier run: a feature of the same prompts in the next one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from knapsack_rl.allocation.checks import as_float64
from knapsack_rl.estimation.tracker import Tracker
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.reward_logs import read_reward_log
from knapsack_rl.state import check_header, read_state, section


def earlier_rates(path: str | Path) -> dict[PromptId, float]:
    """Return the success rate of each prompt in an earlier run, (successes + 1/2) / (rollouts + 1).

    What the rate is worth for the present run is learned, so a run of another model does no harm.

    Args:
        path: a run folder or a reward log, as for ``knapsack-rl replay``, of which all steps count; or a saved state of
            an allocator (``.npz``), of which the newest visits count most.

    Raises:
        OSError: there is no such file or folder.
        ValueError: it holds no readable log or state.
        ImportError: parquet needs pyarrow.
    """
    if Path(path).suffix == ".npz":
        header, arrays = read_state(path)
        check_header(header)
        tracker = Tracker(arrays["tracker.evidence"].shape[1] if "tracker.evidence" in arrays else 0)
        tracker.load_state_dict(section(arrays, "tracker."))
        records = tracker.records()
        ids, good, total = tracker.prompt_ids, records.successes, records.successes + records.failures
    else:
        log = read_reward_log(path)
        ids = list(log.prompt_ids)
        good, total = (as_float64(np.bincount(log.prompt, part))[0] for part in (log.successes, log.totals))
    return dict(zip(ids, ((good + 0.5) / (total + 1.0)).tolist(), strict=True))
