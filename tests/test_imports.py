"""The direction of imports stated in AGENTS.md, read from the source without importing it."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "knapsack_rl"
NAME = "knapsack_rl"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
EXPERIMENTS = {f"experiments.{path.stem}": path for path in sorted((ROOT / "experiments").glob("*.py"))}
ALL = FILES | EXPERIMENTS


def statements(tree: ast.AST, *, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements; those inside functions only if ``lazy``, those for type checkers never."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from statements(ast.Module([other], []), lazy=lazy)
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(node, lazy=lazy)


@functools.cache
def imported(module: str, *, lazy: bool) -> frozenset[str]:
    """What a module imports: modules of the project by their full name, others by their first name."""
    found: set[str] = set()
    for node in statements(ast.parse(ALL[module].read_text(encoding="utf-8")), lazy=lazy):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}: relative import"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            source = str(node.module)
            # `from package import module` names the module; of a name inside a module, the module counts.
            names = [f"{source}.{alias.name}" if f"{source}.{alias.name}" in ALL else source for alias in node.names]
        found.update(name if name in ALL or name.split(".")[0] == NAME else name.split(".")[0] for name in names)
    return frozenset(found)


def reach(module: str, *, lazy: bool) -> set[str]:
    """Everything that importing a module (``lazy``: and calling all of it) may import, itself included."""
    seen, waiting = {module}, [module]
    while waiting:
        current = waiting.pop()
        if current in FILES:
            # Importing a.b.c also runs a and a.b, but for the package itself, whose __init__ names everything.
            parents = {current.rsplit(".", 1)[0]} - {NAME}
            new = (imported(current, lazy=lazy) | parents) - seen - {NAME}
            seen |= new
            waiting += new
    return seen


def of_part(name: str) -> set[str]:
    """A module and what lies below it, but not what stands above both (a package's pages of another floor)."""
    return {module for module in FILES if module == f"{NAME}.{name}" or module.startswith(f"{NAME}.{name}.")}


def chains() -> list[list[set[str]]]:
    """The arrows of AGENTS.md: each chain as parts, each part as the names of modules in it."""
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    section = text.split("## Direction of imports")[1].split("## ")[0]
    found = []
    for sentence in re.split(r"[;.]\s", section.replace("\n", " ")):
        if "→" in sentence:
            parts = [set(re.findall(r"\w+", part)) for part in sentence.split("→")]
            found.append([{name for name in part if of_part(name)} for part in parts])
    return found


def arrows() -> list[tuple[str, str]]:
    """(lower, upper) pairs of names: the lower one must not import the upper one."""
    pairs = []
    for chain in chains():
        for at, part in enumerate(chain):
            pairs += [(lower, upper) for upper_part in chain[at + 1 :] for lower in part for upper in upper_part]
    return sorted(set(pairs))


def test_the_arrows_are_read():
    assert len(arrows()) > 100
    assert {("allocation", "session"), ("estimation", "allocator"), ("session", "verl"), ("trl", "cli")} <= set(
        arrows()
    )


# A completion script is one of all commands; AGENTS.md says so.
EXCEPTIONS = {("knapsack_rl.cli.completion", "knapsack_rl.cli")}


def test_nothing_points_back():
    for lower, upper in arrows():
        for module in of_part(lower):
            back = {name for name in reach(module, lazy=True) & of_part(upper) if (module, name) not in EXCEPTIONS}
            assert not back, f"{module} imports {sorted(back)}, but AGENTS.md says {lower} → {upper}"


def test_the_exceptions_are_needed():
    assert all(back in imported(module, lazy=True) for module, back in EXCEPTIONS)


def without_ends(graph):
    """What is left of a graph once everything that leads nowhere is gone, again and again: its circles."""
    graph = dict(graph)
    while ends := [name for name, below in graph.items() if not below & set(graph)]:
        for name in ends:
            del graph[name]
    return graph


def test_there_is_no_circle_of_modules_or_of_rooms():
    modules = {
        module: {name for name in imported(module, lazy=True) & set(FILES) - {NAME} if (module, name) not in EXCEPTIONS}
        for module in FILES
    }
    assert not without_ends(modules)
    rooms: dict[str, set[str]] = {}
    for module, below in modules.items():
        if module != NAME:
            room = module.split(".")[1]
            rooms.setdefault(room, set()).update({name.split(".")[1] for name in below} - {room})
    assert not without_ends(rooms)
    experiments = {module: set(imported(module, lazy=True) & EXPERIMENTS.keys()) for module in EXPERIMENTS}
    assert experiments["experiments.__main__"] and not without_ends(experiments)
    assert without_ends({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_data_files_are_read_by_their_own_room_only():
    rooms = {path.relative_to(PACKAGE).parts[0]: path.parent.name for path in PACKAGE.rglob("*.safetensors")}
    assert rooms == {"tasks": "base_model"}
    for module, path in FILES.items():
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
        }
        for room, folder in rooms.items():
            assert module.startswith(f"{NAME}.{room}") or not any(folder in Path(s).parts for s in strings), module
        assert not any(name.split(".")[0] == "experiments" for name in imported(module, lazy=True)), module
        assert not any("fitted_value" in s or s.startswith("experiments/") for s in strings), module


def test_importing_the_package_needs_numpy_alone():
    """Modules that the public names come from, with everything they import when loaded."""
    names: set[str] = set()
    for module in imported(NAME, lazy=False) & set(FILES):
        names |= reach(module, lazy=False)
    outside = {name for name in names if name not in FILES} - set(sys.stdlib_module_names)
    assert outside == {"numpy"}


def test_pages_of_runs_need_no_training_library():
    below = reach(f"{NAME}.report", lazy=True) - set(sys.stdlib_module_names)
    assert {name for name in below if name not in FILES} <= {"numpy", "yaml", "matplotlib", "pyarrow"}
    assert not below & of_part("trl") and not below & of_part("training") and not below & of_part("cli")


@pytest.mark.parametrize("module", ["cli", "cli.train", "training.checks", "training.compare"])
def test_commands_load_no_training_library(module):
    """Common mistakes are reported before these are loaded, which takes many seconds."""
    below = reach(f"{NAME}.{module}", lazy=False)
    assert not below & {"torch", "transformers", "datasets", "trl", "huggingface_hub", "matplotlib", "pyarrow"}
    assert not below & (of_part("trl") | {f"{NAME}.training.run", f"{NAME}.training.models"})


def test_every_room_is_on_the_map():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8").split("## Direction of imports")[0]
    named = {name.rstrip("/") for name in re.findall(r"`([\w/]+)`", text)}
    assert {module.split(".")[1] for module in FILES if module != NAME} - {"__main__"} <= named
