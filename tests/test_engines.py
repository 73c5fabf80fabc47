"""The recipes of docs/engines.md against the released engines: ``make test-engines``. Absent engines are skipped."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import pickle
import re
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
    code += [block.text for block in page if re.match(rf"# not run: needs {engine}\b", block.text)]
    assert len(code) > 1
    space: dict[str, Any] = {"__name__": f"recipe_{engine}", "kr": kr, "np": np}
    exec(compile(code[0], "engines.md", "exec", dont_inherit=True), space)
    space |= {name: value(space) for name, value in known.items()}
    for text in code[1:]:
        exec(compile(text, "engines.md", "exec", dont_inherit=True), space)
    return SimpleNamespace(**space)


def planner_of(space: dict[str, Any], folder: Path, rounds: int = 1) -> Any:
    settings = kr.AllocationSettings(max_rollouts=32, rounds=rounds)
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


@pytest.fixture
def tinker_rounds(tmp_path):
    """Run batches of tinker-cookbook in two rounds; ``broken`` holds what fails, as a prompt and a round."""
    pytest.importorskip("tinker_cookbook")
    import tinker
    from tinker_cookbook.rl.problem_env import ProblemGroupBuilder
    from tinker_cookbook.rl.rollouts import do_group_rollout_and_filter_constant_reward
    from tinker_cookbook.rl.types import Env, RLDataset, StepResult

    page = recipe("tinker_cookbook")
    run = SimpleNamespace(page=page, kinds=[*RATES], broken=set(), made={}, cleaned=[], outcomes={}, order=[])
    run.planner = planner_of(vars(page), tmp_path, rounds=2)
    rng = np.random.default_rng(0)

    class Problem(Env):
        def __init__(self, kind, part):
            self.kind, self.part = kind, part

        async def initial_observation(self):
            return tinker.ModelInput.from_ints([1]), []

        async def step(self, action, *, extra=None):
            for _ in range([*RATES].index(self.kind)):  # groups end at different times
                await asyncio.sleep(0)
            run.order.append(self.part)
            if (self.kind, self.part) in run.broken:
                raise RuntimeError("a failed rollout")
            reward = float(rng.random() < RATES[self.kind])
            run.outcomes.setdefault(self.kind, []).append(reward)
            return StepResult(reward, True, tinker.ModelInput.from_ints([]), [])

    class Builder(ProblemGroupBuilder):
        async def make_envs(self):
            sizes = run.made.setdefault(self.dataset_name, [])
            if (self.dataset_name, 0) in run.broken:
                raise RuntimeError("a sandbox that did not start")
            sizes.append(self.num_envs)
            return [Problem(self.dataset_name, len(sizes)) for _ in range(self.num_envs)]

        async def cleanup(self):
            run.cleaned.append((self.dataset_name, self.num_envs))

    class Problems(RLDataset):
        def get_batch(self, index):
            return [Builder(lambda: None, MEAN, kind) for kind in run.kinds]

        def __len__(self):
            return 1

    class Client:
        async def sample_async(self, prompt, num_samples, sampling_params, **options):
            sequence = tinker.SampledSequence("stop", "s", tokens_np=np.array([2]), logprobs_np=np.array([0.0]))
            return tinker.SampleResponse(sequences=[sequence])

        sample = sample_async

    problems = Problems()
    run.dataset = page.TwoRoundDataset(problems, run.planner, lambda builder: builder.dataset_name)

    def batch(strategy, dataset=run.dataset):
        """Run a batch as the cookbook's training does; a group that fails is None or its error."""
        run.made, run.outcomes, run.cleaned, run.order = {}, {}, [], []
        builders = dataset.get_batch(0)

        async def everything():
            groups = (
                do_group_rollout_and_filter_constant_reward(Client(), builder, 4, 1.0, False, strategy=strategy)
                for builder in builders
            )
            return await asyncio.wait_for(asyncio.gather(*groups, return_exceptions=True), 60)

        return asyncio.run(everything())

    run.batch, run.plain = batch, problems
    return run


