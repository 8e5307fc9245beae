"""`last.ckpt`: always there, also after a signal, and always at a moment from which the run can be resumed exactly."""

import contextlib
import itertools
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from revdeq_lightning.checkpoints.files import make_folder, newest_good, remove, remove_leftovers, steps_of
from revdeq_lightning.checkpoints.names import BEST, LAST
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.tasks.training_step import is_logging_step, made_step, validation_follows

KEPT = re.compile(r"step-(\d+)\.ckpt")


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` after each validation, at intervals, at the end of training, and when a signal ends it.

    The checkpoints before it stay as `step-N.ckpt`, so that there is one to go back to if the newest is damaged. Saves
    only after an optimizer step: in the midst of accumulation, when a validation falls there, after the next one. What
    killed runs left half written in the folder is removed at the start. A run that goes on from an older checkpoint
    leaves the newer ones behind in a folder of their own, `left-at-step-N`, and says so.

    A checkpoint that cannot be written (a full disk) is a warning, if the trainer's `AtomicCheckpointIO` is told so; at
    the end of training, and when a signal ends it, it is an error.

    Args:
        folder: Where checkpoints lie; None: the folder `checkpoints` in the run's.
        keep_last: How many to keep, `last.ckpt` included.
        every_n_steps: Save after so many optimizer steps, too; None: not.
        every_minutes: Save when the newest is so old, too; None: not. Several processes look at logging steps.
        stop_signal: Number of the signal by which training ends after this step; 0 for none.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        keep_last: int = 2,
        every_n_steps: int | None = None,
        every_minutes: float | None = 30.0,
        stop_signal: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        for name, value, least in (("keep_last", keep_last, 1), ("checkpoint_every_n_steps", every_n_steps, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"checkpoint_every_minutes must be positive, got {every_minutes}: null for never")
        self.folder, self.keep_last = folder, keep_last
        self.every_n_steps, self.every_minutes, self.clock = every_n_steps, every_minutes, clock
        self.stop_signal = stop_signal
        self.path = Path()
        self.saved_step = -1
        self._step_of_file: int | None = None
        self._saved_at = 0.0
        self._due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, on all ranks that of the first; clean it up; see that it can be written to.

        Raises:
            CheckpointError: If not.
        """
        if stage == "fit":
            folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
            self.path = Path(trainer.strategy.broadcast(str(folder))) / LAST
            fault = self._prepare_folder() if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run else None
            if fault := trainer.strategy.broadcast(fault):
                raise CheckpointError(fault)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock begins."""
        self._saved_at = self.clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave what is newer than the checkpoint that the run goes on from."""
        if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run:
            self._leave_branch(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, or asked to end: then at once, for a validation that follows may take too long."""
        if not made_step(trainer):
            return
        if trainer.world_size == 1 or is_logging_step(trainer):
            late = self.every_minutes is not None and self.clock() - self._saved_at >= 60 * self.every_minutes
            # The first process's clock: the others' never say so before it.
            late = trainer.strategy.reduce_boolean_decision(late and trainer.is_global_zero, all=False)
            self._due = self._due or late
        at_interval = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        # A run resumed between a step and its validation would leave the validation out.
        if self.stop_signal() or ((self._due or at_interval) and not validation_follows(trainer)):
            # Lightning logs the step after this hook: of a run killed in between it would be missing.
            cast(Any, trainer)._logger_connector.update_train_step_metrics()
            self._save(trainer)
            self._require_saved(trainer, self.stop_signal())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, also what was saved before the validation: only now it is behind the run."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if made_step(trainer):
                self._save(trainer, again=True)
                self._require_saved(trainer, self.stop_signal())
            else:
                self._due = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last validation did not see.

        Raises:
            CheckpointError: If that fails.
        """
        self._save(trainer)
        self._require_saved(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End what a run that was killed at its very end had begun."""
        if trainer.is_global_zero and self._step_of_file is not None:
            self._prune()

    def _require_saved(self, trainer: Trainer, asked_to_end: int = True) -> None:
        """Raise on all ranks, if the run is to end and its newest checkpoint was not written."""
        fault = trainer.strategy.broadcast(self._failure(trainer)) if asked_to_end else None
        if fault:
            raise CheckpointError(fault)

    def _save(self, trainer: Trainer, *, again: bool = False) -> None:
        """Save on all ranks, unless it is done for this step; if all went well older ones may go."""
        if (self.saved_step == trainer.global_step and not again) or cast(Any, trainer).fast_dev_run:
            return
        if trainer.is_global_zero:
            self._keep_previous(trainer.global_step)
        self._saved_at, self._due = self.clock(), False
        trainer.save_checkpoint(self.path)
        if trainer.strategy.broadcast(self._failure(trainer)):
            self.saved_step = -1
            return
        self.saved_step = self._step_of_file = trainer.global_step
        if trainer.is_global_zero:
            self._prune()

    def _keep_previous(self, step: int) -> None:
        """Give the newest checkpoint a name of its own, before another takes `last.ckpt`."""
        previous = self._step_of_file
        if previous is None or previous >= step or not self.path.exists():
            return
        if self.keep_last == 1:
            return
        kept = self.path.with_name(f"step-{previous}.ckpt")
        if self.path.is_dir():
            with contextlib.suppress(OSError):  # as below
                remove(kept)
                self.path.rename(kept)
            return
        with contextlib.suppress(OSError):  # where nothing can be written the save after this one says so
            try:
                kept.unlink(missing_ok=True)
                os.link(self.path, kept)
            except OSError:
                self.path.replace(kept)  # no links there; until the new one is whole this one is the newest

    def _prune(self) -> None:
        """Keep the newest."""
        files = self._kept_files()
        for step in sorted(files)[: max(0, len(files) - self.keep_last + 1)]:
            remove(files[step])

    def _kept_files(self) -> dict[int, Path]:
        """Those of earlier steps, by their steps."""
        named = {path: KEPT.fullmatch(path.name) for path in self.path.parent.glob("step-*.ckpt")}
        return {int(match[1]): path for path, match in named.items() if match}

    def _leave_branch(self, step: int) -> None:
        """Put all of later steps aside: from here on the run writes others of these names."""
        newer = [path for number, path in sorted(self._kept_files().items()) if number > step]
        if self._step_of_file is not None and self._step_of_file > step:
            newer.append(self.path)
            self._step_of_file = None
        if not newer:
            return  # a `best.ckpt` alone is newer where a run was killed after a validation
        best, _ = steps_of([path for path in [self.path.with_name(BEST)] if path.exists()])
        newer += [path for path, steps in best.items() if steps.number > step]
        names = (f"left-at-step-{step}" + (f"-{k}" if k else "") for k in itertools.count())
        left = next(path for path in map(self.path.with_name, names) if not path.exists())
        left.mkdir()
        for path in newer:
            path.rename(left / path.name)
        begins = f"the run {'goes on from' if step else 'begins at'} step {step}"
        names_of_newer = ", ".join(path.name for path in newer)
        warnings.warn(
            f"{begins}: the checkpoints of later steps ({names_of_newer}) are in {left} now",
            stacklevel=2,
        )

    def _prepare_folder(self) -> str | None:
        folder = self.path.parent
        probe = folder / f".probe.{os.getpid()}.part"
        try:
            make_folder(folder)
            probe.write_bytes(b"x")
            remove_leftovers(folder)  # the probe, too
        except OSError as error:
            return f"checkpoints cannot be written to {folder}: {error.strerror or error}; choose another run.folder"
        steps, _ = steps_of([self.path] if self.path.exists() else [])
        self._step_of_file = steps[self.path].number if steps else None
        return None

    def _failure(self, trainer: Trainer) -> str | None:
        error = getattr(trainer.strategy.checkpoint_io, "failures", {}).get(self.path)
        if error is None:
            return None
        earlier = (
            "what was saved before is intact" if newest_good(self.path.parent).path else "nothing was saved before"
        )
        return f"the run's end could not be saved to {self.path}: {error.strerror or error}; {earlier}"
