"""The recipes of docs/engines.md against the released engines: ``make test-engines``. Absent engines are skipped."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import pickle
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import knapsack_rl as kr
from knapsack_rl.runs.files import ALLOCATION_LOG, read_rows
from test_docs import ROOT, blocks

RATES = {"never": 0.0, "half": 0.5, "always": 1.0}
MEAN = 8

pytestmark = pytest.mark.filterwarnings("default")  # those of the engines are not ours


def recipe(engine: str, **known: Any) -> SimpleNamespace:
    """Return the names that the page's blocks for an engine define, after the planner's."""
    page = blocks(ROOT / "docs" / "engines.md")
    (planner,) = [block.text for block in page if "class Planner" in block.text]
    code = [planner.partition("\nsession = ")[0]]
    code += [block.text for block in page if block.text.startswith(f"# not run: needs {engine}\n")]
    assert len(code) == 2
    space: dict[str, Any] = {"__name__": f"recipe_{engine}", "kr": kr, "np": np}
    exec(compile(code[0], "engines.md", "exec", dont_inherit=True), space)
    space |= {name: value(space) for name, value in known.items()}
    exec(compile(code[1], "engines.md", "exec", dont_inherit=True), space)
    return SimpleNamespace(**space)


def planner_of(space: dict[str, Any], folder: Path) -> Any:
    settings = kr.AllocationSettings(max_rollouts=32)
    return space["Planner"](kr.Session(settings, folder=folder, log_allocations=True), MEAN, folder)


def logged(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / ALLOCATION_LOG)


def test_art_trains_on_groups_of_planned_sizes_and_observes_those_it_drops(tmp_path):
    art = pytest.importorskip("art")
    from art.pipeline_trainer import PipelineTrainer

    rng, made, trained = np.random.default_rng(0), Counter(), []

    class Backend:
        """Trains nothing and counts steps."""

        async def register(self, model):
            pass

        async def _get_step(self, model):
            return len(trained)

        async def train(self, model, groups, **options):
            trained.append([(group.metadata["scenario_kind"], len(group.trajectories)) for group in groups])
            return SimpleNamespace(step=len(trained), metrics={})

    class Trainer(PipelineTrainer):
        def _validate_backend_support(self):
            """It imports ART's local backend, and with it what needs an accelerator."""

    async def rollout(model, scenario, config):
        await asyncio.sleep(0)
        made[scenario["metadata"]["kind"]] += 1
        reward = float(rng.random() < RATES[scenario["metadata"]["kind"]])
        messages = [{"role": "user", "content": "?"}]
        return art.Trajectory(messages_and_choices=messages, reward=reward, metrics={"completion_tokens": 1})

    scenarios = [{"metadata": {"kind": kind}} for kind in RATES] * 20
    page = recipe("art")
    planner = planner_of(vars(page), tmp_path)
    named = {"name", "run_name"} & {*inspect.signature(art.TrainableModel).parameters}
    folder = str(tmp_path / "art")
    model = art.TrainableModel(project="p", base_model="none", base_path=folder, **dict.fromkeys(named, "m"))
    model._backend = backend = Backend()
    arguments = page.knapsack_rollout_fn(rollout, scenarios, planner, lambda s: s["metadata"]["kind"], window=3)
    trainer = Trainer(model=model, backend=backend, config=None, num_rollout_workers=3, min_batch_size=2, **arguments)
    asyncio.run(trainer.train(handle_signals=False))
    planner.plan([*RATES])  # observes the last window

    assert {kind for batch in trained for kind, _ in batch} == {"half"}
    assert len({size for batch in trained for _, size in batch}) > 1
    assert max(size for batch in trained for _, size in batch) > MEAN
    arrived = Counter()
    for row in logged(tmp_path):
        arrived.update(dict(zip(row["prompt_ids"], row["arrived"], strict=True)))
    assert arrived == made
    assert made.total() == MEAN * len(scenarios)
    assert made["half"] > made["always"]


