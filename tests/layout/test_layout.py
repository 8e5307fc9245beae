"""The rooms of the package: who may import whom."""

import ast
import functools
import graphlib
from pathlib import Path

import revdeq_lightning

PACKAGE = Path(revdeq_lightning.__file__).parent

ROOMS = (
    *("cli", "report", "callbacks", "loggers", "runs", "distributed", "checkpoints", "tasks", "data", "metrics"),
    *("models", "equilibrium"),
)
"""A room may import those behind it. Files outside of rooms (`errors.py`, the package itself) are open to all."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str, path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that this one imports, also within functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {m if (m := f"{base}.{alias.name}") in modules else base for alias in node.names}
    return found & modules - {name}


@functools.cache
def imports() -> dict[str, set[str]]:
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: imported(name, path, set(paths)) for name, path in paths.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_folder_is_a_room_of_the_table():
    folders = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert folders == set(ROOMS)


def test_rooms_import_only_those_behind_them():
    up = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if room(name) in ROOMS and room(other) in ROOMS and ROOMS.index(room(other)) < ROOMS.index(room(name))
    ]
    assert not up, up


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(imports()).prepare()  # raises CycleError


def test_what_watches_and_records_knows_no_model():
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if room(name) in ("callbacks", "loggers", "runs", "checkpoints") and room(other) == "models"
    ]
    assert not wrong, wrong


def test_the_walk_sees_imports():
    graph = imports()
    assert "revdeq_lightning.equilibrium.solution" in graph["revdeq_lightning.equilibrium.layer"]  # relative
    assert "revdeq_lightning.models.transformer" in graph["revdeq_lightning.models.generation"]  # absolute
