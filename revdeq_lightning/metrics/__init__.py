"""Metrics, named with their units."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.metrics.language import LanguageMetrics as LanguageMetrics, SplitCounts as SplitCounts
    from revdeq_lightning.metrics.sums import (
        ClassificationMetrics as ClassificationMetrics,
        ReasoningMetrics as ReasoningMetrics,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