def test_tinker_cookbook_runs_groups_of_planned_sizes(tmp_path):
    pytest.importorskip("tinker_cookbook")
    import tinker
    from tinker_cookbook.completers import TokensWithLogprobs
    from tinker_cookbook.rl.data_processing import compute_advantages
    from tinker_cookbook.rl.dataset_utils import EpochCycledRLDataset
    from tinker_cookbook.rl.problem_env import ProblemGroupBuilder
    from tinker_cookbook.rl.rollout_strategy import MinViableGroup
    from tinker_cookbook.rl.rollouts import do_group_rollout
    from tinker_cookbook.rl.types import Env, RLDataset, StepResult

    rng, cleaned = np.random.default_rng(0), []

    class Problem(Env):
        def __init__(self, kind):
            self.kind = kind

        async def initial_observation(self):
            return tinker.ModelInput.from_ints([1]), []

        async def step(self, action, *, extra=None):
            if self.kind == "half" and rng.random() < 0.1:
                raise RuntimeError("a failed rollout")
            reward = float(rng.random() < RATES[self.kind])
            return StepResult(reward, True, tinker.ModelInput.from_ints([]), [])

    class Builder(ProblemGroupBuilder):
        async def cleanup(self):
            cleaned.append(self.dataset_name)

    class Problems(RLDataset):
        def get_batch(self, index):
            return [Builder(lambda kind=kind: Problem(kind), MEAN, kind) for kind in RATES]

        def __len__(self):
            return 1

    async def policy(observation, stop, **options):
        return TokensWithLogprobs(tokens=[2], maybe_logprobs=[0.0])

    page = recipe("tinker_cookbook")
    planner = planner_of(vars(page), tmp_path)
    dataset = EpochCycledRLDataset(page.KnapsackDataset(Problems(), planner, lambda b: b.dataset_name), num_epochs=20)
    sizes = []
    for index in range(len(dataset)):
        builders = dataset.get_batch(index)
        groups = [asyncio.run(do_group_rollout(b, policy, MinViableGroup(min_successful=1))) for b in builders]
        sizes.append([builder.builder.num_envs for builder in builders])
        for group, advantages in zip(groups, compute_advantages(groups), strict=True):
            rewards = np.array(group.get_total_rewards())
            np.testing.assert_allclose(advantages.numpy(), rewards - rewards.mean(), atol=1e-6)
        assert [builder.logging_tags() for builder in builders] == [[kind] for kind in RATES]
    planner.plan([*RATES])

    assert all(sum(row) == MEAN * len(RATES) for row in sizes)
    assert cleaned == [*RATES] * len(dataset)
    rows = logged(tmp_path)
    assert len(rows) == len(dataset)
    assert [row["counts"] for row in rows] == sizes
    short = [row["counts"][1] - row["arrived"][1] for row in rows]
    assert sum(short) > 0  # partial groups happened
    assert sizes[-1][1] > sizes[-1][2]  # an even chance gets more than the one always solved
    with pytest.raises(TypeError, match="use no rollout executor"):
        pickle.dumps(builders[0])


def conformance() -> Any:
    spec = importlib.util.spec_from_file_location("conformance_script", ROOT / "benchmarks" / "conformance.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_skyrl_accepts_the_rows_in_one_mini_batch(tmp_path, monkeypatch):
    """SkyRL's functions are cut out of its wheel, for importing them takes ray; its trainer is a stand-in."""
    wheels = list((ROOT / ".wheels").glob("skyrl-*.whl"))
    if not wheels:
        pytest.skip("no wheel of SkyRL: make test-engines fetches it")
    pytest.importorskip("torch")
    wheel = conformance().Wheel(wheels[0])
    types = {name: dataclass(wheel.define("generators/base.py", name)) for name in ("TrajectoryID", "BatchMetadata")}

    class Trainer:
        def postprocess_generator_output(self, generator_output, uids):
            return generator_output, uids

    module = SimpleNamespace(
        RayPPOTrainer=Trainer,
        prepare_generator_input=wheel.define("generators/utils.py", "prepare_generator_input", copy=copy, **types),
    )
    monkeypatch.setitem(sys.modules, "skyrl", SimpleNamespace(train=SimpleNamespace(trainer=module)))
    monkeypatch.setitem(sys.modules, "skyrl.train", SimpleNamespace(trainer=module))
    monkeypatch.setitem(sys.modules, "skyrl.train.trainer", module)
    page = recipe("skyrl", planner=lambda space: planner_of(space, tmp_path))
    boundaries = wheel.define("dataset/preprocess.py", "compute_prompt_mini_batch_boundaries")

    rng = np.random.default_rng(0)
    prompts = [{"prompt": kind, "env_class": None, "env_extras": {}, "uid": kind} for kind in RATES]
    for _ in range(10):
        given, uids = module.prepare_generator_input(prompts, MEAN, {}, "env", "train", 1)
        assert given["prompts"] == uids
        assert len({(t.instance_id, t.repetition_id) for t in given["trajectory_ids"]}) == len(uids) == MEAN * 3
        assert boundaries(uids, 3, 3, False, MEAN) == [(0, MEAN * 3)]
        rewards = [[0.0, float(rng.random() < RATES[uid])] for uid in uids]
        page.KnapsackTrainer().postprocess_generator_output({"rewards": rewards}, uids)
    sizes = Counter(uids)
    assert sizes["half"] > sizes["always"]
    with pytest.raises(AssertionError):
        boundaries(uids, 1, 3, False, MEAN)  # the page says so
    assert [sum(row["counts"]) for row in logged(tmp_path)] == [MEAN * 3] * 9
