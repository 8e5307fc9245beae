"""A run's folder, environment, signals, lock, divergence guard, and random state."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.runs.divergence import DivergedError as DivergedError, DivergenceGuard as DivergenceGuard
    from revdeq_lightning.runs.folder import (
        ImageRunConfig as ImageRunConfig,
        LanguageRunConfig as LanguageRunConfig,
        RunConfig as RunConfig,
    )
    from revdeq_lightning.runs.lock import LockedError as LockedError
    from revdeq_lightning.runs.probe import Probe as Probe
    from revdeq_lightning.runs.random_state import ResumableRandomState as ResumableRandomState
    from revdeq_lightning.runs.signals import Stopped as Stopped, StopSignals as StopSignals
    from revdeq_lightning.runs.stop_signal import SameStart as SameStart, StopSignal as StopSignal

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
