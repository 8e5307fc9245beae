"""One progress bar for the whole run; plain lines where there is no terminal."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.tasks.training_step import is_logging_step

SHOWN = (
    ("train/loss", "loss {:.3f}"),
    ("system/tokens_per_second", "{:,.0f} tokens/s"),
    ("system/images_per_second", "{:,.0f} images/s"),
    ("system/puzzles_per_second", "{:,.0f} puzzles/s"),
    ("equilibrium/forward_nfe", "{:.0f} evaluations"),
    ("equilibrium/relative_residual", "residual {:.1e}"),
)
SHOWN_AFTER_VALIDATION = (
    ("val/loss", "val/loss {:.4f} nats"),
    ("val/bits_per_byte", "{:.4f} bits/byte"),
    ("val/accuracy", "accuracy {:.2%}"),
    ("val/solved", "{:.2%} solved"),
)


class _TwoLineBar(Progress):
    """A bar with a line of figures below it, which both fit a terminal of 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures)


class RunProgress(ProgressBar):
    """Shows loss, throughput, evaluations of f and residual, read from the device at logging steps only.

    In a terminal it is a bar over all optimizer steps of the run, otherwise a line every few seconds. Each validation
    adds a line.

    Args:
        seconds_between_lines: Minimum time between two lines without a terminal; 0 for a line every logging step.
        console: Where to write; None: standard output.
    """

    def __init__(self, seconds_between_lines: float = 10.0, console: Console | None = None) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self.console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.console.on_broken_pipe = lambda: None  # type: ignore[method-assign]  # rich would exit
        self._bar: _TwoLineBar | None = None
        self._last_line = -float("inf")
        self._enabled = True
        self._survives = Survives("writing to the terminal")

    def disable(self) -> None:  # Lightning asks for it on all ranks but the first
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            with self._survives:
                self.console.print(*args, markup=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("training", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step)
        if is_logging_step(trainer):
            figures = _figures(trainer, SHOWN)
            if self._bar is not None:
                self._bar.figures = figures
            elif time.monotonic() - self._last_line >= self.seconds_between_lines:
                self._last_line = time.monotonic()
                self.print(f"step {trainer.global_step}/{trainer.estimated_stepping_batches}: {figures}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.print(f"step {trainer.global_step}: {_figures(trainer, SHOWN_AFTER_VALIDATION)}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("testing", sum(trainer.num_test_batches), 0)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])  # over the batches of all loaders

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._bar is not None:
            with self._survives:
                self._bar.stop()
            self._bar = None

    on_test_end = on_train_end = on_exception

    def _start(self, description: str, total: float, completed: int) -> None:
        if not (self._enabled and self.console.is_terminal):
            return
        known = total if total != float("inf") and total > 0 else None
        times = (TimeElapsedColumn(), "<", TimeRemainingColumn())
        columns = (description, BarColumn(bar_width=None), MofNCompleteColumn(), *times)
        self._bar = _TwoLineBar(*columns, console=self.console, refresh_per_second=4, expand=True)
        self._bar.add_task(description, total=known, completed=completed)
        with self._survives:
            self._bar.start()


def _figures(trainer: Trainer, shown: tuple[tuple[str, str], ...]) -> str:
    metrics = trainer.callback_metrics
    return "  ".join(form.format(float(metrics[key])) for key, form in shown if key in metrics)
