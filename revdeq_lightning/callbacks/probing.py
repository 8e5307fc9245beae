"""What the callbacks share that run the training step on the side."""

from abc import abstractmethod
from typing import Any

from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.equilibrium import equilibria
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.runs.probe import Loss, reason_against
from revdeq_lightning.tasks.training_step import log_now, made_step


class AbstractProbing(Callback):
    """Logs figures of some samples of a batch at every n-th optimizer step; the run is bit for bit the same without.

    Assumes that f does not mix samples, automatic optimization and a `training_step` that returns the loss and can be
    called with fewer samples: a batch is cut along the first dimension of its tensors. What the step changes besides
    buffers and metrics of torchmetrics is not restored; give a `loss` then.

    Raises:
        ValueError: When training starts, if the module cannot be asked in this way: manual optimization without `loss`,
            sharded parameters, no equilibrium.
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
