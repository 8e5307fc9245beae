"""Names of all options, read from source code, for short help and to report a misspelt one before seconds of imports.

There may be too many, which the parser reports later, but none is missing.
"""

import ast
import functools
import importlib.util
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from revdeq_lightning.cli.errors import fail, nearest
from revdeq_lightning.cli.parser import REMOVED_SETTINGS, given_files
from revdeq_lightning.program import program

PACKAGE = Path(__file__).resolve().parents[1]
GENERAL = {
    "config": "file of settings, for example of configs/; several are merged, in this order",
    "ckpt_path": "checkpoint to continue or evaluate: a file, last or best",
    "seed_everything": "seed of all random numbers",
    "print_config": "print all settings with their values, and exit",
    "help=all": "all settings with their meaning, type, and default",
}
OTHERS = ("c", "h", "help", "weights_only", "verbose", "output", "return_predictions")
SOURCES = {
    "lm": (
        "text",
        "TextDataModule",
        "language_modeling",
        "LanguageModelingTask",
        "TransformerConfig",
        "LanguageRunConfig",
    ),
    "image": (
        "images",
        "ImageDataModule",
        "classification",
        "ClassificationTask",
        "ClassifierConfig",
        "ImageRunConfig",
    ),
    "reasoning": ("puzzles", "PuzzleDataModule", "reasoning", "ReasoningTask", "ReasonerConfig", "ReasoningRunConfig"),
}
"""Folder and class of the data, file and class of the task, class of the network's settings, and of the run's."""


@functools.cache
def option_groups(task: str) -> dict[str, list[str]]:
    """Names of a task's options, without their group, by the group: `model.solver` among others."""
    folder, data, file, module, network, run = SOURCES[task]
    augmentation = {"data.augmentation": _fields("data/images/augmentation.py", "AugmentationConfig")}
    return {
        "data": _arguments(f"data/{folder}/module.py", data),
        **(augmentation if task == "image" else {}),
        "model": _arguments(f"tasks/{file}.py", module),
        "model.network": _fields("models/config.py", network),
        "model.solver": _solver_options(),
        "model.optimizer": _fields("tasks/optimizers.py", "OptimizerConfig"),
        "trainer": _arguments("pytorch/trainer/trainer.py", "Trainer", _folder_of("lightning")),
        "run": [*_fields("runs/folder.py", run), *_fields("runs/folder.py", "RunConfig")],
        "diagnostics": _fields("callbacks/config.py", "DiagnosticsConfig"),
    }


def short_help(task: str, subcommand: str) -> str:
    """The names of all options, by group."""
    words = f"{program()} {'' if task == 'lm' else f'{task} '}{subcommand}"
    lines = [f"Usage: {words} --config FILE [--GROUP.NAME=VALUE ...]\n"]
    lines += [f"  --{name:<16} {text}" for name, text in GENERAL.items()]
    groups = option_groups(task)
    for group, names in groups.items():
        own = " ".join(dict.fromkeys(name for name in names if f"{group}.{name}" not in groups))
        lines += ["", f"  --{group}.*", textwrap.fill(own, 100, initial_indent="      ", subsequent_indent="      ")]
    return "\n".join(lines)


def check_options(task: str, subcommand: str, options: Sequence[str]) -> None:
    """Fail if the command line, or a file of settings, has a name that no option has; say which is meant."""
    for option in options:
        name = option.removeprefix("--").split("=")[0].rstrip("+")
        if option.startswith("--") and not _is_known(task, name):
            fail(f"unrecognized arguments: {option}{_advice(task, subcommand, name)}")
    for path in given_files(options, "--config", "-c"):
        for name in _names_in(path):
            if not _is_known(task, name):
                fail(f"{path} has an unknown setting: {name}{_advice(task, subcommand, name)}")


def check_arguments(module: str, function: str, options: Sequence[str]) -> None:
    """Fail if the command line has a name that is no argument of a command's function in `cli`."""
    tree = ast.parse((PACKAGE / f"cli/{module}.py").read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    names = [argument.arg for argument in node.args.args]
    for option in options:
        name = option.removeprefix("--").split("=")[0]
        if option.startswith("--") and name.split(".")[0] not in (*names, "help", "config", "print_config"):
            fail(f"unrecognized arguments: {option}{nearest(name, names)}")


def _is_known(task: str, name: str) -> bool:
    groups, parts = option_groups(task), name.split(".")
    if len(parts) == 1:
        return name in GENERAL or name in OTHERS or name in groups
    # A setting may have parts of its own: trainer.strategy.timeout_seconds.
    group = next(g for n in range(len(parts) - 1, -1, -1) if (g := ".".join(parts[:n])) in groups or not g)
    own = parts[group.count(".") + 1] if group else ""
    return own == "help" or own in groups.get(group, ())


def _advice(task: str, subcommand: str, name: str) -> str:
    if other := next((other for other in SOURCES if _is_known(other, name)), None):
        return f" is of the task {other}: use {program()} {other} {subcommand}"
    groups = option_groups(task)
    options = [*GENERAL, *(f"{group}.{own}" for group, names in groups.items() for own in names)]
    return nearest(name, options) or nearest(name.rpartition(".")[0], groups)


def _names_in(path: Path) -> Iterator[str]:
    """Names of the settings in a file; none if it cannot be read, which is reported when it is parsed."""

    def walk(settings: dict[Any, Any], prefix: str) -> Iterator[str]:
        for key, value in settings.items():
            if (prefix[:-1], key) in REMOVED_SETTINGS:
                continue
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    if isinstance(settings, dict):
        yield from walk(settings, "")


def _folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    return Path(str(found and found.origin)).parent


@functools.cache
def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _fields(file: str, name: str) -> list[str]:
    """Fields of a dataclass, without those of its bases."""
    found = [node for node in _classes(PACKAGE / file)[name].body if isinstance(node, ast.AnnAssign)]
    return [ast.unparse(node.target) for node in found if "ClassVar" not in ast.unparse(node.annotation)]


def _arguments(file: str, name: str, folder: Path = PACKAGE) -> list[str]:
    """Arguments of a class's constructor."""
    methods = {node.name: node for node in _classes(folder / file)[name].body if isinstance(node, ast.FunctionDef)}
    arguments = methods["__init__"].args
    return [argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs)]


def _solver_options() -> list[str]:
    """The options that `SolverConfig` makes of the fields of solvers and adjoints, and its own."""
    names = ["solver"]
    for kind in ("Solver", "Adjoint"):
        for path in sorted((PACKAGE / "equilibrium" / f"{kind.lower()}s").glob("*.py")):
            for name in (name for name in _classes(path) if name.endswith(kind)):
                fields = _fields(str(path.relative_to(PACKAGE)), name)
                plain = fields if kind == "Solver" else ["checkpoint", "mismatch", "unconverged"]
                names += [f if f in plain else f"{path.stem}_{f.removeprefix('num_')}" for f in fields]
    own = ["adjoint", "num_losses", "loss_decay", "backward_solver", "backward_max_steps", "backward_rtol", "compiled"]
    return [*names, *own]
