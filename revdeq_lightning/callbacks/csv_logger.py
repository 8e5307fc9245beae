"""Metrics as one CSV file a run, which a resumed run continues."""

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class ContinuedCSVLogger(CSVLogger):
    """Writes `FOLDER/metrics.csv` at every logging step; a file that is there already is continued, not deleted.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        super().__init__(save_dir=path.parent, name="", version=path.name, flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Writer of the file."""
        if self._experiment is None:
            self._experiment = _ContinuedWriter(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run's folder holds the whole configuration."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged at this step or later: the run goes on from a checkpoint before."""
        self.experiment.rewind(step)


class _ContinuedWriter(ExperimentWriter):
    def rewind(self, step: int) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
            path.unlink()
            self.metrics = [{key: value for key, value in row.items() if value != ""} for row in rows]  # type: ignore[misc]
            self.save()

    def _check_log_dir_exists(self) -> None:
        """The base class would delete the file."""
