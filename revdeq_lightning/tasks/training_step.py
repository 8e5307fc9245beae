"""What callbacks ask of a training step, and how they log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer


def made_step(trainer: Trainer) -> bool:
    """Whether this batch ended with an optimizer step, not only accumulated (use in `on_train_batch_end`)."""
    return not cast(Any, trainer.fit_loop)._should_accumulate()


def is_logging_step(trainer: Trainer) -> bool:
    """Whether Lightning logs metrics after this optimizer step (use in `on_train_batch_end`).

    Never if `log_every_n_steps` is 0.
    """
    every: int = cast(Any, trainer).log_every_n_steps
    return every != 0 and trainer.global_step % every == 0 and made_step(trainer)


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates between this batch and the next (use in `on_train_batch_end`)."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def log_on_host(module: LightningModule, values: Mapping[str, float]) -> None:
    """Log numbers at this step; Lightning would send each to the device, and wait for it."""
    module.log_dict({key: torch.tensor(float(value)) for key, value in values.items()}, on_step=True, on_epoch=False)


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log metrics of only this step; `LightningModule.log` would repeat them at each logging step of the epoch.

    They get the step's number and are in `trainer.callback_metrics`, as if logged by the module.
    """
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step - 1)
        logger.save()


def run_folder(trainer: Trainer, folder: str | Path | None) -> Path:
    """The given folder, or that of the run on the first process; all processes must call it."""
    return Path(folder or trainer.log_dir or trainer.default_root_dir)