def test_tinker_cookbook_divides_a_step_in_two_rounds(tinker_rounds, tmp_path):
    """The planned sizes are those of a session that is told the same outcomes."""
    run, strategy = tinker_rounds, tinker_rounds.page.TwoRounds()
    other, batches = kr.Session(kr.AllocationSettings(max_rollouts=32, rounds=2)), 10
    for step in range(batches):
        groups = run.batch(strategy)
        first = other.plan_first([*RATES], MEAN)
        assert first.counts.tolist() == [MEAN // 2] * len(RATES)
        early = [reward for kind in RATES for reward in run.outcomes[kind][: MEAN // 2]]
        whole = other.plan_rest(first, MEAN * len(RATES), first.expand(), early)
        other.observe(whole, whole.expand(), [reward for kind in RATES for reward in run.outcomes[kind]], step=step)

        wanted = [[MEAN // 2, n - MEAN // 2] if n > MEAN // 2 else [n] for n in whole.counts.tolist()]
        assert [run.made[kind] for kind in RATES] == wanted
        assert sorted(run.cleaned) == sorted((kind, n) for kind in RATES for n in run.made[kind])
        assert run.order == sorted(run.order)  # no second round before all of the first
        assert [sorted(group.get_total_rewards()) for group in groups] == [sorted(run.outcomes[kind]) for kind in RATES]
        assert sum(len(group.trajectories_G) for group in groups) == MEAN * len(RATES)
    run.planner.learn()
    rows = logged(tmp_path)
    assert [row["counts"] for row in rows] == [row["arrived"] for row in rows]
    assert {sum(row["counts"]) for row in rows} == {MEAN * len(RATES)} and len(rows) == batches
    assert not run.planner.session.allocator.failures


@pytest.mark.parametrize("part", [0, 1])
def test_a_group_of_tinker_cookbook_that_fails_blocks_no_other(tinker_rounds, part):
    """It fails in ``make_envs`` or in its first rollouts; the others have their own rollouts."""
    from tinker_cookbook.rl.rollout_strategy import MinViableGroup

    run = tinker_rounds
    for failing in ("always", "never"):  # the first and the last to end
        run.broken = {(failing, part), (failing, part + 1)}  # a retry makes environments again
        for strategy in (run.page.TwoRounds(), run.page.TwoRounds(MinViableGroup(max_retries=1))):
            groups = dict(zip(RATES, run.batch(strategy), strict=True))
            failed = groups.pop(failing)
            assert failed is None if strategy.catches_group_errors else isinstance(failed, RuntimeError)
            assert sum(len(group.trajectories_G) for group in groups.values()) == MEAN * 2
            assert {run.made[kind][0] for kind in groups} == {MEAN // 2}
    run.broken = {(kind, 1) for kind in RATES}
    assert all(isinstance(group, RuntimeError) for group in run.batch(run.page.TwoRounds()))
    run.broken = set()
    assert sum(len(group.trajectories_G) for group in run.batch(run.page.TwoRounds())) == MEAN * len(RATES)
    assert not run.planner.session.allocator.failures


def test_a_second_round_of_tinker_cookbook_that_fails_leaves_the_first(tinker_rounds):
    from tinker_cookbook.rl.rollout_strategy import MinViableGroup

    run = tinker_rounds
    run.broken = {(kind, part) for kind in RATES for part in (2, 3)}
    groups = run.batch(run.page.TwoRounds(MinViableGroup(max_retries=0)))
    assert [len(group.trajectories_G) for group in groups] == [MEAN // 2] * 3
    assert all(len(group.rollout_errors) == len(run.made[kind]) - 1 for kind, group in zip(RATES, groups, strict=True))
    assert max(map(len, run.made.values())) == 2
    assert any(isinstance(group, RuntimeError) for group in run.batch(run.page.TwoRounds()))


def test_two_rounds_of_tinker_cookbook_keep_the_budget_of_repeated_prompts_and_leave_evaluation_alone(tinker_rounds):
    run, strategy = tinker_rounds, tinker_rounds.page.TwoRounds()
    run.kinds = ["never", "half", "never", "always", "half", "never"]
    for _ in range(3):
        sizes = [len(group.trajectories_G) for group in run.batch(strategy)]
        assert sum(sizes) == MEAN * len(run.kinds) and min(sizes) >= MEAN // 2
    assert {len(group.trajectories_G) for group in run.batch(strategy, run.plain)} == {MEAN}


def test_batches_of_tinker_cookbook_that_overlap_are_refused(tinker_rounds):
    tinker_rounds.dataset.get_batch(0)
    with pytest.raises(RuntimeError, match="two rounds need synchronous training"):
        tinker_rounds.dataset.get_batch(1)


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
