"""Run ``check_engine`` on the advantage functions of released engines; write the table of docs/engines.md.

Usage: ``make conformance``. The newest wheel of each engine is downloaded without its dependencies and never imported:
the released source of its advantage function is cut out of the wheel and compiled as it is, without decorators, so
that torch and numpy are all it needs. An engine's line therefore judges that function, with the settings of GRPO; not
what else its trainer asserts, and not what its loss divides by.

Each column has its own group sizes, for N = 4 configured rollouts. Rows of a group are always adjacent, as engines
deliver them, so the order of rows is not part of the verdict.
"""

from __future__ import annotations
import __future__

import abc
import argparse
import ast
import collections
import datetime
import itertools
import math
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

import knapsack_rl as kr
from knapsack_rl.conformance import PROPERTIES, AdvantageFunction, ConformanceError

N = 4
BATCHES = {
    "uniform groups": [(4, 4, 4, 4)],
    "ragged groups": [(2, 6, 4, 4), (6, 2, 5, 3)],
    "a rollout missing": [(4, 4, 3, 4)],
    "a group of one": [(1, 7, 4, 4)],
}
ERROR = "error"
PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
MARKED = re.compile(r"(<!-- conformance: .* -->\n).*(<!-- end of conformance -->)", re.DOTALL)

Space = dict[str, Any]


# -- released source ---------------------------------------------------------------------------------------------------


