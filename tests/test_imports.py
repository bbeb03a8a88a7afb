"""Which parts of rsfast know of which: imports point one way, and there is no circle."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"train", "evaluate", "analyze", "figures", "experiments"}
PUBLIC = {"optim", "checkpoint"}  # other names of what is elsewhere, for users
BUILDING_BLOCKS = {"kernels", "pyramid", "models", "losses", "files", "runtime", "data", "engine"}
# What each part may import; "rsfast" is rsfast/__init__.py, the version.
MAY_IMPORT = {
    "rsfast": set(),
    "kernels": set(),
    "files": set(),
    "pyramid": {"kernels"},
    "models": {"pyramid", "kernels", "files"},
    "losses": {"kernels"},
    "runtime": {"pyramid", "kernels", "rsfast"},
    "data": {"pyramid", "kernels", "runtime", "files"},
    "deploy": {"files"},
    "engine": {"pyramid", "kernels", "data", "runtime"},
    "tasks": {"engine", "data", "kernels", "pyramid", "losses", "runtime", "files"},
    "config": BUILDING_BLOCKS,
    "training": {*BUILDING_BLOCKS, "tasks", "config"},
    "recipes": set(),
    "export": {"deploy", "files", "data", "models", "pyramid", "training", "rsfast"},
    "latency": {"deploy", "files", "figures"},
    **{
        name: {*BUILDING_BLOCKS, *COMMANDS, "tasks", "config", "training", "deploy"}
        for name in COMMANDS
    },
    **{name: {*BUILDING_BLOCKS, "training"} for name in PUBLIC},
}


def modules() -> dict[str, Path]:
    """Name as it is imported -> file."""
    found = {}
    for folder, package in (
        (ROOT / "rsfast", ["rsfast"]),
        (ROOT / "kernels", ["rsfast", "kernels"]),
    ):
        for path in folder.rglob(
            "*.py"
        ):  # links to folders, as rsfast/kernels may be, are left out
            parts = [*package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_by(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of rsfast that a file imports, wherever in it and for whatever reason."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            # `from package import module` or `from module import name`.
            names = [
                full if (full := f"{node.module}.{alias.name}") in known else str(node.module)
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        for imported in names:
            if imported.split(".")[0] == "rsfast" and imported != "rsfast._C":
                assert imported in known, f"{name} imports {imported}, which is not there"
                yield imported


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported_by(name, path, known)) for name, path in known.items()}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_module_is_seen() -> None:
    seen = {part_of(name) for name in modules()}
    assert seen == set(MAY_IMPORT)
    assert "rsfast.data.dali" in graph()["rsfast.data.loader"], "those within functions, too"
    assert "rsfast.kernels.conv2d.op" in graph()["rsfast.runtime.nvtx"], "and those by name"
    assert "rsfast.kernels.common.levels" in graph()["rsfast.kernels.conv2d.op"]


def test_no_module_imports_itself_through_others() -> None:
    try:
        list(graphlib.TopologicalSorter(graph()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_one_way(part: str) -> None:
    allowed = {part, *MAY_IMPORT[part]}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        if part_of(name) == part
        for other in others
        if part_of(other) not in allowed
    ]
    assert not wrong
