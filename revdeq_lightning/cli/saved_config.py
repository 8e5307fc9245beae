"""Saves the resolved configuration in the run's folder."""

import os
from typing import Any, cast

import yaml
from lightning import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from revdeq_lightning.cli.yaml_text import dump_yaml, without_interpolation
from revdeq_lightning.runs.environment import describe_environment, replace_text, write_environment
from revdeq_lightning.runs.folder import CONFIG, ENVIRONMENT, RunConfig
from revdeq_lightning.runs.random_state import SEED
from revdeq_lightning.tasks.training_step import run_folder


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration and the environment of a training run in its folder, and sends them to the loggers.

    This happens when training starts: until then, a start may be refused, and nothing in the folder changes. Settings
    that a resumed run takes from its checkpoint are recorded as they are used.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None: ...

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        folder = run_folder(trainer, None)
        if trainer.is_global_zero:
            config = self.config
            config.ckpt_path = config.run.version = None  # a relaunch from this file is a new run
            config.run.resume = RunConfig.resume
            for name, value in pl_module.hparams["optimizer"].items():
                config.model.optimizer[name] = value
            config.data.batch_size = trainer.datamodule.used_batch_size  # type: ignore[attr-defined]
            if config.seed_everything is not False:
                config.seed_everything = int(os.environ[SEED])
            settings = yaml.safe_load(self.parser.dump(config, skip_none=False))
            replace_text(folder / CONFIG, dump_yaml(without_interpolation(settings)))
            data = trainer.datamodule.found()  # type: ignore[attr-defined]
            environment = describe_environment(trainer.world_size) | {"data": data}
            write_environment(folder / ENVIRONMENT, environment)
            for logger in trainer.loggers:
                logger.log_hyperparams(settings | {"environment": environment})
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        for logger in trainer.loggers:  # also of a run that was complete already, for its final test
            cast(Any, logger).release()
