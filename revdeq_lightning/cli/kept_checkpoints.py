"""Which checkpoints a run keeps."""

from lightning import Trainer

from revdeq_lightning.checkpoints.best import BestCheckpoint
from revdeq_lightning.checkpoints.last import LastCheckpoint
from revdeq_lightning.runs.folder import RunConfig
from revdeq_lightning.runs.signals import STOP


def last_checkpoint(run: RunConfig) -> LastCheckpoint:
    """Keeps `last.ckpt` and those before it."""
    return LastCheckpoint(
        keep_last=run.keep_last,
        every_n_steps=run.checkpoint_every_n_steps,
        every_minutes=run.checkpoint_every_minutes,
        stop_signal=lambda: STOP.agreed,
    )


def best_or_last(trainer: Trainer) -> str | None:
    """Path of the best checkpoint, of the last one where there was no validation, if any was written."""
    ours = [c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint | LastCheckpoint)]
    return next((str(callback.path) for callback in ours if callback.path.exists()), None)
