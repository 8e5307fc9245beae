"""The reasoners' command line; `predict` is in `inference.py`."""

from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from revdeq_lightning.cli.trainer import AbstractCommandLine
from revdeq_lightning.data.puzzles.module import PuzzleDataModule
from revdeq_lightning.report.reasoning import ReasoningReport
from revdeq_lightning.runs.folder import ReasoningRunConfig
from revdeq_lightning.tasks.reasoning import ReasoningTask


class ReasoningCommandLine(AbstractCommandLine):
    """`fit`, `validate` and `test` of the reasoners."""

    task_class, data_class = ReasoningTask, PuzzleDataModule
    run_class = ReasoningRunConfig
    figures: ClassVar[dict[str, str]] = {
        "solved": "{:.2%} solved",
        "cell_accuracy": "{:.3%} of the cells right",
        "evaluations": "{:.1f} evaluations of f per puzzle",
    }

    def link_sizes(self, parser: LightningArgumentParser) -> None:
        for name in ("num_symbols", "num_answers", "shape"):
            parser.link_arguments(f"data.{name}", f"model.network.{name}", apply_on="instantiate")

    def task_callbacks(self) -> list[Any]:
        return [ReasoningReport(self.run_config.path)]
