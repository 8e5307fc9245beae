"""What every task shares: optimizer, schedule and averaged weights from one dataclass."""

from typing import Any, NamedTuple

from lightning import Callback, LightningModule
from torch import nn

from revdeq_lightning.callbacks.averaged_weights import AveragedWeights
from revdeq_lightning.equilibrium import SolverStats
from revdeq_lightning.optimizers import OptimizerConfig, WindowedPlateau, build_optimizer, build_scheduler
from revdeq_lightning.tasks.checkpoint_fit import changed_settings, check_optimizer, check_weights


class TrainingOutput(NamedTuple):
    """What a training step hands to callbacks beside the loss, under the key `step`.

    Attributes:
        stats: How each equilibrium of the model was reached, in their order; empty without a solver.
        num_items: What this process trained on in this step, in units of `unit`.
        unit: "tokens" or "images".
    """

    stats: tuple[SolverStats, ...]
    num_items: int
    unit: str


class AbstractTask(LightningModule):
    """A model, its loss and its optimizer."""

    model: nn.Module

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.optimizer_config = optimizer

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the schedule over the whole run, stepped after each optimizer step."""
        optimizer = build_optimizer(self.model, self.optimizer_config)
        scheduler = build_scheduler(optimizer, self.optimizer_config, self.trainer.estimated_stepping_batches)
        if scheduler is None:
            return optimizer
        schedule: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, WindowedPlateau):
            # Lightning's turn for it comes after a step's checkpoint, in which it would be missing.
            schedule["reduce_on_plateau"] = False
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule after an optimizer step; one that watches the loss gets it."""
        if isinstance(scheduler, WindowedPlateau):
            metric = self.trainer.callback_metrics["train/loss"]
        super().lr_scheduler_step(scheduler, metric)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model; say which settings of the optimizer stay those of the checkpoint.

        Raises:
            CheckpointError: If the checkpoint does not fit.
        """
        if "state_dict" not in checkpoint:  # of shards, which are compared as they are read
            return
        there = checkpoint.get("hyper_parameters", {})
        changed = changed_settings(there, dict(self.hparams))
        check_weights(checkpoint["state_dict"], self.state_dict(), changed)
        if self.trainer.state.fn == "fit":
            check_optimizer(changed)

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights during a fit, if asked to; checkpoints hold the average in place of the weights."""
        averaging = self.optimizer_config.ema_decay > 0 and self.trainer.state.fn == "fit"
        return [AveragedWeights(self.optimizer_config.ema_decay)] if averaging else []
