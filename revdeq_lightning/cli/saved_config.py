"""Saves the resolved configuration in the run's folder."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from revdeq_lightning.runs.environment import describe_environment, write_environment
from revdeq_lightning.runs.folder import CONFIG, ENVIRONMENT, RunConfig
from revdeq_lightning.tasks.training_step import run_folder


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration and the environment of a training run in its folder, and sends them to W&B."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.config.ckpt_path = self.config.run.version = None  # a relaunch from this file is a new run
            self.config.run.resume = RunConfig.resume
            self.folder = run_folder(trainer, None)
            name, self.config_filename = self.config_filename, f".{CONFIG}.part"
            super().setup(trainer, pl_module, stage)
            self.config_filename = name
            part = self.folder / f".{CONFIG}.part"
            if trainer.is_global_zero and part.is_file():
                part.replace(part.with_name(name))  # atomic: a kill leaves the old file intact

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        environment = describe_environment(trainer.world_size)
        write_environment(self.folder / ENVIRONMENT, environment)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict() | {"environment": environment})
