"""The package as a user installs it: built, put into an empty environment, and tried there."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from knapsack_rl.cli import COMMANDS, main
from run_folders import write_run

ROOT = Path(__file__).parent.parent
SHIPPED = ("py.typed", "tasks/base_model/model.safetensors")


def call(*command, ok=True, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)
    assert (done.returncode == 0) is ok, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist) of the sources, built from a copy."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sources")
    copied = ("src", "pyproject.toml", "README.md", "LICENSE")
    for name in copied:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder / name)
    call(sys.executable, "-m", "build", "--outdir", "dist", cwd=folder)
    (wheel,), (sdist,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The scripts folder of an environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    # A PYTHONPATH that leads to the sources would have pip find the package installed already.
    call(folder / "bin" / "pip", "install", "--disable-pip-version-check", str(built[0]), **clean(folder))
    return folder / "bin"


def clean(folder):
    """An environment in which nothing leads back to the sources."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {"env": kept, "cwd": folder}


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_a_user_needs(built):
    wheel, sdist = built
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "knapsack_rl").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert sources <= names
        assert {f"knapsack_rl/{name}" for name in SHIPPED} <= names
        assert not [name for name in names if re.match(r"tests|experiments|benchmarks", name) or "__pycache__" in name]
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        assert any(name.endswith("licenses/LICENSE") for name in names)
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert required == ["numpy"]
    assert "Requires-Python: >=3.11" in metadata
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/knapsack_rl/py.typed"} <= members


@pytest.mark.slow
def test_nothing_but_numpy_is_installed(installed, tmp_path):
    listed = call(installed / "pip", "list", "--format", "freeze", "--disable-pip-version-check", **clean(tmp_path))
    names = {line.partition("==")[0].partition(" @")[0].lower() for line in listed.splitlines() if line}
    assert names - {"pip", "setuptools"} == {"knapsack-rl", "numpy"}


@pytest.mark.slow
def test_the_command_line_works_without_extras(installed, tmp_path):
    script = installed / "knapsack-rl"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call(script, "--version", **clean(tmp_path)).strip() == f"knapsack-rl {version}"
    assert "allocate" in call(script, "--help", **clean(tmp_path))
    for command in COMMANDS:
        assert "examples:" in call(
            script, command.__name__.rpartition(".")[2].replace("_", "-"), "--help", **clean(tmp_path)
        )
    (tmp_path / "rates.csv").write_text("prompt_id,success_rate\na,0.5\nb,0.1\n")
    assert call(script, "allocate", "rates.csv", "--budget", "16", **clean(tmp_path)).startswith(
        "prompt_id,success_rate"
    )
    for flags, extra in (
        (["train"], "knapsack-rl[trl"),
        (["completion", "bash"], "knapsack-rl[completion]"),
        (["report", "nowhere"], None),
    ):
        output = call(script, *flags, ok=False, **clean(tmp_path))
        assert output.startswith("knapsack-rl: ") and "Traceback" not in output
        assert extra is None or f'pip install "{extra}' in output


@pytest.mark.slow
def test_the_library_allocates_and_trains_a_toy_without_torch(installed, tmp_path):
    program = (
        "import sys, knapsack_rl as kr\n"
        "a = kr.KnapsackAllocator()\n"
        "counts = a.allocate(['x', 'y'], 16).counts\n"
        "a.observe(['x'] * 8 + ['y'] * 8, [0, 1] * 8)\n"
        "assert counts.sum() == 16 and not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "from knapsack_rl.tasks.registry import load_data\n"
        "from knapsack_rl.tasks.data import DataRequest\n"
        "assert len(load_data(DataRequest(dataset='countdown', train_prompts=4, held_out_prompts=1)).train) == 4\n"
    )
    call(installed / "python", "-c", program, **clean(tmp_path))


@pytest.mark.slow
def test_a_report_needs_the_extra_for_plots_and_no_more(built, tmp_path):
    write_run(tmp_path / "run", steps=4)
    venv.create(tmp_path / "environment", with_pip=True)
    scripts = tmp_path / "environment" / "bin"
    call(scripts / "pip", "install", "--disable-pip-version-check", f"{built[0]}[plots]", **clean(tmp_path))
    assert call(scripts / "knapsack-rl", "report", "run", **clean(tmp_path)) == "report: run/report.html\n"
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


# -- Shell completion --------------------------------------------------------------------------------------------------


def test_a_completion_script_knows_commands_and_flags(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in ("knapsack-rl", "allocate", "lora", "rollouts"):
            assert word in script, shell


def test_bash_completes_commands_flags_values_and_arguments(capsys, tmp_path):
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for line, offered in (
        ("knapsack-rl all", {"allocate"}),
        ("knapsack-rl allocate --rollouts-per", {"--rollouts-per-prompt"}),
        ("knapsack-rl train --estimator ba", {"bayes-filter"}),
        ("knapsack-rl completion ", {"bash", "zsh", "fish"}),
    ):
        *before, last = line.split(" ")
        # The function that bash would call is the one that the script registers for the command.
        ask = (
            "source ./script; set -- $(complete -p knapsack-rl); "
            f"COMP_WORDS=({' '.join(before)} '{last}'); COMP_CWORD={len(before)}; "
            '"${@: -2:1}"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        assert set(call(bash, "-c", ask, cwd=tmp_path).split()) == offered, line


def test_without_shtab_the_error_gives_the_install_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert 'pip install "knapsack-rl[completion]"' in capsys.readouterr().err


def test_the_oldest_versions_are_those_that_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lines = sum((extras[name] for name in ("plots", "data", "math", "completion")), project["project"]["dependencies"])
    declared = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)\.\*", (ROOT / "constraints-minimal.txt").read_text(), re.MULTILINE))
    for name, oldest in declared.items():
        assert pinned[name] == oldest
