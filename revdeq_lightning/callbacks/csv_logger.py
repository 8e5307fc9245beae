"""Metrics as one CSV file a run, which a resumed run continues."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from revdeq_lightning.checkpoints import remove_leftovers


class ContinuedCSVLogger(CSVLogger):
    """Writes `FOLDER/metrics.csv` at every logging step; a file that is there already is continued, not deleted.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        super().__init__(save_dir=path.parent, name="", version=path.name, flush_logs_every_n_steps=1)
        self._last = ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Writer of the file."""
        if self._experiment is None:
            self._experiment = _ContinuedWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log, unless it is what was logged last: a checkpoint in the midst of a step has the step logged before."""
        if repr((metrics, step)) != self._last:
            self._last = repr((metrics, step))
            super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run's folder holds the whole configuration."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged at this step or later: the run goes on from a checkpoint before."""
        self._last = ""
        self.experiment.rewind(step)


class _ContinuedWriter(ExperimentWriter):
    """Appends whole lines; whatever is rewritten is written beside and renamed, so that a kill loses no line."""

    def save(self) -> None:
        """Append; what cannot be written (a full disk) is told, and written the next time."""
        path = Path(self.metrics_file_path)
        size = path.stat().st_size if path.is_file() else None
        try:
            super().save()
        except OSError as error:
            if size is not None and path.stat().st_size > size:
                os.truncate(path, size)
            rank_zero_warn(
                f"{path} could not be written: {error.strerror or error}; its rows are kept for the next time"
            )

    def rewind(self, step: int) -> None:
        path = Path(self.metrics_file_path)
        remove_leftovers(path.parent)
        if path.is_file():
            with path.open(newline="") as file:
                whole_lines = [line for line in file if line.endswith("\n")]  # a kill may have cut the last one short
            rows = list(csv.DictReader(whole_lines))
            self.metrics_keys = list(rows[0]) if rows else []
            self._rewrite([row for row in rows if int(row["step"]) < step])

    def _check_log_dir_exists(self) -> None:
        """The base class would delete the file."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """The base class would write over the file."""
        with Path(self.metrics_file_path).open(newline="") as file:
            self._rewrite(list(csv.DictReader(file)))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        path = Path(self.metrics_file_path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with temporary.open("w", newline="") as file:
                if self.metrics_keys:
                    writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                    writer.writeheader()
                    writer.writerows(rows)
            if rows:
                temporary.replace(path)
            else:
                path.unlink()
                self.metrics_keys = []
        finally:
            temporary.unlink(missing_ok=True)
