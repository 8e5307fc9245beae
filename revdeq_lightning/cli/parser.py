"""Command-line parsing: one-line errors, files given as options, and settings of old runs."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from revdeq_lightning.cli.errors import fail, nearest
from revdeq_lightning.errors import DivergenceError
from revdeq_lightning.program import program


class ReadableErrors:
    """A parser mixin that reports errors in one line with the nearest valid key, without the usage of 200 options."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse; report an interpolation `${...}` of what does not exist in one line."""
        try:
            return super().parse_args(*args, **kwargs)  # type: ignore[misc]
        except UnicodeDecodeError as error:
            self.error(f"a file of settings must be text in UTF-8, and one given is not: {error}")
        except Exception as error:
            if not type(error).__module__.startswith("omegaconf"):
                raise
            text, _, where = " ".join(str(error).split()).partition("full_key: ")
            key = where.split()[0] if where else "the command line"
            self.error(f"{key}: {text}(${{NAME}} is a variable or another setting; \\${{ is the text itself)")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split())
        hint = ""
        if "unrecognized" in text or "not accept" in text:
            options = list(_options_of(self))
            words = [word.strip("'\"").removeprefix("--").split("=")[0] for word in text.split()]
            hint = next((hint for word in words if (hint := nearest(word, options))), "")
        elif "are required" in text and "config" in _options_of(self):
            hint = " (set --config FILE, for example one of configs/lm)"
        fail(text + hint)


def _options_of(parser: Any) -> Iterator[str]:
    """Names of the options of a parser and its subcommands."""
    for action in parser._actions:  # argparse has no public API for it
        yield from (option.removeprefix("--") for option in action.option_strings)
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _options_of(subparser)


def call_with_options(function: Callable[..., str], command: str, options: Sequence[str]) -> str:
    """Call a function with arguments from the command line; report what the user can fix in one line."""
    from jsonargparse import ArgumentParser

    from revdeq_lightning.cli.yaml_text import prepare_jsonargparse

    prepare_jsonargparse()

    class Parser(ReadableErrors, ArgumentParser):
        """Errors of one line."""

    parser = Parser(prog=f"{program()} {command}", allow_abbrev=False)
    parser.add_function_arguments(function)
    settings = parser.instantiate(parser.parse_args(list(options))).as_dict()
    if "device" in settings:
        _require_device(settings["device"])
    try:
        return function(**settings)
    except (ValueError, OSError, DivergenceError) as error:
        fail(str(error))


def _require_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        fail(f"--device={name} cannot be used ({str(error).splitlines()[0]}): choose another, for example cpu")


def given_files(options: Sequence[str], *names: str) -> list[Path]:
    """The values of an option that names a file, as `--name FILE` or `--name=FILE`."""
    values = [b for a, b in itertools.pairwise(options) if a in names]
    values += [o.split("=", 1)[1] for o in options if o.split("=", 1)[0] in names and "=" in o]
    return [Path(v) for v in values]


def with_config_of_checkpoint(options: Sequence[str]) -> list[str]:
    """Add the configuration of the checkpoint's run, unless a given `--config` describes one; fail without either."""
    from revdeq_lightning.runs.folder import CONFIG, describes_run, run_of_checkpoint

    checkpoints = given_files(options, "--ckpt_path")
    if not checkpoints or any(map(describes_run, given_files(options, "--config", "-c"))):
        return list(options)
    if run := run_of_checkpoint(checkpoints[-1]):
        return ["--config", str(run / CONFIG), *options]
    if checkpoints[-1].suffix == ".ckpt" and checkpoints[-1].exists():
        fail(
            f"{checkpoints[-1]} is not in the folder of its run, so its settings are not known: set --config to the"
            f" run's {CONFIG}, or to the file of settings of its training"
        )
    return list(options)
