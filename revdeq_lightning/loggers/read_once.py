"""Reads what a step logged from the device with one wait."""

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from revdeq_lightning.equilibrium import checks
from revdeq_lightning.host import read
from revdeq_lightning.tasks.training_step import is_logging_step


class ReadOnce(Callback):
    """Copies all numbers of a logging step to the host together; Lightning would wait for each of them.

    Must come after the callbacks that log and before those that show. Logs no keys.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_logging_step(trainer):
            return
        logged = [m for m in cast(Any, trainer)._results.values() if m.is_tensor and m.meta.on_step]  # no public way
        on_device = [m for m in logged if isinstance(v := m._forward_cache, Tensor) and checks.host_must_wait(v.device)]
        if on_device:
            for metric, value in zip(on_device, read([m._forward_cache for m in on_device]), strict=True):
                metric._forward_cache = value
