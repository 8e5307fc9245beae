"""Logs tables, curves, pictures and animations to W&B."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger

from revdeq_lightning.loggers.endurance import survival
from revdeq_lightning.loggers.plots import Plot


def log_table(trainer: Trainer, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log rows with the same columns."""
    data = [list(row.values()) for row in rows]
    _log(trainer, key, lambda wandb: wandb.Table(columns=list(rows[0]), data=data))


def log_curves(trainer: Trainer, key: str, title: str, plots: Sequence[Plot]) -> None:
    """Log the curves of several panels as one custom chart."""
    lines = [(line, f", {i}" if len(plots) > 1 else "") for i, plot in enumerate(plots, 1) for line in plot.lines]
    xs, ys = [line.x.tolist() for line, _ in lines], [line.y.tolist() for line, _ in lines]
    names = [f"{line.label}{number}" for line, number in lines]
    if lines:
        x_name = plots[0].xlabel
        _log(trainer, key, lambda wandb: wandb.plot.line_series(xs, ys, keys=names, title=title, xname=x_name))


def log_picture(trainer: Trainer, key: str, path: Path, caption: str) -> None:
    """Log a PNG file."""
    _log(trainer, key, lambda wandb: wandb.Image(str(path), caption=caption))


def log_animation(trainer: Trainer, key: str, path: Path) -> None:
    """Log a GIF file."""
    _log(trainer, key, lambda wandb: wandb.Video(str(path)))


def step_of(trainer: Trainer) -> int:
    """The newest optimizer step, counted from 0 as in Lightning's metrics."""
    return max(0, trainer.global_step - 1)


def _log(trainer: Trainer, key: str, make: Callable[[Any], Any]) -> None:
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            with survival(logger):
                import wandb

                logger.log_metrics({key: make(wandb)}, step=step_of(trainer))
