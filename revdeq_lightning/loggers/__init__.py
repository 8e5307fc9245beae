"""What records a run: CSV, W&B, progress, media."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.errors import RecordWarning as RecordWarning
    from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger as ContinuedCSVLogger
    from revdeq_lightning.loggers.progress import RunProgress as RunProgress
    from revdeq_lightning.loggers.wandb_logger import (
        RunWandbLogger as RunWandbLogger,
        WandbCheckpoints as WandbCheckpoints,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
