"""Metrics, each named with its unit."""

from revdeq_lightning.metrics.language import LanguageMetrics, SplitCounts

__all__ = ["LanguageMetrics", "SplitCounts"]
