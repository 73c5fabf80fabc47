"""The documentation is right: its code runs, its output is real, its links resolve, and it is complete."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import tomllib
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import knapsack_rl as kr
from knapsack_rl.allocator import ALLOCATION_FAILURES
from knapsack_rl.cli import build_parser, main
from knapsack_rl.metrics import CORE, LOST_GROUPS, OCCASIONAL, PARTS
from knapsack_rl.runs.allocations import PER_PROMPT
from knapsack_rl.training.settings import TrainSettings
from knapsack_rl.verl.launch import VerlSettings

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
PAGES += [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md") if (ROOT / name).exists()
]

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
NOT_RUN = "# not run: "
HEAVY = ("knapsack_rl.trl", "transformers", "datasets", "torch")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


@dataclasses.dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = TITLE.search(match[2])
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[1], title and title[1], match[3]))
    return found


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def run(block: Block, space: dict[str, object]) -> None:
    # Blank lines in front make the line numbers of errors those of the page.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
    if not block.text.startswith(NOT_RUN):
        exec(code, space)


PAGES_WITH_CODE = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    code = [block for block in blocks(page) if block.language == "python"]
    if any(word in block.text for block in code for word in HEAVY):
        torch = pytest.importorskip("torch")
        pytest.importorskip("trl")
        torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": f"docs_{page.stem}"}
    for block in code:
        run(block, space)


def test_most_pages_have_code():
    assert {"README", "index", "quickstart", "method", "metrics", "engines"} <= {page.stem for page in PAGES_WITH_CODE}


def test_a_block_that_is_not_run_says_why():
    for page in PAGES_WITH_CODE:
        for block in blocks(page):
            if block.text.startswith(NOT_RUN):
                assert re.match(r"# not run: needs \w+", block.text), str(block)


def examples() -> list[tuple[Block, str, str]]:
    """(block, command, expected output) of every ``$ knapsack-rl`` in the documentation."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "console":
                for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                    command, _, output = part.partition("\n")
                    if command.startswith("knapsack-rl "):
                        found.append((block, command, output))
    return found


# A line that only a slow machine prints.
PROGRESS = re.compile(r"^\d+/\d+, about .* left: .*\n", re.MULTILINE)


def same_output(given: str, expected: str) -> bool:
    """Equal but for the last digits of decimal fractions."""
    if NUMBER.sub("#", given) != NUMBER.sub("#", expected):
        return False
    pairs = zip(NUMBER.findall(given), NUMBER.findall(expected), strict=True)
    return all(np.isclose(float(a), float(b), rtol=1e-9) for a, b in pairs)


@pytest.mark.parametrize(
    ("block", "command", "expected"), [pytest.param(*example, id=example[1]) for example in examples()]
)
def test_commands_print_what_the_page_shows(block, command, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for other in blocks(block.page):
        if other.title:
            Path(other.title).write_text(other.text, encoding="utf-8")
        if other.language == "python" and other.title:
            run(other, {})  # it makes the files that the command reads
    main(shlex.split(command)[1:])
    captured = capsys.readouterr()
    shown = captured.out + PROGRESS.sub("", captured.err)
    assert same_output(shown, expected), shown


def test_the_documentation_shows_commands():
    assert len(examples()) >= 3


def anchors(page: Path) -> set[str]:
    """Ids of the page's headings, as the ``toc`` extension makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
        plain = re.sub(r"[^\w\s-]", "", plain).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", plain))
    return found


def test_links_between_pages_resolve():
    for page, target in [(source, target) for source in PAGES for target in LINK.findall(prose(source))]:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name}: {target}"


def test_tests_named_on_a_page_exist():
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    everywhere = "".join(files.values())
    named = re.compile(r"`(?:tests/)?(test_\w+\.py)?(?:::)?(test_\w+)?`")
    for page in PAGES:
        for file, name in named.findall(prose(page)):
            assert not file or file in files, f"{page.name}: {file}"
            assert not name or f"def {name}(" in files.get(file, everywhere), f"{page.name}: {file} {name}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page.name


def reference() -> list[str]:
    return re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_public_names_are_in_the_reference():
    assert {f"knapsack_rl.{name}" for name in kr.__all__} - set(reference()) == set()


def members() -> set[str]:
    """Full names of everything that the reference shows, members of modules included."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: ([\w.]+)\n(?:    options:\n      members: \[([\w, ]+)\])?", text, re.MULTILINE)
    return {f"{module}.{name}" for module, names in listed for name in names.split(", ")} | set(reference())


