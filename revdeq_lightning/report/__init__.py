"""The HTML page of a run, the pictures of a classifier's mistakes, and of puzzles as they are solved."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.report.classification import ClassificationReport as ClassificationReport
    from revdeq_lightning.report.page import write_report as write_report
    from revdeq_lightning.report.reasoning import ReasoningReport as ReasoningReport

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
