"""Logs the metrics of a run to one CSV file, which a resumed run continues."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from revdeq_lightning.checkpoints.files import remove_leftovers
from revdeq_lightning.loggers.step_rows import append_rows, rewind_rows


class ContinuedCSVLogger(Logger):
    """Writes `FOLDER/metrics.csv` at every logging step and continues an existing file.

    A write that fails, for instance on a full disk, leaves the file unchanged; its rows are written with the next ones.
    """

    name = version = ""  # nothing is appended to the run's folder

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._waiting: list[dict[str, Any]] = []
        self._last = ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}
        row = dict(sorted({**row, "step": step}.items()))
        if repr(row) != self._last:  # a checkpoint within a step logs the step before again
            self._last = repr(row)
            self._waiting.append(row)
            self.save()

    def save(self) -> None:
        if self._waiting:
            append_rows(self.path, self._waiting)
            self._waiting = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, as the run's folder holds the configuration."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged at this step or later, as the run continues from an earlier checkpoint."""
        self._last = ""
        remove_leftovers(self.path.parent)
        rewind_rows(self.path, step)
