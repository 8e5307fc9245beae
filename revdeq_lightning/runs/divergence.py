"""Stop a run with a non-finite loss, state, or gradient before the optimizer step, and save the batch."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from revdeq_lightning.checkpoints.files import write_checkpoint
from revdeq_lightning.equilibrium import DivergenceError, check_later, deferred_divergence, equilibria, settle_checks
from revdeq_lightning.processes import gathered, largest, local, whole
from revdeq_lightning.program import program
from revdeq_lightning.runs.random_state import random_state
from revdeq_lightning.runs.stop_signal import agree
from revdeq_lightning.tasks.training_step import run_folder

DIVERGED = "diverged"
WEIGHTS = "weights.ckpt"
MOST_FILES = 8
"""Number of processes that save their batches if none can be identified as the cause."""


class DivergedError(RuntimeError):
    """Training cannot continue; the message is one line."""


class DivergenceGuard(Callback):
    """Check loss and gradient before each optimizer step, and the weights before each validation and checkpoint.

    If they are not finite, it raises `DivergedError` on all processes, with the weights from before the step. The
    batches of the step, their random states, and the weights are saved in the run's folder for `revdeq replay`. An
    equilibrium that diverges on one process returns NaN there (`deferred_divergence`), which reaches the other
    processes with the gradient.

    It costs one read of the gradient and, per step, one wait for the device, in which all checks of the solves are
    read too, and one small exchange on the host, which also tells the processes of a `StopSignal`. With a gradient
    scaler (16-mixed), which skips overflowing steps by itself, only the loss is checked. Must come after callbacks that
    call `training_step`.

    Args:
        folder: Folder of the run; None: the trainer's.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._path = Path()
        self._batches: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._errors: list[DivergenceError] = []
        self._validation_errors: list[DivergenceError] = []
        self._begins, self._in_step = True, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._path = run_folder(trainer, self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def guarded(step: Callable[..., Any], errors: list[DivergenceError], is_training: bool) -> Callable[..., Any]:
            @functools.wraps(step)
            def guarded_step(*args: Any, **kwargs: Any) -> Any:
                if is_training and not self._in_step:  # called by another callback: raise immediately
                    return step(*args, **kwargs)
                with deferred_divergence(errors):
                    return step(*args, **kwargs)

            return guarded_step

        pl_module.__dict__ |= {
            "training_step": guarded(pl_module.training_step, self._errors, True),
            "validation_step": guarded(pl_module.validation_step, self._validation_errors, False),
        }

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._begins:
            for kept in (self._batches, self._losses, self._errors):
                kept.clear()
        solvers = [asdict(cast(Any, layer.solver)) for layer in equilibria(pl_module)]
        # Named tuples become dictionaries, because a checkpoint contains no classes.
        plain = batch._asdict() if hasattr(batch, "_asdict") else batch
        self._batches.append({"batch": plain, "random_state": random_state(), "solvers": solvers})
        self._begins, self._in_step = False, True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._in_step = False
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._begins = True
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = () if scaled else (p.grad for p in pl_module.parameters() if p.grad is not None)
        diverged = not all_finite([*self._losses, *norms(gradients)]) or bool(self._errors)
        if agree(trainer, diverged):
            self._end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_errors.clear()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_weights(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            settle_checks()
            for error in chain(*gathered([str(error) for error in self._validation_errors[:1]])):
                self._raise(trainer, f"in the validation {error}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._check_weights(trainer, pl_module)

    def _check_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights: an update may overflow although its gradient does not."""
        finite = all_finite(norms(p.detach() for p in pl_module.parameters()))
        if largest([not finite])[0]:
            self._raise(trainer, "the weights are not finite: the last update overflowed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name in ("training_step", "validation_step"):
            pl_module.__dict__.pop(name, None)
        self._batches.clear()

    on_train_end = on_exception

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mine = bool(self._errors) or not all_finite(self._losses)
        (anyones,) = largest([mine])
        losses = ", ".join(f"{loss.item():.4g}" for loss in self._losses)
        if self._errors:
            reason = str(self._errors[0])
        elif mine:
            reason = f"the loss is not finite ({losses})"
        else:
            reason = f"the gradient is not finite (loss {losses})"
        keeps = mine or (not anyones and trainer.global_rank < MOST_FILES)
        kept = self._keep(trainer, pl_module, reason if keeps else None)
        rank, reason, kept = next(filter(None, gathered((trainer.global_rank, reason, kept) if keeps else None)))
        where = f" on process {rank}" if trainer.world_size > 1 else ""
        self._raise(trainer, f"{reason}{where}", f"; {kept}")

    def _raise(self, trainer: Trainer, reason: str, kept: str = "") -> None:
        step = trainer.global_step + 1
        raise DivergedError(f"training diverged in step {step}: {reason}. No optimizer step followed{kept}")

    def _keep(self, trainer: Trainer, pl_module: LightningModule, reason: str | None) -> str:
        """Write the weights (first process) and, with a reason, this process's batches, and report them."""
        folder = self._path / DIVERGED / f"step-{trainer.global_step + 1}"
        state = {name: whole(value) for name, value in pl_module.state_dict().items()}
        path = folder / f"process-{trainer.global_rank}.ckpt"
        try:
            if trainer.is_global_zero:
                write_checkpoint({"state_dict": state}, folder / WEIGHTS)
            if reason is not None:
                content = {
                    "task": type(pl_module).__name__,
                    "hyper_parameters": dict(pl_module.hparams),
                    "precision": str(trainer.precision),
                    "global_step": trainer.global_step,
                    "reason": reason,
                    "batches": self._batches,
                }
                write_checkpoint(content, path)
        except OSError as error:
            return f"its batch could not be saved in {folder}: {error.strerror or error}"
        return f"to replay the batch: {program()} replay --file {path}"


@torch.no_grad()
def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The norm of each tensor's local part; finite if all values are finite and below 1e19."""
    parts = [part for part in map(local, tensors) if part.numel()]
    return list(torch._foreach_norm(parts)) if parts else []


def all_finite(values: list[Tensor]) -> bool:
    """Whether all numbers are finite, read with all that the solves left to be checked: one wait for the device."""
    found: list[float] = []
    if values:
        check_later(torch.stack([value.float() for value in values]).isfinite().all(), found.extend)
    settle_checks()
    return all(found)
