"""`last.ckpt`: always there, also after a signal, and always at a moment from which the run can be resumed exactly."""

from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from revdeq_lightning.stop_signals import STOP

LAST = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` after each validation, at the end of training, and when a signal ends it (see `StopSignal`).

    Args:
        folder: Where checkpoints lie; None: the folder `checkpoints` in the run's.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self.path = Path()
        self.saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder: on all ranks that of the first."""
        if stage == "fit":
            folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
            self.path = Path(trainer.strategy.broadcast(str(folder))) / LAST

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if asked to end: at once, though a validation may follow, for that may take too long."""
        if STOP.agreed:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; also what was saved before: a run that goes on from here does not validate this step again."""
        self.saved_step = -1
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last validation did not see."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self.saved_step != trainer.global_step and not cast(Any, trainer).fast_dev_run:
            trainer.save_checkpoint(self.path)
            self.saved_step = trainer.global_step
