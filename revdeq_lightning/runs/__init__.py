"""A run's folder, environment, signals, lock, divergence guard, and random state."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.runs.divergence import DivergenceGuard as DivergenceGuard
    from revdeq_lightning.runs.folder import RunConfig as RunConfig
    from revdeq_lightning.runs.stop_signal import StopSignal as StopSignal

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
