"""What is no number, for the loggers that show it: tables, curves, pictures, texts, histograms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from revdeq_lightning.loggers.endurance import survival

L = TypeVar("L", bound=Logger)
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def log_table(trainer: Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table: on W&B as one, on TensorBoard as text."""
    for logger in _loggers(trainer, WandbLogger):
        import wandb

        _log(trainer, logger, key, wandb.Table(columns=list(columns), data=[list(row) for row in rows]))
    for board in _loggers(trainer, TensorBoardLogger):
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)
        with survival(board):
            board.experiment.add_text(key, text, step_of(trainer))


def log_curves(trainer: Trainer, key: str, title: str, x_name: str, curves: Curves) -> None:
    """Curves by name, `(x, y)` each: a custom chart on W&B, which draws it anew from its table."""
    for logger in _loggers(trainer, WandbLogger):
        import wandb

        xs, ys = zip(*curves.values(), strict=True)
        chart: Any = wandb.plot.line_series(
            [list(x) for x in xs], [list(y) for y in ys], keys=list(curves), title=title, xname=x_name
        )
        _log(trainer, logger, key, chart)


def log_picture(trainer: Trainer, key: str, path: Path, caption: str, *, boards_only: bool = False) -> None:
    """A PNG file; `boards_only`: on TensorBoard, as W&B has a chart in its place."""
    for logger in [] if boards_only else _loggers(trainer, WandbLogger):
        import wandb

        with survival(logger):
            _log(trainer, logger, key, wandb.Image(str(path), caption=caption))
    for board in _loggers(trainer, TensorBoardLogger):
        with survival(board):
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            board.experiment.add_image(key, pixels, step_of(trainer), dataformats="HWC")


def log_histogram(trainer: Trainer, key: str, counts: Any, edges: Any) -> None:
    """Counts of the bins between edges."""
    for logger in _loggers(trainer, WandbLogger):
        import wandb

        _log(trainer, logger, key, wandb.Histogram(np_histogram=(counts, edges)))
    for board in _loggers(trainer, TensorBoardLogger):
        values = np.repeat((edges[:-1] + edges[1:]) / 2, counts)
        with survival(board):
            board.experiment.add_histogram(key, values, step_of(trainer), bins=edges)


def step_of(trainer: Trainer) -> int:
    """Number of the newest optimizer step, counted from 0, as Lightning logs metrics under it."""
    return max(0, trainer.global_step - 1)


def _loggers(trainer: Trainer, kind: type[L]) -> list[L]:
    """Those of the first process: the others' do nothing."""
    return [logger for logger in trainer.loggers if isinstance(logger, kind)] if trainer.is_global_zero else []


def _log(trainer: Trainer, logger: Logger, key: str, medium: Any) -> None:
    logger.log_metrics({key: medium}, step=step_of(trainer))


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
