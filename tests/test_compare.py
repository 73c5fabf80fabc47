import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from knapsack_rl.cli import main
from knapsack_rl.report import RunLog
from knapsack_rl.training import compare
from knapsack_rl.training.compare import POLICIES, Run, execute, plan
from knapsack_rl.training.settings import TrainSettings, read_yaml, settings_from

SMALL = TrainSettings(
    **{"prompts_per_step": 4, "rollouts_per_prompt": 2, "train_prompts": 4, "held_out_prompts": 2, "steps": 2},
    **{"eval_every": 0, "eval_samples": 1, "save_every": 0},
)


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch):
    monkeypatch.setattr(compare, "POLL_SECONDS", 0.02)


class Noted:
    """Notes the progress of a comparison."""

    def __init__(self):
        self.events, self.most = [], 0

    def started(self, run):
        self.events.append(("started", run.settings.label))

    def advanced(self, running):
        self.most = max(self.most, len(running))

    def ended(self, run, status):
        self.events.append(("ended", run.settings.label, status))


# -- Plan --------------------------------------------------------------------------------------------------------------


def test_the_plan_has_every_policy_with_every_seed(tmp_path):
    runs = plan(SMALL, POLICIES, [3, 1], tmp_path)
    assert [run.settings.label for run in runs] == [
        *("uniform-n4-seed3", "uniform-mean-n4-seed3", "uniform-n8-seed3", "paper-n4-seed3", "knapsack-n2-seed3"),
        *("uniform-n4-seed1", "uniform-mean-n4-seed1", "uniform-n8-seed1", "paper-n4-seed1", "knapsack-n2-seed1"),
    ]
    assert [run.folder for run in runs] == [tmp_path / run.settings.label for run in runs]
    assert not list(tmp_path.iterdir())


def test_runs_differ_in_policy_size_and_seed_only(tmp_path):
    varied = ("allocation", "rollouts_per_prompt", "prompts_per_step", "seed", "advantage")
    for run in plan(dataclasses.replace(SMALL, threads=4), POLICIES, [0, 1], tmp_path):
        shared = dataclasses.replace(run.settings, **{name: getattr(SMALL, name) for name in varied})
        assert shared == dataclasses.replace(SMALL, threads=1)


