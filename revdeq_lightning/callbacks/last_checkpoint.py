"""`last.ckpt`: always there, also after Ctrl-C, and always at a moment from which the run can be resumed exactly."""

import signal
import threading
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.callbacks.training_step import is_logging_step

LAST = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` after each validation, at the end of training, and at the first Ctrl-C.

    Ctrl-C lets the step (or the validation) at hand finish, saves and ends the run; a second one ends it at once. An
    interrupt in the midst of an optimizer step would leave half of the weights moved.

    Args:
        folder: Where checkpoints lie; None: the folder `checkpoints` in the run's.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self.path = Path()
        self.saved_step = -1
        self._asked = self._ending = False
        self._previous: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder: on all ranks that of the first."""
        if stage == "fit":
            folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
            self.path = Path(trainer.strategy.broadcast(str(folder))) / LAST

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if asked to end. One process looks at every step, several agree at logging steps."""
        if trainer.world_size == 1 or is_logging_step(trainer):
            self._ending = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if self._ending:
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End, if asked to: not earlier, for the metrics of the last step are logged after its `on_train_batch_end`."""
        if self._ending:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last validation did not see."""
        self._save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signal back."""
        self._give_back_signal()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signal back; Lightning ignores it while it shuts down after Ctrl-C."""
        if isinstance(exception, Exception):
            self._give_back_signal()

    def _ask(self, *_: Any) -> None:
        self._asked = True
        self._give_back_signal()
        if cast(Any, rank_zero_only).rank == 0:
            print("\nStopping with a checkpoint after this step (Ctrl-C again: at once, without) ...", flush=True)

    def _give_back_signal(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _save(self, trainer: Trainer) -> None:
        if self.saved_step != trainer.global_step and not cast(Any, trainer).fast_dev_run:
            trainer.save_checkpoint(self.path)
            self.saved_step = trainer.global_step
