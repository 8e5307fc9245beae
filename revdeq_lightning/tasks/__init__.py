"""Tasks: models with their losses and optimizers."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.tasks.base import AbstractTask as AbstractTask, TrainingOutput as TrainingOutput
    from revdeq_lightning.tasks.classification import ClassificationTask as ClassificationTask
    from revdeq_lightning.tasks.language_modeling import LanguageModelingTask as LanguageModelingTask
    from revdeq_lightning.tasks.optimizers import MuonAdamW as MuonAdamW, OptimizerConfig as OptimizerConfig
    from revdeq_lightning.tasks.reasoning import ReasoningTask as ReasoningTask

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
