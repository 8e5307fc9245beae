"""The command line: `revdeq fit|validate|test|predict|generate ...`.

Lightning is imported only where a command needs it: help and the errors that can be found without it come at once.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from revdeq_lightning import __version__
from revdeq_lightning.program import program

SUBCOMMANDS = {
    "fit": "train a model",
    "validate": "evaluate a checkpoint on the validation data",
    "test": "evaluate a checkpoint on the test data",
    "predict": "write the nats of every token of the test text; image: the class probabilities of a folder of images",
    "replay": "look again at a batch that made training diverge",
    "generate": "continue a text with a trained language model",
    "export": "write the weights of a checkpoint to one safetensors file",
    "report": "write the page of a run, or of several beside each other: report RUN [RUN ...] [--output FILE]",
}

# One concrete command line a task; `lm` may be left out. Subclass mode (one
# command line for all tasks, `class_path` in the file) was tried: there a misspelt key is told as ten lines, "Does not
# validate against any of the Union subtypes ..." and the whole given value, with the name of the key in the middle.
# Here it is one line.
TASKS = {
    "lm": "revdeq_lightning.cli.language",
    "image": "revdeq_lightning.cli.image",
}

EXAMPLES = {
    "fit --config configs/lm/default.yaml": "train",
    "fit --config FILE --trainer.max_steps=100": "with another value",
    "fit --config FILE --config OTHER": "with settings of another file laid over it",
    "fit --ckpt_path RUN/checkpoints/last.ckpt": "go on",
    "generate --ckpt_path CHECKPOINT --prompt TEXT": "continue a text",
    "image fit --config configs/cifar10/modern.yaml": "train a classifier",
    "image predict --ckpt_path CHECKPOINT --images FOLDER": "class probabilities of images",
    "report RUN [RUN ...]": "curves and figures as a web page",
    "COMMAND --help": "all options of a command",
}


def overview() -> str:
    """The text of `--help`."""
    lines = [
        f"RevDEQ Lightning {__version__}: reversible deep equilibrium models.\n",
        f"    {program()} [lm] COMMAND [options]       language models",
        f"    {program()} image COMMAND [options]      image classifiers\n",
        *(f"    {name:<10} {text}" for name, text in SUBCOMMANDS.items()),
        "",
        *(f"    {program()} {words:<54} {text}" for words, text in EXAMPLES.items()),
    ]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; exit with a code other than 0 and one readable line if it cannot be run."""
    arguments = list(sys.argv[1:] if args is None else args)
    task = arguments.pop(0) if arguments and arguments[0] in TASKS else "lm"
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        sys.exit(0 if arguments else 2)
    subcommand, *options = arguments
    if subcommand not in SUBCOMMANDS:
        fail(f"unknown command {subcommand!r}{nearest(subcommand, SUBCOMMANDS)}; commands: {', '.join(SUBCOMMANDS)}")
    for path in given_files(options, "--config", "-c"):
        if not path.is_file():
            found = sorted(str(p) for p in Path("configs").glob("*/*.yaml"))
            fail(f"no configuration file {path}{nearest(str(path), found)}")
    for path in given_files(options, "--ckpt_path"):
        if str(path) not in ("last", "best") and not path.exists():
            fail(f"no checkpoint {path}")
    try:
        if subcommand == "report":
            _report(options)
        elif subcommand == "generate":
            if task != "lm":
                fail(f"generate is a command of language models, not of {task!r}")
            _generate(options)
        elif subcommand == "replay":
            _replay(options)
        elif subcommand == "predict" and task == "image":
            _predict_images(options)
        elif subcommand == "export":
            _export(options)
        else:
            import importlib

            importlib.import_module(TASKS[task]).run(subcommand, options)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


class ReadableErrors:
    """For a parser: says what is wrong in one line, without the usage of two hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name the key, and the nearest valid one."""
        text = " ".join(message.split())
        hint = ""
        if "unrecognized" in text or "not accept" in text:
            options = dict.fromkeys(_options_of(self), "")
            words = [word.strip("'\"").removeprefix("--").split("=")[0] for word in text.split()]
            hint = next((hint for word in words if (hint := nearest(word, options))), "")
        elif "are required" in text and "config" in _options_of(self):
            hint = " (give --config FILE: configs/lm holds some)"
        fail(text + hint)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line and exit."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def nearest(word: str, words: Sequence[str] | dict[str, str]) -> str:
    """A hint at the valid word that looks most like this one, or nothing."""
    import difflib

    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _options_of(parser: Any) -> Iterator[str]:
    """Names of the options of a parser and its subcommands."""
    for action in parser._actions:  # argparse has no public way
        yield from (option.removeprefix("--") for option in action.option_strings)
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _options_of(subparser)


def given_files(options: Sequence[str], *names: str) -> list[Path]:
    """The values of an option that names a file, as `--name FILE` or `--name=FILE`."""
    values = [b for a, b in itertools.pairwise(options) if a in names]
    values += [o.split("=", 1)[1] for o in options if o.split("=", 1)[0] in names and "=" in o]
    return [Path(v) for v in values]


def _report(options: Sequence[str]) -> None:
    import argparse

    from revdeq_lightning.report import report

    class Parser(ReadableErrors, argparse.ArgumentParser):
        """Errors of one line."""

    try:
        print(report(options, Parser))
    except (ValueError, OSError) as error:
        fail(str(error))


def _generate(options: Sequence[str]) -> None:
    from revdeq_lightning.cli.language_inference import generate_text

    print(call_with_options(generate_text, "generate", options))


def _predict_images(options: Sequence[str]) -> None:
    from revdeq_lightning.cli.image_inference import predict_images

    print(call_with_options(predict_images, "image predict", options))


def _replay(options: Sequence[str]) -> None:
    from revdeq_lightning.cli.replay import replay

    print(call_with_options(replay, "replay", options))


def _export(options: Sequence[str]) -> None:
    from revdeq_lightning.cli.export import export_weights

    print(call_with_options(export_weights, "export", options))


def call_with_options(function: Callable[..., str], command: str, options: Sequence[str]) -> str:
    """Call a function with arguments from the command line; what the user can mend is told in one line."""
    from jsonargparse import ArgumentParser

    class Parser(ReadableErrors, ArgumentParser):
        """Errors of one line."""

    parser = Parser(prog=f"{program()} {command}", allow_abbrev=False)
    parser.add_function_arguments(function)
    settings = parser.parse_args(list(options))
    try:
        return function(**settings.as_dict())
    except (ValueError, OSError) as error:
        fail(str(error))
