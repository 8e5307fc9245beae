"""Where a training run is logged to."""

from collections.abc import Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.loggers.wandb_logger import wandb_logger
from revdeq_lightning.runs.folder import RunConfig


def run_loggers(run: RunConfig, own: Sequence[Logger]) -> list[Logger]:
    """The CSV file of every run, the user's own loggers, and what the run's settings ask for."""
    loggers: list[Logger] = [ContinuedCSVLogger(run.path), *own]
    if (wandb := wandb_logger(run)) is not None:
        loggers.append(wandb)
    if run.tensorboard:
        loggers.append(TensorBoardLogger(run.path, name="tensorboard", version="", default_hp_metric=False))
    return loggers
