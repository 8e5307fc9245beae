"""What the callbacks share that do something at every n-th validation within training."""

from abc import abstractmethod
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.tasks.training_step import run_folder


class AbstractAtValidations(Callback):
    """Finds the folder and counts the validations of the training, also over a resumption.

    Args:
        folder: Where to write; None: the run's.
        every_n_validations: Validations from one time to the next.
        at_least: 0 where `every_n_validations=0` is allowed and means never.
    """

    def __init__(self, folder: str | Path | None, every_n_validations: int, *, at_least: int = 1) -> None:
        require_count("every_n_validations", every_n_validations, at_least=at_least)
        self.folder, self.every_n_validations = folder, every_n_validations
        self.num_validations = 0
        self.where = Path()
        self._is_due = False
        self._survives = Survives(type(self).__name__)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.where = run_folder(trainer, self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with self._survives:
                self.rewind(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = False
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.every_n_validations:
            self.num_validations += 1
            self._is_due = self.num_validations % self.every_n_validations == 0

    def state_dict(self) -> dict[str, int]:
        return {"num_validations": self.num_validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.num_validations = state_dict["num_validations"]

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Drop what an interrupted run wrote at this step and later ones."""
