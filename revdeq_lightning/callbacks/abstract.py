"""What several callbacks share: they watch the solves, run the training step on the side, or act at validations."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from revdeq_lightning.equilibrium import FixedPointSolution, SolverStats, equilibria
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.runs.probe import Loss, Probe, reason_against
from revdeq_lightning.tasks.training_step import log_now, made_step, run_folder


class AbstractWatching(Callback):
    """Has the statistics of each training step's solves, for any LightningModule: `self.take(outputs)`.

    A training step can return them as `outputs["step"].stats`; otherwise, hooks on the equilibrium layers collect them.
    """

    _handles: Sequence[RemovableHandle] = ()
    _heard: list[SolverStats]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heard = []
        hook = partial(_listen, self._heard)  # no method: a pickle of the module would hold the callback
        self._handles = [layer.register_forward_hook(hook) for layer in equilibria(pl_module)]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    on_train_end = on_exception

    def take(self, outputs: Any) -> tuple[SolverStats, ...]:
        """Statistics of the step that returned `outputs`; call once per batch, in `on_train_batch_end`."""
        heard = tuple(self._heard)
        self._heard.clear()
        step: Any = outputs.get("step") if isinstance(outputs, Mapping) else None
        return tuple(step.stats) if hasattr(step, "stats") else heard


def _listen(heard: list[SolverStats], layer: nn.Module, args: Any, solution: FixedPointSolution) -> None:
    if layer.training and torch.is_grad_enabled() and not Probe.num_active:
        heard += [part.stats for part in (*solution.earlier, solution)]


class AbstractProbing(Callback):
    """Logs figures of some samples of a batch at every n-th optimizer step, without changing the run by a bit.

    Assumes that f does not mix samples, automatic optimization and a `training_step` that returns the loss and can be
    called with fewer samples: a batch is cut along the first dimension of its tensors. What the step changes besides
    buffers and metrics of torchmetrics is not restored; give a `loss` then.

    Raises:
        ValueError: When training starts: manual optimization without `loss`, sharded parameters, or no equilibrium.
    """

    def __init__(self, every_n_steps: int, num_samples: int, loss: Loss | None) -> None:
        require_count("every_n_steps", every_n_steps)
        require_count("num_samples", num_samples)
        self.every_n_steps, self.num_samples, self.loss = every_n_steps, num_samples, loss

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        if reason := reason_against(pl_module, self.loss):
            raise ValueError(f"{name} cannot run the training step on the side: {reason}")
        if not equilibria(pl_module):
            raise ValueError(f"{name} needs an EquilibriumLayer, and {type(pl_module).__name__} has none")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 and made_step(trainer):
            log_now(trainer, self.measure(trainer, pl_module, batch))

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
        """The figures of a batch, under their keys; all processes must call it."""


class AbstractAtValidations(Callback):
    """Acts at every n-th validation of the training and writes into a folder, also in a resumed run.

    With `at_least=0`, `every_n_validations=0` is allowed and means never.
    """

    def __init__(self, folder: str | Path | None, every_n_validations: int, *, at_least: int = 1) -> None:
        require_count("every_n_validations", every_n_validations, at_least=at_least)
        self.folder, self.every_n_validations = folder, every_n_validations
        self.num_validations = 0
        self.where = Path()
        self._is_due = False
        self._survives = Survives(type(self).__name__)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.where = run_folder(trainer, self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with self._survives:
                self.rewind(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = False
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.every_n_validations:
            self.num_validations += 1
            self._is_due = self.num_validations % self.every_n_validations == 0

    def state_dict(self) -> dict[str, int]:
        return {"num_validations": self.num_validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.num_validations = state_dict["num_validations"]

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Drop what an interrupted run wrote at this step and later ones."""
