"""Make all ranks start from the same checkpoint, and end after the same step at Ctrl-C or a scheduler's signal."""

import signal
import threading
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.processes import largest
from revdeq_lightning.program import say
from revdeq_lightning.runs.signals import STOP, Stopped
from revdeq_lightning.tasks.training_step import made_step


def agree(trainer: Trainer, diverged: bool = False) -> bool:
    """Tell all processes, which must call it, of a signal that one received; return whether any process diverged."""
    if trainer.world_size == 1:
        STOP.agreed = STOP.received
        return diverged
    anyones, STOP.agreed = largest([diverged, STOP.received])
    STOP.has_agreed = True
    return bool(anyones)


class SameStart(Callback):
    """Raises FileNotFoundError on every rank if one does not see the checkpoint from which the first rank resumes.

    This happens if the run folder is not on a shared file system. A rank that starts from scratch while others resume
    would spoil the run, or hang.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.world_size == 1:
            return
        own = str(trainer.ckpt_path or "")
        first = trainer.strategy.broadcast(own)
        if not trainer.strategy.reduce_boolean_decision(own == first):
            raise FileNotFoundError(
                f"rank {trainer.global_rank} would start from {own or 'nothing'}, the first rank from "
                f"{first or 'nothing'}: run.folder must be on a file system that all machines share"
            )


class StopSignal(Callback):
    """Ends training at Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, on all ranks after the same optimizer step.

    A signal may reach only one rank, or each at a different time; ranks that acted on their own would deadlock in
    different collectives. Therefore, the handler only records the signal, and the ranks agree at each optimizer step.
    `LastCheckpoint` saves once they do, and training ends when the next step starts. A validation in progress, or due
    after that step, is finished first. A test is interrupted, because it has no state to save.

    A second Ctrl-C ends training immediately, without a checkpoint.
    """

    def __init__(self) -> None:
        self._previous_interrupt: Any = None
        self._took = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._took = STOP.take() or self._took
        # Neither has a public option. Lightning's handlers call collectives, and under SLURM save, at any time: a rank
        # that receives the signal in a different collective hangs.
        cast(Any, trainer)._signal_connector.register_signal_handlers = lambda: None
        # Before each batch, Lightning broadcasts whether they received SIGTERM, and waits for the device.
        cast(Any, trainer).fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous_interrupt = signal.signal(signal.SIGINT, self._interrupt)
        agree(trainer)  # a signal received by now ends the run before its first step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end_if_asked()  # not earlier: Lightning logs the last step's metrics after its `on_train_batch_end`
        STOP.has_agreed = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if made_step(trainer) and not STOP.has_agreed:
            agree(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            self.on_test_batch_end(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        agree(trainer)
        self._end_if_asked()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception):  # otherwise ignore Ctrl-C while training shuts down
            self._give_back_interrupt()
        self.teardown(trainer, pl_module, "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back_interrupt()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._took:  # not if the program took them
            STOP.give_back()
            self._took = False

    def _end_if_asked(self) -> None:
        if not STOP.agreed:
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # everything is saved
        name = signal.Signals(STOP.agreed).name
        raise Stopped("Interrupted" if STOP.agreed == signal.SIGINT else f"Stopped by {name}")

    def _interrupt(self, *_: Any) -> None:
        STOP.received = signal.SIGINT
        self._give_back_interrupt()
        if cast(Any, rank_zero_only).rank == 0:
            say("\nStopping with a checkpoint after this step (Ctrl-C again: stop now, without it) ...")

    def _give_back_interrupt(self) -> None:
        if self._previous_interrupt is not None:
            signal.signal(signal.SIGINT, self._previous_interrupt)
            self._previous_interrupt = None
