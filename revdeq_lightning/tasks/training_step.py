"""What several callbacks ask about a training step: whether it is logged, and how its equilibria were reached."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from revdeq_lightning.equilibrium import FixedPointSolution, SolverStats, equilibria


def made_step(trainer: Trainer) -> bool:
    """Whether this batch ended in an optimizer step, not only in gradients added up (ask in `on_train_batch_end`)."""
    return not cast(Any, trainer.fit_loop)._should_accumulate()


def is_logging_step(trainer: Trainer) -> bool:
    """Whether Lightning hands metrics to the loggers after this optimizer step (ask in `on_train_batch_end`).

    Never, if `log_every_n_steps` is 0.
    """
    every: int = cast(Any, trainer).log_every_n_steps
    return every != 0 and trainer.global_step % every == 0 and made_step(trainer)


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after this batch, before the next (ask in `on_train_batch_end`)."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log figures of this step alone: `LightningModule.log` would repeat them at each logging step of the epoch.

    They get the step's number and are in `trainer.callback_metrics`, as if they had been logged by the module.
    """
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step - 1)
        logger.save()


def run_folder(trainer: Trainer, folder: str | Path | None) -> Path:
    """The folder that was given, or the run's; all processes must ask, for it is the first one's."""
    return Path(folder or trainer.log_dir or trainer.default_root_dir)


class StepStatistics:
    """How the equilibria of a training step were reached, whosever the module is.

    The training step hands it on as `outputs["step"].stats`; of a module that does not, the equilibrium layers are
    listened to.
    """

    _deaf = 0

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._heard: list[SolverStats] = []

    def attach(self, module: nn.Module) -> None:
        """Listen to the layers of a module."""
        self.detach()
        self._handles = [layer.register_forward_hook(self._listen) for layer in equilibria(module)]

    def detach(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._heard = [], []

    def take(self, outputs: Any) -> tuple[SolverStats, ...]:
        """Of the step that returned `outputs`; call it once a batch, in `on_train_batch_end`."""
        heard, self._heard = tuple(self._heard), []
        step: Any = outputs.get("step") if isinstance(outputs, Mapping) else None
        return tuple(step.stats) if hasattr(step, "stats") else heard

    def _listen(self, layer: nn.Module, args: Any, solution: FixedPointSolution) -> None:
        if layer.training and torch.is_grad_enabled() and not StepStatistics._deaf:
            self._heard += [part.stats for part in (*solution.earlier, solution)]

    @staticmethod
    @contextmanager
    def unheard() -> Iterator[None]:
        """Within, no solve belongs to a training step."""
        StepStatistics._deaf += 1
        try:
            yield
        finally:
            StepStatistics._deaf -= 1
