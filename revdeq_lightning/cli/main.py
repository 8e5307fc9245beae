"""The command line: `revdeq fit|validate|test|predict|generate ...`.

Lightning is imported only where a command needs it, so that help and early errors are immediate.
"""

import errno
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from revdeq_lightning import __version__
from revdeq_lightning.checkpoints.names import CHECKPOINTS
from revdeq_lightning.cli.errors import fail, nearest
from revdeq_lightning.cli.option_names import check_arguments, check_options, short_help
from revdeq_lightning.cli.parser import ReadableErrors, call_with_options, given_files, with_config_of_checkpoint
from revdeq_lightning.cli.paths import expanded, with_expanded_paths
from revdeq_lightning.program import printable, program

SUBCOMMANDS = {
    "fit": "train a model",
    "validate": "evaluate a checkpoint on the validation data",
    "test": "evaluate a checkpoint on the test data",
    "predict": "write the nats of every token of the test text; image: class probabilities; reasoning: answers",
    "replay": "repeat a batch that made training diverge",
    "generate": "continue a text with a trained language model",
    "evaluate": "measure a language model on tasks of lm-evaluation-harness",
    "export": "write the weights of a checkpoint to one safetensors file, or to a folder for transformers",
    "report": "write a web page on one or several runs: report RUN [RUN ...] [--output FILE]",
}

# One command line per task; `lm` is the default. With one for all tasks and `class_path` in the file, a misspelled key
# gave ten lines, "Does not validate against any of the Union subtypes ...", with the complete value.
TASKS = {"lm": "LanguageCommandLine", "image": "ImageCommandLine", "reasoning": "ReasoningCommandLine"}

FUNCTIONS = {
    "generate": ("inference", "generate_text"),
    "image predict": ("inference", "predict_images"),
    "reasoning predict": ("inference", "predict_puzzles"),
    "evaluate": ("export", "evaluate"),
    "export": ("export", "export_weights"),
    "replay": ("replay", "replay"),
}
"""Commands that need no trainer: module and function, whose arguments are the options."""

EXAMPLES = {
    "fit --config configs/lm/default.yaml": "train",
    "fit --config FILE --trainer.max_steps=100": "with another value",
    "fit --config FILE --config OTHER": "with settings of a second file on top",
    "fit --ckpt_path RUN/checkpoints/last.ckpt": "continue",
    "generate --ckpt_path CHECKPOINT --prompt TEXT": "continue a text",
    "image fit --config configs/cifar10/modern.yaml": "train a classifier",
    "image predict --ckpt_path CHECKPOINT --images FOLDER": "class probabilities of images",
    "reasoning fit --config configs/reasoning/mazes.yaml": "train a reasoner",
    "reasoning predict --ckpt_path CHECKPOINT --data.path PUZZLES.npz": "solve puzzles",
    "report RUN [RUN ...]": "curves and figures as a web page",
    "COMMAND --help": "all options of a command; --help=all: with their meaning",
}


def overview() -> str:
    """The text of `--help`."""
    lines = [
        f"RevDEQ Lightning {__version__}: reversible deep equilibrium models.\n",
        f"    {program()} [lm] COMMAND [options]       language models",
        f"    {program()} image COMMAND [options]      image classifiers",
        f"    {program()} reasoning COMMAND [options]  mazes, Sudoku, prefix sums\n",
        *(f"    {name:<10} {text}" for name, text in SUBCOMMANDS.items()),
        "",
        *(f"    {program()} {words:<54} {text}" for words, text in EXAMPLES.items()),
    ]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; if it cannot run, print one readable line and exit with a nonzero code."""
    arguments = list(sys.argv[1:] if args is None else args)
    task = arguments.pop(0) if arguments and arguments[0] in TASKS else "lm"
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        sys.exit(0 if arguments else 2)
    subcommand, *options = with_expanded_paths(arguments)
    wants_names = bool({"-h", "--help"} & set(options))
    options = ["--help" if option == "--help=all" else option for option in options]
    if subcommand not in SUBCOMMANDS:
        fail(f"unknown command {subcommand!r}{nearest(subcommand, SUBCOMMANDS)}; commands: {', '.join(SUBCOMMANDS)}")
    for path in given_files(options, "--config", "-c"):
        if not path.is_file():
            found = sorted(str(p) for p in Path("configs").glob("*/*.yaml"))
            fail(f"no configuration file {path}{nearest(str(path), found)}")
    for path in given_files(options, "--ckpt_path"):
        if str(path) not in ("last", "best") and not path.exists():
            fail(f"no checkpoint {path}")
        if (path / CHECKPOINTS).is_dir():
            fail(f"{path} is the folder of a run: set --ckpt_path to a file in {path / CHECKPOINTS}")
        if (path.suffix == ".safetensors" and subcommand != "fit") or (path / "config.json").is_file():
            fail(f"{path} holds weights alone, as `export` writes them: use a checkpoint in RUN/{CHECKPOINTS}")
    command = f"{task} predict" if subcommand == "predict" else subcommand
    try:
        if subcommand == "report":
            _report(options)
        elif subcommand in ("generate", "evaluate") and task != "lm":
            fail(f"{subcommand} is a command of language models, not of {task!r}")
        elif function := FUNCTIONS.get(command):
            module, name = function
            check_arguments(module, name, options)
            call = getattr(importlib.import_module(f"revdeq_lightning.cli.{module}"), name)
            print(printable(call_with_options(call, command, options)))
        elif wants_names:
            print(short_help(task, subcommand))
        else:
            options = with_config_of_checkpoint(options)
            check_options(task, subcommand, options)
            from revdeq_lightning.cli import tasks

            getattr(tasks, TASKS[task]).start(subcommand, options)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def _report(options: Sequence[str]) -> None:
    import argparse

    class Parser(ReadableErrors, argparse.ArgumentParser):
        """Errors of one line."""

    parser = Parser(
        prog=f"{program()} report",
        description="Write a web page on one or several runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, with metrics.csv")
    parser.add_argument("--output", metavar="FILE", help="default: RUN/report.html, or comparison.html above the runs")
    given = parser.parse_args(list(map(expanded, options)))
    from revdeq_lightning.report.page import write_report

    try:
        print(f"Report in {write_report(given.runs, given.output)}")
    except (ValueError, OSError) as error:
        is_refused = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS
        fail(f"{error}{'; choose another --output' if is_refused else ''}")
