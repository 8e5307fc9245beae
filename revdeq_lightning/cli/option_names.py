"""Names of all options, read from source code, for short help and to report a misspelled one before seconds of imports.

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
from revdeq_lightning.cli.parser import given_files
from revdeq_lightning.models.option_names import OWN_OPTIONS, adjoint_option
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
    "lm": ("text", "Text", "language_modeling", "LanguageModelingTask", "TransformerConfig", "Language"),
    "image": ("images", "Image", "classification", "ClassificationTask", "ClassifierConfig", "Image"),
    "reasoning": ("puzzles", "Puzzle", "reasoning", "ReasoningTask", "ReasonerConfig", "Reasoning"),
}
"""Folder of the data, `...DataModule`; file and class of the task; class of the network's settings; `...RunConfig`."""
FROM_DATA = {
    "lm": ("context_length", "vocab_size"),
    "image": ("num_classes", "num_channels"),
    "reasoning": ("num_symbols", "num_answers", "shape"),
}
"""Settings of the network that follow from the data."""


@functools.cache
def option_groups(task: str) -> dict[str, list[str]]:
    """Names of a task's options, without their group, by the group: `model.solver` among others."""
    folder, data, file, module, network, run = SOURCES[task]
    augmentation = {"data.augmentation": _names("data/images/augmentation.py", "AugmentationConfig")}
    return {
        "data": _names(f"data/{folder}/module.py", f"{data}DataModule"),
        **(augmentation if task == "image" else {}),
        "model": _names(f"tasks/{file}.py", module),
        "model.network": _names("models/config.py", network),
        "model.solver": _solver_options(),
        "model.optimizer": _names("tasks/optimizers.py", "OptimizerConfig"),
        "trainer": _names("pytorch/trainer/trainer.py", "Trainer", _folder_of("lightning")),
        "run": [*_names("runs/folder.py", f"{run}RunConfig"), *_names("runs/folder.py", "RunConfig")],
        "diagnostics": _names("callbacks/config.py", "DiagnosticsConfig"),
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
                fail(f"{path} has an unknown setting: {name}{_advice(task, subcommand, name) or ': remove it'}")
            if name.startswith("model.network.") and name.split(".")[2] in FROM_DATA[task]:
                fail(f"{path} sets {name}, which follows from the data: remove it")


def check_arguments(module: str, function: str, options: Sequence[str]) -> None:
    """Fail if the command line has a name that is no argument of a command's function in `cli`."""
    names = _names(f"cli/{module}.py", function)
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
def _definitions(path: Path) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def _names(file: str, name: str, folder: Path = PACKAGE) -> list[str]:
    """Arguments of a function or of a class's constructor, or fields of a dataclass without those of its bases."""
    node = _definitions(folder / file)[name]
    if isinstance(node, ast.ClassDef):
        constructors = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not constructors:
            found = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n)]
            return [ast.unparse(n.target) for n in found]
        (node,) = constructors
    return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs) if argument.arg != "self"]


def _solver_options() -> list[str]:
    """The options that `SolverConfig` makes of the fields of solvers and adjoints, and its own."""
    names = list(OWN_OPTIONS)
    for kind in ("Solver", "Adjoint"):
        for path in sorted((PACKAGE / "equilibrium" / f"{kind.lower()}s").glob("*.py")):
            for name in (name for name in _definitions(path) if name.endswith(kind)):
                fields = _names(str(path.relative_to(PACKAGE)), name)
                names += fields if kind == "Solver" else [adjoint_option(path.stem, field) for field in fields]
    return names
