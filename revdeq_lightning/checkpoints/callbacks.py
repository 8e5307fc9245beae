"""The callbacks that write checkpoints: the newest state, and the weights with the lowest validation loss."""

import contextlib
import itertools
import math
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from revdeq_lightning.checkpoints.files import (
    BETWEEN_STEPS,
    contents,
    newest_good,
    remove,
    remove_leftovers,
    steps_of,
    try_folder,
)
from revdeq_lightning.checkpoints.names import BEST, CHECKPOINTS, LAST
from revdeq_lightning.equilibrium.validation import require_count, require_in_range
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.processes import largest
from revdeq_lightning.tasks.training_step import is_logging_step, made_step, run_folder, validation_follows

KEPT = re.compile(r"step-(\d+)\.ckpt")


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


class LastCheckpoint(AbstractCheckpoint):
    """Saves `last.ckpt` after each validation, at intervals, at the end of training, and when a signal ends it.

    Earlier checkpoints are kept as `step-N.ckpt`, in case the newest is damaged. Saves happen only after an optimizer
    step; if a validation falls between two steps, the save follows the next step. Incomplete files of killed runs are
    removed at the start. A run resumed from an older checkpoint moves the newer ones to a folder `left-at-step-N`, with
    a warning.

    If a checkpoint cannot be written (for example because the disk is full) and the trainer's `AtomicCheckpointIO` has
    `errors="warn"`, training continues with a warning. At the end of training, or after a signal, it is an error.

    Args:
        folder: Folder of the checkpoints; None for `checkpoints` in the run's folder.
        keep_last: Number of checkpoints to keep, including `last.ckpt`.
        every_n_steps: Also save every so many optimizer steps.
        every_minutes: Also save when the newest checkpoint is this old; several processes check at logging steps.
        stop_signal: Returns the number of the signal that ends training after this step, or 0.
    """

    name = LAST

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        keep_last: int = 2,
        every_n_steps: int | None = None,
        every_minutes: float | None = 30.0,
        stop_signal: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(folder)
        require_count("keep_last", keep_last)
        if every_n_steps is not None:
            require_count("checkpoint_every_n_steps", every_n_steps)
        if every_minutes is not None:
            require_in_range("checkpoint_every_minutes", every_minutes, "(0, inf]", "null for never")
        self.keep_last = keep_last
        self.every_n_steps, self.every_minutes, self.stop_signal = every_n_steps, every_minutes, stop_signal
        self._saved_step = -1
        self._error: OSError | None = None
        self._step_of_file: int | None = None
        self._saved_at = 0.0
        self._due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; raise `CheckpointError` if it is not writable."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not cast(Any, trainer).fast_dev_run:
            fault = self._prepare_folder() if trainer.is_global_zero else None
            if fault := trainer.strategy.broadcast(fault):
                raise CheckpointError(fault)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run:
            remove_leftovers(self.path.parent)
            self._leave_branch(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not made_step(trainer):
            return
        if trainer.world_size == 1 or is_logging_step(trainer):
            late = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
            # The clock of the first process decides.
            self._due = self._due or bool(largest([late and trainer.is_global_zero])[0])
        at_interval = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        # A run resumed between a step and its validation would skip the validation. After a signal, save at once: the
        # validation may take too long.
        if self.stop_signal() or ((self._due or at_interval) and not validation_follows(trainer)):
            # Lightning logs the step after this hook; if the run were killed in between, it would be missing.
            cast(Any, trainer)._logger_connector.update_train_step_metrics()
            self._save(trainer)
            self._require_saved(self.stop_signal())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if made_step(trainer):
                self._save(trainer, again=True)  # a run resumed from an earlier save would repeat it
                self._require_saved(self.stop_signal())
            else:
                self._due = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._require_saved()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._step_of_file is not None:
            self._prune()  # a run killed at its very end did not

    def _require_saved(self, asked_to_end: int = True) -> None:
        """Raise, on all processes, if the run ends and its newest checkpoint was not written."""
        if self._error is None or not asked_to_end:
            return
        earlier = (
            "earlier checkpoints are intact" if newest_good(self.path.parent).path else "there is no earlier checkpoint"
        )
        reason = self._error.strerror or self._error
        raise CheckpointError(f"the final state could not be saved to {self.path}: {reason}; {earlier}")

    def _save(self, trainer: Trainer, *, again: bool = False) -> None:
        """Save on all processes, unless this step is already saved, and remove older checkpoints."""
        if (self._saved_step == trainer.global_step and not again) or cast(Any, trainer).fast_dev_run:
            return
        if trainer.is_global_zero:
            self._keep_previous(trainer.global_step)
        self._saved_at, self._due = time.monotonic(), False
        self._error = self.save(trainer)
        if self._error:
            self._saved_step = -1
            return
        self._saved_step = self._step_of_file = trainer.global_step
        if trainer.is_global_zero:
            self._prune()

    def _keep_previous(self, step: int) -> None:
        """Keep the newest checkpoint as `step-N.ckpt` before another one replaces `last.ckpt`."""
        previous = self._step_of_file
        if previous is None or previous >= step or self.keep_last == 1 or not self.path.exists():
            return
        kept = self.path.with_name(f"step-{previous}.ckpt")
        with contextlib.suppress(OSError):  # if nothing can be written, the following save reports it
            remove(kept)
            try:
                os.link(self.path, kept)
            except OSError:  # a folder, or no links in this file system; the newest until the next save completes
                self.path.rename(kept)

    def _prune(self) -> None:
        files = self._kept_files()
        for step in sorted(files)[: max(0, len(files) - self.keep_last + 1)]:
            remove(files[step])

    def _kept_files(self) -> dict[int, Path]:
        named = {path: KEPT.fullmatch(path.name) for path in self.path.parent.glob("step-*.ckpt")}
        return {int(match[1]): path for path, match in named.items() if match}

    def _leave_branch(self, step: int) -> None:
        """Move checkpoints of later steps to a separate folder, because the run will write files of the same names."""
        newer = [path for number, path in sorted(self._kept_files().items()) if number > step]
        if self._step_of_file is not None and self._step_of_file > step:
            newer.append(self.path)
            self._step_of_file = None
        if not newer:
            return  # only `best.ckpt` is newer if a run was killed after a validation
        best = self.path.with_name(BEST)
        with contextlib.suppress(FileNotFoundError, CheckpointError):
            newer += [best] if steps_of(best).number > step else []
        names = (f"left-at-step-{step}" + (f"-{k}" if k else "") for k in itertools.count())
        left = next(path for path in map(self.path.with_name, names) if not path.exists())
        left.mkdir()
        for path in newer:
            path.rename(left / path.name)
        warnings.warn(
            f"the run {'continues from' if step else 'starts at'} step {step}: the checkpoints of later steps"
            f" ({', '.join(path.name for path in newer)}) were moved to {left}",
            stacklevel=2,
        )

    def _prepare_folder(self) -> str | None:
        folder = self.path.parent
        try:
            try_folder(folder)
        except OSError as error:
            return f"checkpoints cannot be written to {folder}: {error.strerror or error}; choose another run.folder"
        self._step_of_file = None
        with contextlib.suppress(FileNotFoundError, CheckpointError):
            self._step_of_file = steps_of(self.path).number
        return None
