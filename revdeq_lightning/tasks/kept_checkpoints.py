"""Which checkpoints a run keeps."""

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from revdeq_lightning.callbacks.last_checkpoint import LastCheckpoint
from revdeq_lightning.runs import BEST, RunConfig


def best_checkpoint() -> ModelCheckpoint:
    """Keeps `best.ckpt`, by the validation loss."""
    return ModelCheckpoint(filename=Path(BEST).stem, monitor="val/loss", enable_version_counter=False)


def last_checkpoint(run: RunConfig) -> LastCheckpoint:
    """Keeps `last.ckpt` and those before it."""
    return LastCheckpoint(
        keep_last=run.keep_last,
        keep_every_hours=run.keep_every_hours,
        every_n_steps=run.checkpoint_every_n_steps,
        every_minutes=run.checkpoint_every_minutes,
    )


def best_or_last(trainer: Trainer) -> str | None:
    """Path of the best checkpoint, of the last one where there was no validation, if any was written."""
    callbacks: list[Any] = trainer.checkpoint_callbacks
    paths = [c.best_model_path if isinstance(c, ModelCheckpoint) else str(c.path) for c in callbacks]
    return next((path for path in paths if path and Path(path).exists()), None)
