"""The HTML page of a run."""

from revdeq_lightning.report.page import report, write_report

__all__ = ["report", "write_report"]
