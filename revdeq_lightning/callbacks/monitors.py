"""What the equilibrium costs and how good it is, and how fast training runs."""

import time
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer


def is_logging_step(trainer: Trainer) -> bool:
    """Whether Lightning hands metrics to the loggers after this optimizer step (ask in `on_train_batch_end`)."""
    return bool(trainer.global_step % cast(Any, trainer).log_every_n_steps == 0)


class EquilibriumMonitor(Callback):
    """Logs the statistics of the newest solves at each logging step; on other steps nothing waits for the device.

    Keys: `equilibrium/forward_nfe` and `equilibrium/backward_nfe` (evaluations of f, of all equilibria of the model
    together), `equilibrium/relative_residual` (mean over batch and equilibria), `equilibrium/reconstruction_mismatch`
    (elements; 0 certifies the gradient). Of rank 0. A model without solver logs none, nor an adjoint what it does not
    have.

    Assumes that the training step returns the statistics as `outputs["step"].stats`.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at a logging step, after the backward pass has filled in its part."""
        stats = outputs["step"].stats
        if not stats or not is_logging_step(trainer):
            return
        values = {
            name: total([getattr(s, name) for s in stats])
            for name in ("forward_nfe", "backward_nfe", "reconstruction_mismatch")
        }
        values["relative_residual"] = torch.stack([s.relative_residual.mean() for s in stats]).mean()
        known = {f"equilibrium/{name}": torch.as_tensor(v).float() for name, v in values.items() if v is not None}
        pl_module.log_dict(known, on_step=True, on_epoch=False)


def total(values: list[Any]) -> Any:
    """Sum of numbers or 0-dim tensors; None if one is not known."""
    return None if any(value is None for value in values) else sum(values)


class ThroughputMonitor(Callback):
    """Logs `system/tokens_per_second` or `system/images_per_second` between logging steps, of all processes together.

    Evaluation does not count.

    Assumes that the training step returns what it processed as `outputs["step"].num_items` and `.unit`.
    """

    def __init__(self) -> None:
        self._count = 0
        self._seconds = 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._count, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; log at a logging step."""
        self._count += outputs["step"].num_items
        if is_logging_step(trainer):
            self._pause(pl_module)
            rate = self._count * trainer.world_size / self._seconds
            pl_module.log(f"system/{outputs['step'].unit}_per_second", rate, on_step=True, on_epoch=False)
            self.on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._since = time.perf_counter()

    def _pause(self, pl_module: LightningModule) -> None:
        if self._since is not None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self._seconds += time.perf_counter() - self._since
            self._since = None