class Wheel:
    """Source of a released wheel, compiled definition by definition."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.version = path.name.split("-")[1]

    def _body(self, file: str) -> list[ast.stmt]:
        (name,) = [name for name in self.archive.namelist() if f"/{name}".endswith(f"/{file}")]
        return ast.parse(self.archive.read(name)).body

    def _find(self, file: str, name: str) -> Any:
        node: Any = SimpleNamespace(body=self._body(file))
        for part in name.split("."):
            (node,) = [inner for inner in node.body if getattr(inner, "name", None) == part]
        return node

    def define(self, file: str, *names: str, **known: Any) -> Any:
        """Return the last of these definitions; a name with a dot is a method, as a plain function.

        Args:
            file: end of the path of the file, with at least one folder.
            names: in the order of use; earlier ones are known to later ones.
            known: further globals, beside torch and numpy.
        """
        space: Space = {"torch": torch, "np": np, **known}
        for name in names:
            node = self._find(file, name)
            node.decorator_list = []
            _run([node], file, space)
        return space[names[-1].rpartition(".")[2]]

    def statements(self, file: str, method: str, *, after: str, until: str, **known: Any) -> Callable[..., Any]:
        """Return a function that runs the statements between two others, and returns the ``advantages`` they leave.

        Args:
            file: end of the path of the file.
            method: whose statements, with its class.
            after: start of the source of the statement before the first.
            until: start of the source of the statement behind the last.
            known: globals, beside torch and numpy.
        """
        body = self._find(file, method).body
        source = [ast.unparse(node) for node in body]
        (first,) = [place for place, text in enumerate(source) if text.startswith(after)]
        last = next(place for place in range(first, len(body)) if source[place].startswith(until))
        code = compile(ast.Module(body[first + 1 : last], []), file, "exec", dont_inherit=True)

        def run(**given: Any) -> Any:
            space = {"torch": torch, "np": np, **known, **given}
            exec(code, space)
            return space["advantages"]

        return run


def _run(nodes: list[ast.stmt], file: str, space: Space) -> None:
    # Annotations stay unevaluated: they name types of packages that are not here.
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(nodes, []), file, "exec", flags=flags, dont_inherit=True), space)


def _by_group(function: Callable[[list[float]], Any]) -> AdvantageFunction:
    """Return an engine that is handed one group at a time."""

    def advantages(group_ids: Any, rewards: Any) -> Any:
        found = np.empty(rewards.shape)
        for group in np.unique(group_ids):
            found[group_ids == group] = np.asarray(function(rewards[group_ids == group].tolist()))
        return found

    return advantages


def _float(rewards: Any) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float32)


# -- the engines -------------------------------------------------------------------------------------------------------


def _trl_grpo(wheel: Wheel) -> AdvantageFunction:
    trainer = SimpleNamespace(
        num_generations=N,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        reward_weights=torch.ones(1),
    )
    step = wheel.statements(
        "trl/trainer/grpo_trainer.py",
        "GRPOTrainer._generate_and_score_completions",
        after="rewards_per_func = self._calculate_rewards",
        until="process_slice =",
        nanstd=wheel.define("trl/trainer/utils.py", "nanstd"),
    )
    return lambda _, rewards: step(self=trainer, rewards_per_func=_float(rewards)[:, None], mode="train", device="cpu")


def _trl_async(wheel: Wheel) -> AdvantageFunction:
    file = "async_grpo/async_rollout_worker.py"
    step = wheel.statements(
        file,
        "_AsyncRolloutLoop._score_group",
        after="all_rewards = [[r if",
        until="logger.info",
    )
    return _by_group(lambda rewards: step(all_rewards=[rewards]))


def _verl_grpo(wheel: Wheel) -> AdvantageFunction:
    return _by_index(
        wheel.define("ppo/core_algos.py", "compute_grpo_outcome_advantage", defaultdict=collections.defaultdict)
    )


def _skyrl_grpo(wheel: Wheel) -> AdvantageFunction:
    return _by_index(
        wheel.define("utils/ppo_utils.py", "compute_grpo_outcome_advantage", defaultdict=collections.defaultdict)
    )


def _by_index(estimator: Callable[..., Any]) -> AdvantageFunction:
    def advantages(group_ids: Any, rewards: Any) -> Any:
        scores = _float(rewards)[:, None]
        return estimator(scores, torch.ones_like(scores), np.array([str(group) for group in group_ids]))[0][:, 0]

    return advantages


def _areal_reward_norm(wheel: Wheel) -> AdvantageFunction:
    file = "areal/utils/data.py"
    settings = SimpleNamespace(
        mean_level="group", mean_leave1out=False, std_level="group", std_unbiased=True, group_size=N, eps=1e-5
    )
    norm = wheel.define(file, "Normalization", dist=torch.distributed)(settings)
    return lambda _, rewards: norm(_float(rewards))


def _openrlhf_group_norm(wheel: Wheel) -> AdvantageFunction:
    file = "ppo_utils/experience_maker.py"
    compute = wheel.define(
        file,
        "RemoteExperienceMaker.compute_advantages_and_returns",
        itertools=itertools,
        apply_length_penalties=lambda experiences, args: None,
        compute_reward=wheel.define("openrlhf/models/utils.py", "compute_reward"),
    )
    returns = wheel.define(file, "RemoteExperienceMaker.get_cumulative_returns")
    settings = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=N),
        reward=SimpleNamespace(clip_range=None),
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="group_norm", gamma=1.0)),
    )
    maker = SimpleNamespace(
        strategy=SimpleNamespace(args=settings),
        advantage_estimator="group_norm",
        kl_ctl=SimpleNamespace(value=0.0),
        get_cumulative_returns=lambda *args: returns(None, *args),
    )

    def advantages(_: Any, rewards: Any) -> Any:
        mask = torch.ones(rewards.size, 1)
        experience = SimpleNamespace(
            index=[*range(rewards.size)], rewards=_float(rewards), action_mask=mask, kl=mask * 0, info={}
        )
        return compute(maker, [experience])[0].advantages[:, 0]

    return advantages


def _swift_uniform(wheel: Wheel) -> AdvantageFunction:
    compute = wheel.define("rl_core/advantage.py", "compute_advantages")
    return lambda _, rewards: compute(_float(rewards)[:, None], torch.ones(1), N)[0]


def _swift_dynamic(wheel: Wheel) -> AdvantageFunction:
    compute = wheel.define("rl_core/advantage.py", "compute_advantages_dynamic")

    def advantages(group_ids: Any, rewards: Any) -> Any:
        requests = [str(row) for row in range(rewards.size)]
        return compute(_float(rewards)[:, None], torch.ones(1), [str(group) for group in group_ids], requests)[0]

    return advantages


def _tunix_grpo(wheel: Wheel) -> AdvantageFunction:
    compute = wheel.define("rl/algo_core.py", "compute_advantages")
    return lambda _, rewards: compute(rewards, N)


def _rlinf_grpo(wheel: Wheel) -> AdvantageFunction:
    compute = wheel.define("algorithms/advantages.py", "compute_grpo_advantages")
    return lambda _, rewards: compute(_float(rewards), torch.ones(1, rewards.size), N)[0][0]


def _oat_grpo(wheel: Wheel) -> AdvantageFunction:
    compute = wheel.define("algorithms/ppo.py", "PPOLearner.compute_monte_carlo_advantages")
    learner = SimpleNamespace(args=SimpleNamespace(num_samples=N, critic_type="grpo"))
    return lambda _, rewards: compute(learner, _float(rewards)[:, None], None)


def _trinity_grpo(wheel: Wheel) -> AdvantageFunction:
    # aggregate_metrics only averages numbers for the log.
    known: Space = {"ABC": abc.ABC, "abstractmethod": abc.abstractmethod, "ExperienceOperator": object}
    known["aggregate_metrics"] = lambda metrics, prefix: {}
    known["GroupAdvantage"] = wheel.define("advantage_fn/advantage_fn.py", "AdvantageFn", "GroupAdvantage", **known)
    known["group_by"] = wheel.define("common/experience.py", "group_by")
    grouped = wheel.define("advantage_fn/grpo_advantage.py", "GRPOGroupedAdvantage", **known)()

    def advantages(group_ids: Any, rewards: Any) -> Any:
        rows = [
            SimpleNamespace(eid=SimpleNamespace(tid=str(group)), reward=reward, action_mask=torch.ones(1), row=row)
            for row, (group, reward) in enumerate(zip(group_ids, rewards.tolist(), strict=True))
        ]
        return [row.advantages.item() for row in sorted(grouped.process(rows)[0], key=lambda row: row.row)]

    return advantages


def _cookbook(wheel: Wheel) -> AdvantageFunction:
    compute = wheel.define("rl/data_processing.py", "compute_advantages")
    return _by_group(lambda rewards: compute([SimpleNamespace(get_total_rewards=lambda: rewards)])[0])


def _art_local(wheel: Wheel) -> AdvantageFunction:
    """The generator that computes advantages and tokenises; it gets a tokeniser that hands the advantage back."""
    tokenized = wheel.define(
        "preprocessing/tokenize.py",
        "tokenize_trajectory_groups",
        math=math,
        takewhile=itertools.takewhile,
        rewards_have_zero_variance=wheel.define("utils/grpo.py", "rewards_have_zero_variance"),
        LegacyHistory=lambda **_: None,
        assemble_vllm_training_sequences=lambda *, advantage, **_: [
            SimpleNamespace(advantage=advantage, assistant_mask=[1], token_ids=[0])
        ],
    )
    known = {"messages_and_choices": [], "tools": None, "additional_histories": [], "exchanges": []}
    options = {"shuffle_group_trajectories": False, "drop_zero_advantage_trajectories": False}

    def advantages(rewards: list[float]) -> list[float]:
        group = [SimpleNamespace(reward=reward, **known) for reward in rewards]
        return [result.advantage for result in tokenized(None, [group], False, True, **options)]

    return _by_group(advantages)


def _art_tinker(wheel: Wheel) -> AdvantageFunction:
    return _by_group(wheel.define("tinker_native/data.py", "compute_advantages"))


class Engine(NamedTuple):
    """A line of the table."""

    name: str
    package: str
    function: str
    adapter: Callable[[Wheel], AdvantageFunction]


ENGINES = [
    Engine("TRL", "trl", "`GRPOTrainer`", _trl_grpo),
    Engine("TRL, asynchronous", "trl", "`AsyncRolloutWorker`", _trl_async),
    Engine("verl", "verl", "`compute_grpo_outcome_advantage`", _verl_grpo),
    Engine("SkyRL", "skyrl", "`compute_grpo_outcome_advantage`", _skyrl_grpo),
    Engine("tinker-cookbook", "tinker-cookbook", "`compute_advantages`", _cookbook),
    Engine("ART, local", "openpipe-art", "`tokenize_trajectory_groups`", _art_local),
    Engine("ART, Tinker", "openpipe-art", "`compute_advantages`", _art_tinker),
    Engine("Trinity-RFT", "trinity-rft", "`GRPOGroupedAdvantage`", _trinity_grpo),
    Engine("ms-swift, multi-turn", "ms-swift", "`compute_advantages_dynamic`", _swift_dynamic),
    Engine("ms-swift", "ms-swift", "`compute_advantages`", _swift_uniform),
    Engine("AReaL", "areal", "`Normalization`", _areal_reward_norm),
    Engine("OpenRLHF", "openrlhf", "`compute_advantages_and_returns`, `group_norm`", _openrlhf_group_norm),
    Engine("tunix", "google-tunix", "`compute_advantages`", _tunix_grpo),
    Engine("RLinf", "rlinf", "`compute_grpo_advantages`", _rlinf_grpo),
    Engine("oat", "oat-llm", "`compute_monte_carlo_advantages`", _oat_grpo),
]


# -- the verdicts ------------------------------------------------------------------------------------------------------


def verdicts(function: AdvantageFunction) -> tuple[list[str], list[str]]:
    """Return the verdict of each column, and the names of the properties that are violated without an error."""
    failures = [_failures(function, sizes=sizes) for sizes in BATCHES.values()]
    if failures[0]:
        raise RuntimeError(f"wrong for uniform groups, so the adapter does not fit this release: {failures[0]}")
    if not failures[1]:  # the usual batches also compare groups of different size
        failures[1] = _failures(function, allow=("group of one",)) & {"group size"}
    cells = ["**wrong**" if found - {ERROR} else ERROR if found else "right" for found in failures]
    return cells, [name for name in PROPERTIES if name in set().union(*failures)]


def _failures(function: AdvantageFunction, allow: tuple[str, ...] = (), **options: Any) -> set[str]:
    """Return the names of the violated properties, with ``ERROR`` for an exception."""
    try:
        kr.check_engine(function, mean_rollouts=N, allow=("row order", *allow), **options)
    except ConformanceError as error:
        raised = error.failures.get("shape", "").startswith("it raised")
        return {ERROR if name == "shape" and raised else name for name in error.failures}
    return set()


def download(package: str, folder: Path) -> Path:
    """Return the wheel of a package, the newest unless the folder has one."""
    name = package.replace("-", "_")
    if not list(folder.glob(f"{name}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--ignore-requires-python", "--dest", str(folder), package], check=True)
    return next(folder.glob(f"{name}-*.whl"))


def table(folder: Path) -> str:
    """Return the table, with the date, for wheels in a folder or downloaded to it."""
    rows = [
        f"Run on {datetime.date.today()} for N = {N}: *error* is an exception, **wrong** is silent.\n",
        f"| engine | release | advantages from | {' | '.join(BATCHES)} | violated without an error |",
        "| --- " * (4 + len(BATCHES)) + "|",
    ]
    for engine in ENGINES:
        wheel = Wheel(download(engine.package, folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deviations of groups of one
            cells, violated = verdicts(engine.adapter(wheel))
        line = [engine.name, f"`{engine.package}` {wheel.version}", engine.function, *cells, ", ".join(violated)]
        print(" | ".join(line), flush=True)
        rows.append(f"| {' | '.join(line).rstrip()} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table, and write it into the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder to download to and keep; wheels there are used as they are")
    parser.add_argument("--write", action="store_true", help="write the table into docs/engines.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = table(args.wheels or Path(folder))
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(MARKED.sub(lambda mark: f"{mark[1]}\n{found}\n\n{mark[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
