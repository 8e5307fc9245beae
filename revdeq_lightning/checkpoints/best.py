"""`best.ckpt`: the weights with the lowest validation loss so far."""

import math
import warnings
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from revdeq_lightning.checkpoints.abstract import AbstractCheckpoint
from revdeq_lightning.checkpoints.files import BETWEEN_STEPS, contents
from revdeq_lightning.checkpoints.names import BEST
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.tasks.training_step import made_step


class BestCheckpoint(AbstractCheckpoint):
    """Saves `best.ckpt` after each validation whose loss is lower than that of the existing file.

    The loss is read from the file, because the folder may have been moved, the file removed, or the disk full. If the
    file is newer than the checkpoint from which the run was resumed, the run repeats that validation, and the loss in
    the checkpoint is used.

    Weights validated between two optimizer steps are saved, too. A run resumed from such a file loses the gradients
    accumulated so far, so `newest_good` chooses it only if there is no other.

    Args:
        folder: Folder of the checkpoints; None for `checkpoints` in the run's folder.
        monitor: Key of the loss.
    """

    name = BEST

    def __init__(self, folder: str | Path | None = None, *, monitor: str = "val/loss") -> None:
        super().__init__(folder)
        self.monitor = monitor
        self.loss = math.inf
        self._begin = 0
        self._is_known = self._is_between_steps = False

    def state_dict(self) -> dict[str, float]:
        return {"loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.loss = state_dict["loss"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin, self._is_known = trainer.global_step, False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._is_known:
            self.loss = trainer.strategy.broadcast(self._loss_of_file() if trainer.is_global_zero else math.inf)
            self._is_known = True
        loss = float(trainer.callback_metrics[self.monitor])
        if not trainer.strategy.broadcast(loss < self.loss):
            return
        before, self.loss = self.loss, loss  # the file stores its own loss
        self._is_between_steps = not made_step(trainer)
        if self.save(trainer):
            self.loss = before  # the file with that loss still exists
        self._is_between_steps = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_between_steps:
            checkpoint[BETWEEN_STEPS] = True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and checkpoint.get(BETWEEN_STEPS) and trainer.is_global_zero:
            warnings.warn(
                f"{trainer.ckpt_path} was written while gradients were being accumulated: those since step"
                f" {checkpoint['global_step']} are lost, so this run will differ from an uninterrupted one",
                stacklevel=2,
            )

    def _loss_of_file(self) -> float:
        try:
            content = contents(self.path)
        except (CheckpointError, OSError):
            return math.inf  # missing or damaged
        loss = content.get("callbacks", {}).get(self.state_key, {}).get("loss")
        return self.loss if loss is None or content["global_step"] > self._begin else float(loss)
