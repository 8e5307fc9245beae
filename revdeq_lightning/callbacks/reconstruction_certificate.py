"""Whether every gradient of a run was exact."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from revdeq_lightning.callbacks.abstract import AbstractWatching
from revdeq_lightning.equilibrium import (
    ReconstructionError,
    ReconstructionWarning,
    SolverStats,
    check_later,
    equilibria,
    settle_checks,
)
from revdeq_lightning.equilibrium.validation import require_choice
from revdeq_lightning.processes import summed
from revdeq_lightning.program import say
from revdeq_lightning.runs.signals import Stopped
from revdeq_lightning.tasks.training_step import is_logging_step, log_now, log_on_host, run_folder

POLICIES = ("warn", "raise", "stop")
INEXACT = "inexact.ckpt"


class ReconstructionCertificate(AbstractWatching):
    """Adds up the reconstruction mismatches of every backward pass and reports how many gradients are exact.

    A gradient is the backward pass of one batch on one process, through all equilibria of the model. It is certified
    exact if every initial state was reconstructed bit for bit. At the end of training the first process prints
    "N of N gradients certified exact". A `DivergenceGuard` reads the mismatches with its own numbers; without one, the
    host waits for the device at logging steps. The counts are kept in checkpoints.

    Keys, at each logging step and at the end, sums over the run and all processes: `equilibrium/num_gradients`,
    `equilibrium/num_certified_gradients`, `equilibrium/total_reconstruction_mismatch` (elements).

    Batches of which nothing is reconstructed (`BackpropAdjoint`) are not counted. A state held in "float64" or
    "float32" is not reconstructed exactly by construction: its gradients are counted, but the policy acts on exact
    arithmetic only. `ReversibleAdjoint(mismatch=...)` has a policy that acts in the backward pass itself.

    Args:
        policy: What to do at the first logging step after a gradient that is not exact: "warn" (once), "raise", or
            "stop": save `inexact.ckpt` and end the training.
        folder: Folder of that checkpoint; None: `checkpoints` in the run's folder.

    Raises:
        ReconstructionError: During training, if a gradient is not exact and the policy is "raise".
    """

    def __init__(self, policy: str = "warn", folder: str | Path | None = None) -> None:
        require_choice("policy", policy, POLICIES)
        self.policy, self.folder = policy, folder
        self.num_gradients = self.num_certified = self.mismatch = 0
        """Of the run and all processes, as of the newest logging step, checkpoint or end."""
        self._new = [0, 0, 0]
        self._is_counted = False
        self._num_forgiven = self._num_logged = 0
        self._is_told = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._new, self._is_counted = [0, 0, 0], False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count(self.take(None))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if not self._is_counted:  # solves without an EquilibriumLayer
            self._count(self.take(outputs))
        self._is_counted = False
        if is_logging_step(trainer):
            self._gather(trainer)
            if self.num_gradients:
                log_on_host(pl_module, self._figures)
                self._num_logged = self.num_gradients
            if self._must_tell(pl_module):
                self._tell(trainer, self._stop(trainer) if self.policy == "stop" else "")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._gather(trainer)
        if self.num_gradients > self._num_logged:
            log_now(trainer, self._figures)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.num_gradients and trainer.is_global_zero:
            say(self.summary)
        if self._must_tell(pl_module):
            self._tell(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        # Otherwise the device or the other processes may not respond.
        if trainer.world_size == 1 and isinstance(exception, KeyboardInterrupt | Stopped):
            self._gather(trainer)
        if self.num_gradients and trainer.is_global_zero:
            say(self.summary)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._gather(trainer)  # Lightning calls this on all processes
        checkpoint["reconstruction_certificate"] = [self.num_gradients, self.num_certified, self.mismatch]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            counts = checkpoint.get("reconstruction_certificate", [0, 0, 0])
            self.num_gradients, self.num_certified, self.mismatch = counts
            self._num_forgiven = self.num_gradients - self.num_certified  # the policy acted on them before

    @property
    def summary(self) -> str:
        """The certificate in one line."""
        text = f"{self.num_certified:,} of {self.num_gradients:,} gradients certified exact"
        return text if not self.mismatch else f"{text} ({self.mismatch:,} elements were not reconstructed)"

    @property
    def _figures(self) -> dict[str, float]:
        names = ("num_gradients", "num_certified_gradients", "total_reconstruction_mismatch")
        counts = (self.num_gradients, self.num_certified, self.mismatch)
        return {f"equilibrium/{name}": float(count) for name, count in zip(names, counts, strict=True)}

    @property
    def _message(self) -> str:
        return (
            f"{self.num_gradients - self.num_certified} of {self.num_gradients} gradients are not exact"
            f" ({self.mismatch} elements were not reconstructed): f was not the same function in the forward and the"
            " backward pass. ReversibleAdjoint(mismatch='raise') stops at the first one and says what to look for"
        )

    def _count(self, stats: Sequence[SolverStats]) -> None:
        """Count the gradient of one batch, when its mismatch is known."""
        mismatches = [s.reconstruction_mismatch for s in stats if s.reconstruction_mismatch is not None]
        if mismatches:
            self._is_counted = True
            check_later(torch.stack([m.to(mismatches[0].device) for m in mismatches]).sum(), self._add)

    def _add(self, numbers: list[float]) -> None:
        mismatch = int(numbers[0])
        self._new = [old + new for old, new in zip(self._new, (1, mismatch == 0, mismatch), strict=True)]

    def _must_tell(self, pl_module: LightningModule) -> bool:
        """Whether a gradient of exact arithmetic is not exact, and this was not reported yet."""
        is_new = self.num_gradients - self.num_certified > self._num_forgiven
        is_exact = all(getattr(layer.solver, "is_exact", True) for layer in equilibria(pl_module))
        return is_new and not self._is_told and is_exact

    def _gather(self, trainer: Trainer) -> None:
        """Add the new counts of all processes; all must call it."""
        settle_checks()
        num_gradients, num_certified, mismatch = summed(self._new)
        self.num_gradients += num_gradients
        self.num_certified += num_certified
        self.mismatch += mismatch
        self._new = [0, 0, 0]

    def _stop(self, trainer: Trainer) -> str:
        path = Path(self.folder or run_folder(trainer, None) / "checkpoints") / INEXACT
        trainer.save_checkpoint(path)
        trainer.should_stop = True
        return f". Training ends after this step; checkpoint: {path}"

    def _tell(self, trainer: Trainer, outcome: str = "") -> None:
        self._is_told = True
        if self.policy == "raise":
            raise ReconstructionError(self._message)
        if trainer.is_global_zero:
            warnings.warn(self._message + outcome, ReconstructionWarning, stacklevel=2)
