"""The run's checkpoints as W&B artifacts."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from revdeq_lightning.checkpoints.names import BEST, LAST
from revdeq_lightning.loggers.endurance import survival


class WandbCheckpoints(Callback):
    """Hands the checkpoints to W&B at the end of training, also after an interruption.

    One artifact `model-RUN` of type `model` with `best.ckpt` and `last.ckpt`; the versions of a resumed run follow each
    other. An offline run keeps a copy, which `wandb sync` sends. Logs no keys; does nothing without a `WandbLogger`.

    Args:
        folder: Where the checkpoints lie.

    Example:
        `Trainer(callbacks=[WandbCheckpoints("runs/mine/checkpoints")], logger=WandbLogger())`
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._send(trainer)  # here, as the last checkpoint is written in `on_train_end`

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._send(trainer)

    def _send(self, trainer: Trainer) -> None:
        files = [path for path in (self.folder / BEST, self.folder / LAST) if path.is_file()]
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not files or not trainer.is_global_zero:
            return
        for logger in loggers:
            with survival(logger):
                import wandb

                run: Any = logger.experiment
                artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"step": trainer.global_step})
                for file in files:
                    artifact.add_file(str(file), name=file.name)
                run.log_artifact(artifact)