def exported(path: Path) -> list[str]:
    """The names of a module's ``__all__``, constants (which docstrings cannot describe to a reader) left out."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.isupper()]
    return []


MODULES = [path for path in sorted((ROOT / "src" / "knapsack_rl").glob("*/__init__.py")) if exported(path)]


def test_names_exported_by_parts_are_documented():
    assert {path.parent.name for path in MODULES} >= {"trl", "report", "tasks", "verl"}
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for path in MODULES:
        module = f"knapsack_rl.{path.parent.name}"
        shown = {name.rpartition(".")[2] for name in members() if name.startswith(f"{module}.")}
        missing = set(exported(path)) - shown
        # For verl's own classes the reference only describes the changes.
        assert not [name for name in missing if module != "knapsack_rl.verl" or f"`{name}`" not in text], module


def commands() -> list[tuple[str, str]]:
    """(where, line) of every command in a block other than Python."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("sh", "text", "console"):
                lines = block.text.replace("\\\n", " ").splitlines()
                # In console blocks a line without a prompt is output.
                shown = [line.removeprefix("$ ") for line in lines if block.language != "console" or line[:2] == "$ "]
                found += [(str(block), line) for line in shown if re.match(r"(knapsack-rl|make|pip install) ", line)]
    return found


def test_commands_that_are_not_run_would_be_understood():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parser = build_parser()
    for where, line in commands():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words[0] == "knapsack-rl":
            try:
                parser.parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{where}: unknown command or flag in {line}")
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), where
        else:
            wanted = re.findall(r"knapsack-rl\[([\w,]+)\]", line)
            extras = {name for names in wanted for name in names.split(",")}
            assert extras <= set(project["optional-dependencies"]), where


def test_every_block_is_of_a_kind_that_is_checked():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "console", "sh", "text", "csv", "json"), str(block)
            assert block.language not in ("csv", "json") or block.title, (
                f"{block}: needs a title for a command to read it"
            )


def test_metrics_are_documented():
    allocator = kr.KnapsackAllocator()
    allocator.allocate(["a", "b"], 8)
    allocator.observe(["a"] * 4 + ["b"] * 4, [0, 1] * 4)
    text = prose(ROOT / "docs" / "metrics.md")
    documented = set(re.findall(r"^\| `knapsack/([^`]+)`", text, re.MULTILINE))
    of_trainer = {"rows_skipped", *(f"{part}_seconds" for part in PARTS)}
    lost = {name for name in LOST_GROUPS if "/" not in name} | {"lost_groups/CAUSE", "group_success_rate"}
    totals = {"reward_per_prompt", "process_imbalance", "failures/KIND"}
    assert documented == {*allocator.metrics()} | totals | of_trainer | lost
    listed = text.split("\n\n")[2].split("\n- ")
    always, updates, occasional = (set(re.findall(r"`([^`]+)`", part)) for part in listed[:3])
    assert always == set(CORE)
    assert updates == of_trainer - {"allocation_seconds"}
    assert occasional == set(OCCASIONAL) | {"failures/KIND"}
    (failures,) = re.findall(r"^\| `knapsack/allocation_failures` \| ([^|]+) \|", text, re.MULTILINE)
    assert tuple(re.findall(r"`([^`]+)`", failures)) == ALLOCATION_FAILURES


def test_the_allocation_log_is_documented():
    section = prose(ROOT / "docs" / "metrics.md").split("### allocations.jsonl\n")[1].split("\n### ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert documented == ["step", "prompt_ids", *PER_PROMPT, "reason", "seconds"]


def test_trainer_fields_are_documented():
    trl = pytest.importorskip("trl")
    from knapsack_rl.trl import KnapsackGRPOConfig

    stock = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    own = {field.name: field.default for field in dataclasses.fields(KnapsackGRPOConfig) if field.name not in stock}
    table = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", prose(ROOT / "docs" / "trl.md"), re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, default in table} == own


def test_settings_of_the_verl_plug_in_are_documented():
    table = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", prose(ROOT / "docs" / "verl.md"), re.MULTILINE)
    assert dict(table) == {field.name: str(field.default) or '""' for field in dataclasses.fields(VerlSettings)}


def test_the_defaults_of_a_training_run_are_documented():
    table = dict(
        re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", prose(ROOT / "docs" / "deviations.md"), re.MULTILINE)
    )
    defaults = TrainSettings()
    assert table["prompts per step × rollouts"] == f"{defaults.prompts_per_step} × {defaults.rollouts_per_prompt}"
    assert int(table["updates per step"].split()[0]) == defaults.updates
    assert int(table["steps"]) == defaults.steps
    assert float(table["learning rate"].split(",")[0]) == defaults.learning_rate
    assert table["clip range"] == f"{defaults.clip_low} / {defaults.clip_high}"
    assert table["N_low, N_up"] == f"{defaults.min_rollouts}, {defaults.max_rollouts}"