@pytest.mark.parametrize(("rollouts", "n"), [(None, 4), (2, 2), (4, 4), (8, 8)])
def test_all_policies_but_uniform_2n_generate_as_many_rollouts_a_step(tmp_path, rollouts, n):
    for run in plan(SMALL, POLICIES, [0], tmp_path, rollouts):
        twice = run.settings.label.startswith(f"uniform-n{2 * n}-")
        assert run.settings.budget == SMALL.budget * (2 if twice else 1)
        own = run.settings.allocation == "knapsack"
        assert run.settings.prompts_per_step == (SMALL.prompts_per_step if own else SMALL.budget // n)


@pytest.mark.parametrize("rollouts", [0, 1, 3, 16, -2])
def test_rollouts_that_do_not_divide_a_step_are_refused(tmp_path, rollouts):
    with pytest.raises(ValueError, match=f"divide the 8 rollouts of a step, got {rollouts}; set --other-rollouts"):
        plan(SMALL, POLICIES, [0], tmp_path, rollouts)


def test_twice_the_rollouts_are_uniform_with_a_doubled_budget(tmp_path):
    (run,) = plan(SMALL, ["uniform-2n"], [0], tmp_path)
    sizes = {"prompts_per_step": 2, "rollouts_per_prompt": 8}
    grpo = dataclasses.replace(SMALL, allocation="uniform", threads=1, advantage="group-std", **sizes)
    assert run.settings == grpo
    assert run.settings.budget == 2 * SMALL.budget


def test_only_the_knapsack_and_uniform_mean_have_the_shared_advantage(tmp_path):
    shared = dataclasses.replace(SMALL, value="power-1-1")
    found = {run.settings.label: run.settings for run in plan(shared, POLICIES, [0], tmp_path)}
    over_mean = {label for label, settings in found.items() if settings.chosen_advantage == "posterior-mean"}
    assert over_mean == {"uniform-mean-n4-seed0", "knapsack-n2-seed0"}
    assert {found[label].feature_columns for label in over_mean} == {shared.feature_columns}
    for advantage in ("group-mean", "group-std"):
        named = dataclasses.replace(shared, advantage=advantage)
        (run,) = plan(named, ["uniform-mean"], [0], tmp_path)
        assert run.settings.chosen_advantage == "group-mean"
    assert [label for label, settings in found.items() if settings.value == "power-1-1"] == ["knapsack-n2-seed0"]


def test_knowledge_is_shared_where_the_advantage_or_the_allocation_goes_by_it(tmp_path):
    """The paper's window cannot, and would refuse the settings."""
    shared = dataclasses.replace(SMALL, feature_columns="digits", prior="earlier.jsonl")
    for policy in POLICIES:
        (run,) = plan(shared, [policy], [0], tmp_path)
        uses = policy in ("knapsack", "uniform-mean")
        assert run.settings.columns == (["digits"] if uses else [])
        assert run.settings.prior == ("earlier.jsonl" if uses else "")


def test_the_order_of_policies_is_that_given(tmp_path):
    runs = plan(SMALL, ["knapsack", "uniform"], [0], tmp_path)
    assert [run.settings.allocation for run in runs] == ["knapsack", "uniform"]


def test_only_the_knapsack_has_two_rounds(tmp_path):
    runs = plan(dataclasses.replace(SMALL, rounds=2, rollouts_per_prompt=4), POLICIES, [0], tmp_path)
    assert {run.settings.allocation: run.settings.rounds for run in runs} == {"uniform": 1, "paper": 1, "knapsack": 2}


@pytest.mark.parametrize(
    ("policies", "seeds"),
    [
        (["uniform", "grpo"], [0]),
        (["paper-2n"], [0]),
        (["uniform", "uniform"], [0]),
        (["uniform"], [0, 1, 0]),
        ([], [0]),
        (["uniform"], []),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(tmp_path, policies, seeds):
    with pytest.raises(
        ValueError, match="distinct policies from uniform, uniform-mean, uniform-2n, paper, knapsack and distinct"
    ):
        plan(SMALL, policies, seeds, tmp_path)


def test_a_plan_checks_the_settings_of_its_runs(tmp_path):
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        plan(SMALL, ["uniform"], [-1], tmp_path)
    with pytest.raises(ValueError, match="max_rollouts"):
        plan(dataclasses.replace(SMALL, max_rollouts=3), ["uniform", "uniform-2n"], [0], tmp_path)


# -- State of a run ----------------------------------------------------------------------------------------------------


def test_steps_done_are_those_of_the_newest_whole_line(tmp_path):
    run = Run(SMALL, tmp_path / "run")
    assert run.steps_done == 0
    run.folder.mkdir()
    metrics = run.folder / "metrics.jsonl"
    for text, steps in [
        ("", 0),
        ('{"step": 0, "held_out/accuracy": 0.5}\n', 0),
        ('{"step": 0}\n{"step": 1, "loss": 0.1}\n', 1),
        ('{"step": 1}\n{"step": 2}\n{"step": 3, "los', 2),
        ('{"st', 0),
    ]:
        metrics.write_text(text)
        assert run.steps_done == steps


def test_a_run_is_finished_once_its_model_is_there(tmp_path):
    run = Run(SMALL, tmp_path)
    assert not run.finished
    (tmp_path / "model").mkdir()
    assert run.finished


# -- Processes, without training ---------------------------------------------------------------------------------------


class Training:
    """In place of a process: ends at the third look, with a model in the run's folder unless it fails."""

    failing = ()

    def __init__(self, command, stdout, stderr, env):
        words = [str(word) for word in command]
        self.command, self.environment = words, env
        self.folder = Path(words[words.index("--resume" if "--resume" in words else "--output") + 1])
        self.looks = 0
        self.returncode = None
        stdout.write(b"said\n")
        Training.made.append(self)

    def poll(self):
        self.looks += 1
        if self.looks == 3:
            self.returncode = 2 if self.folder.name in self.failing else 0
            if not self.returncode:
                (self.folder / "model").mkdir()
        return self.returncode

    def wait(self):
        self.returncode = 0

    def terminate(self):
        self.terminated = True


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(compare.subprocess, "Popen", Training)
    monkeypatch.setattr(Training, "made", [], raising=False)
    return Training.made


@pytest.mark.parametrize("jobs", [1, 2, 3, 9])
def test_no_more_processes_run_than_asked_for(tmp_path, processes, jobs):
    runs, noted = plan(SMALL, ["uniform", "knapsack"], [0, 1, 2], tmp_path), Noted()
    assert execute(runs, jobs=jobs, progress=noted) == []
    assert noted.most == min(jobs, 6)
    assert [process.folder for process in processes] == [run.folder for run in runs]
    started = [event[1] for event in noted.events if event[0] == "started"]
    assert started == [run.settings.label for run in runs]
    assert sorted(event[1:] for event in noted.events if event[0] == "ended") == sorted(
        (run.settings.label, 0) for run in runs
    )


def test_each_process_trains_its_run_with_one_thread(tmp_path, processes):
    (run,) = plan(SMALL, ["paper"], [4], tmp_path)
    execute([run], jobs=1, progress=Noted())
    config = run.folder / "config.yaml"
    assert processes[0].command == [
        *(sys.executable, "-m", "knapsack_rl", "train", "--quiet"),
        *("--config", str(config), "--output", str(run.folder)),
    ]
    assert processes[0].environment["OMP_NUM_THREADS"] == "1"
    assert settings_from(read_yaml(config), "config") == run.settings
    assert run.settings.threads == 1
    assert (run.folder / "log.txt").read_text() == "said\n"


def test_an_interrupted_run_is_resumed_from_its_checkpoint(tmp_path, processes):
    (run,) = plan(SMALL, ["paper"], [0], tmp_path)
    (run.folder / "checkpoint-1").mkdir(parents=True)
    (run.folder / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (run.folder / "config.yaml").write_text(run.settings.to_yaml())
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (run.folder / "log.txt").write_text("before\n")
    execute([run], jobs=1, progress=Noted())
    assert processes[0].command[3:] == ["train", "--quiet", "--resume", str(run.folder)]
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (run.folder / "log.txt").read_text() == "before\nsaid\n"


def test_what_was_left_without_a_whole_checkpoint_is_begun_again(tmp_path, processes):
    (run,) = plan(SMALL, ["paper"], [0], tmp_path)
    (run.folder / "checkpoint-1").mkdir(parents=True)  # its last file is missing
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (run.folder / "allocations.jsonl").write_text('{"step": 1}\n')
    execute([run], jobs=1, progress=Noted())
    assert "--resume" not in processes[0].command
    assert not (run.folder / "metrics.jsonl").exists()
    assert not (run.folder / "allocations.jsonl").exists()


def test_a_failed_run_does_not_stop_the_others(tmp_path, processes, monkeypatch):
    runs, noted = plan(SMALL, POLICIES, [0], tmp_path), Noted()
    monkeypatch.setattr(Training, "failing", ("uniform-n8-seed0",))
    assert execute(runs, jobs=2, progress=noted) == [runs[2]]
    assert ("ended", "uniform-n8-seed0", 2) in noted.events
    assert [run.finished for run in runs] == [True, True, False, True, True]


def test_an_interruption_waits_for_the_processes(tmp_path, processes):
    class Interrupting(Noted):
        def advanced(self, running):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan(SMALL, POLICIES, [0], tmp_path), jobs=3, progress=Interrupting())
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert not any(hasattr(process, "terminated") for process in processes)  # Ctrl-C has reached them already


def test_a_termination_is_passed_on_and_waits_for_the_processes(tmp_path, processes):
    class Terminating(Noted):
        def advanced(self, running):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        execute(plan(SMALL, POLICIES, [0], tmp_path), jobs=3, progress=Terminating())
    assert [(process.terminated, process.returncode) for process in processes] == [(True, 0)] * 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_with_other_settings_is_refused_before_anything_starts(tmp_path, processes):
    runs = plan(SMALL, ["uniform", "knapsack"], [0], tmp_path)
    execute(runs, jobs=2, progress=Noted())
    others = plan(dataclasses.replace(SMALL, learning_rate=1e-3), ["paper", "knapsack"], [0], tmp_path)
    with pytest.raises(ValueError, match="knapsack-n2-seed0 holds a run with other settings; choose another output"):
        execute(others, jobs=2, progress=Noted())
    assert len(processes) == 2
    assert not others[0].folder.exists()


# -- Training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(runs, progress, output) of two policies with one seed, trained side by side."""
    output, noted = tmp_path_factory.mktemp("compare"), Noted()
    runs = plan(SMALL, ["uniform", "knapsack"], [0], output)
    failed = execute(runs, jobs=2, progress=noted)
    assert failed == [], [(run.folder / "log.txt").read_text()[-2000:] for run in failed]
    return runs, noted, output


def test_a_comparison_trains_every_run(compared):
    runs, noted, _ = compared
    assert noted.most == 2
    assert sorted(event[1:] for event in noted.events if event[0] == "ended") == [
        ("knapsack-n2-seed0", 0),
        ("uniform-n4-seed0", 0),
    ]
    for run in runs:
        log = RunLog.load(run.folder)
        assert log.finished
        assert log.rollouts.tolist() == [SMALL.budget] * 2
        assert run.steps_done == 2
        assert (run.folder / "report.html").is_file()
        assert settings_from(dict(log.config), "config") == run.settings
    first = [json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0]) for run in runs]
    assert first[0]["held_out/accuracy"] == first[1]["held_out/accuracy"]  # from the same start


def test_a_finished_comparison_starts_nothing(compared, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    noted = Noted()
    assert execute(compared[0], jobs=2, progress=noted) == []
    assert noted.events == []


def arguments(output, *more):
    names = [spec.name for spec in dataclasses.fields(SMALL) if spec.name not in ("allocation", "seed", "threads")]
    flags = [
        part
        for name in names
        if getattr(SMALL, name) is not None
        for part in ("--" + name.replace("_", "-"), str(getattr(SMALL, name)))
    ]
    return ["compare", *flags, "--policies", "uniform", "knapsack", "--seeds", "0", "--output", str(output), *more]


def test_the_command_line_prints_the_comparison(compared, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    output = compared[2]
    assert main(arguments(output)) == 0
    out, err = capsys.readouterr()
    header, _, uniform, knapsack, empty, last = out.splitlines()
    assert header.startswith("| policy | seeds | rollouts generated |")
    assert uniform.startswith("| uniform N=4 | 1 | 16 |")
    assert knapsack.startswith("| knapsack N=2 | 1 | 16 |")
    assert (empty, last, err) == ("", f"report: {output / 'comparison.html'}", "")
    assert "Comparison of allocation policies" in (output / "comparison.html").read_text(encoding="utf-8")


def test_the_command_line_refuses_other_settings_and_no_jobs(compared, capsys):
    assert main(arguments(compared[2], "--learning-rate", "0.001")) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
    assert main(arguments(compared[2], "--jobs", "0")) == 2
    assert capsys.readouterr().err == "knapsack-rl: --jobs must be >= 1, got 0\n"
    assert main(arguments(compared[2], "--seeds", "0", "0")) == 2
    assert "distinct seeds" in capsys.readouterr().err


def test_a_run_that_fails_is_reported_and_leaves_its_output(tmp_path, capsys, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text('raise ImportError("torch is not for this machine")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=os.pathsep)
    output = tmp_path / "runs"
    assert main(arguments(output, "--policies", "knapsack")) == 1
    out, err = capsys.readouterr()
    log = output / "knapsack-n2-seed0" / "log.txt"
    assert out.splitlines() == [
        "started knapsack-n2-seed0 (2 steps of 8 rollouts)",
        "stopped (exit status 2) knapsack-n2-seed0",
    ]
    assert err == f"knapsack-n2-seed0 did not finish; its output is in {log}\n"
    assert "torch is not for this machine" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (output / "comparison.html").exists()
