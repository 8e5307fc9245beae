"""Base class of the callbacks that write checkpoints."""

from pathlib import Path
from typing import ClassVar

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from revdeq_lightning.checkpoints.names import CHECKPOINTS
from revdeq_lightning.tasks.training_step import run_folder


class AbstractCheckpoint(Checkpoint):
    """Writes checkpoints under one name.

    Args:
        folder: Folder of the checkpoints; None for `checkpoints` in the run's folder.
    """

    name: ClassVar[str]

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = folder
        self.path = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            folder = self.folder or run_folder(trainer, None) / CHECKPOINTS
            self.path = Path(trainer.strategy.broadcast(str(folder))) / self.name

    def save(self, trainer: Trainer) -> OSError | None:
        """Save, called by all processes; returns on all of them the error that prevented it, if any."""
        trainer.save_checkpoint(self.path)
        failures: dict[Path, OSError] = getattr(trainer.strategy.checkpoint_io, "failures", {})
        return trainer.strategy.broadcast(failures.get(self.path))
