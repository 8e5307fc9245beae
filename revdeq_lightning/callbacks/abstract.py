"""What several callbacks share: they watch the solves, run the training step on the side, or act at validations."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.equilibrium import equilibria
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.runs.probe import Loss, reason_against
from revdeq_lightning.tasks.training_step import StepStatistics, log_now, made_step, run_folder


class AbstractWatching(Callback):
    """Has the statistics of each training step's solves: `self._statistics.take(outputs)`."""

    def __init__(self) -> None:
        self._statistics = StepStatistics()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._statistics.attach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._statistics.detach()

    on_train_end = on_exception


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
