"""`best.ckpt`: the weights of the best validation so far."""

import math
import warnings
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from revdeq_lightning.checkpoints.files import BETWEEN_STEPS, contents
from revdeq_lightning.checkpoints.names import BEST, CHECKPOINTS
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.tasks.training_step import made_step, run_folder


class BestCheckpoint(Checkpoint):
    """Saves `best.ckpt` after a validation with a lower loss than that of the file which lies there.

    Of the file, and not of one that the run remembers: the folder may have been moved, the file removed, or a full disk
    have kept it from being written. Of a file that is newer than what the run went on from, the run does the validation
    again.

    Weights that are validated in the midst of accumulated gradients are saved, too; from such a file a run goes on
    without what had been added up, and only if there is no other (`newest_good`).

    Args:
        folder: Where checkpoints lie; None: the folder `checkpoints` in the run's.
        monitor: Key of the loss.
    """

    def __init__(self, folder: str | Path | None = None, *, monitor: str = "val/loss") -> None:
        self.folder, self.monitor = folder, monitor
        self.path = Path()
        self.loss = math.inf
        self._begin = 0
        self._is_known = self._is_between_steps = False

    def state_dict(self) -> dict[str, float]:
        """The loss."""
        return {"loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """The loss of the file that there was at that time."""
        self.loss = state_dict["loss"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, on all ranks that of the first."""
        if stage == "fit":
            folder = self.folder or run_folder(trainer, None) / CHECKPOINTS
            self.path = Path(trainer.strategy.broadcast(str(folder))) / BEST

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run goes on."""
        self._begin, self._is_known = trainer.global_step, False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if it is the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._is_known:
            loss_of_file = self._loss_of_file() if trainer.is_global_zero else math.inf
            self.loss = trainer.strategy.broadcast(loss_of_file)
            self._is_known = True
        loss = float(trainer.callback_metrics[self.monitor])
        if not trainer.strategy.broadcast(loss < self.loss):
            return
        before, self.loss = self.loss, loss  # the file holds its own loss
        self._is_between_steps = not made_step(trainer)
        trainer.save_checkpoint(self.path)
        self._is_between_steps = False
        if trainer.strategy.broadcast(self.path in getattr(trainer.strategy.checkpoint_io, "failures", {})):
            self.loss = before  # the file of that loss is still there

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark what a run does not go on from exactly."""
        if self._is_between_steps:
            checkpoint[BETWEEN_STEPS] = True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell of that mark."""
        if trainer.state.fn == "fit" and checkpoint.get(BETWEEN_STEPS) and trainer.is_global_zero:
            warnings.warn(
                f"{trainer.ckpt_path} was written in the midst of accumulated gradients: what had been added up since"
                f" step {checkpoint['global_step']} is lost, and the run is not the one that would have gone on",
                stacklevel=2,
            )

    def _loss_of_file(self) -> float:
        try:
            content = contents(self.path)
        except (CheckpointError, OSError):
            return math.inf  # there is none, or it is damaged
        loss = content.get("callbacks", {}).get(self.state_key, {}).get("loss")
        return self.loss if loss is None or content["global_step"] > self._begin else float(loss)
