"""A run's folder as one HTML page. Reads files only: neither PyTorch nor Lightning is imported."""

from revdeq_lightning.reporting.page import report, write_report

__all__ = ["report", "write_report"]
