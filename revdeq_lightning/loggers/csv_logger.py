"""Metrics as one CSV file a run, which a resumed run continues."""

import csv
import itertools
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.checkpoints.files import remove_leftovers
from revdeq_lightning.loggers.endurance import RecordWarning


class ContinuedCSVLogger(CSVLogger):
    """Writes `FOLDER/metrics.csv` at every logging step; a file that is there already is continued, not deleted.

    A write that fails, on a full disk for instance, leaves the file as it was; its rows are written with the next ones.

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
        """Drop what was logged at this step or later: the run goes on from a checkpoint before.

        A file with rows that are damaged, or with something else, is kept beside, and its good rows are gone on with.
        """
        self._last = ""
        self.experiment.rewind(step)


class _ContinuedWriter(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        if self.path.is_file():
            with self.path.open(newline="", errors="replace") as file, suppress(csv.Error):
                self.metrics_keys = next(csv.reader(file), [])

    def rewind(self, step: int) -> None:
        remove_leftovers(self.path.parent)
        if self.path.is_file():
            rows = self._rows()
            good = [row for row in rows if _is_whole(row)]
            if len(good) < len(rows) or (self.metrics_keys and "step" not in self.metrics_keys):
                self._keep_beside(len(good))
            rows = [row for row in good if int(row["step"]) < step]
            self._write_anew([key for key in self.metrics_keys if any(row[key] for row in rows)], rows)

    def save(self) -> None:
        if not self.metrics:
            return
        keys = sorted(set(self.metrics_keys).union(*self.metrics))
        if keys != self.metrics_keys or not self.path.is_file():
            self._write_anew(keys, [*self._rows(), *self.metrics])
        else:
            self._append()
        self.metrics = []

    def _append(self) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        except OSError:
            os.truncate(self.path, size)  # no half of a row
            raise

    def _write_anew(self, keys: list[str], rows: list[dict[str, Any]]) -> None:
        beside = self.path.with_name(f".{self.path.name}.part")
        try:
            with beside.open("w", newline="") as file:
                writer = csv.DictWriter(file, keys)
                writer.writeheader()
                writer.writerows([{key: row[key] for key in keys if key in row} for row in rows])
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)
        self.metrics_keys = keys

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", errors="replace") as file:
            whole = (line for line in file if line.endswith("\n"))  # a kill may have cut the last
            lines = ("\0\n" if "\0" in line else line for line in whole)  # zeros of a crash may be longer than a field
            try:
                return list(csv.DictReader(lines))
            except csv.Error:  # a field beyond all bounds
                return [{}]

    def _keep_beside(self, num_good: int) -> None:
        numbered = (self.path.with_name(f"{self.path.stem}.damaged-{n}.csv") for n in itertools.count(1))
        aside = next(path for path in numbered if not path.exists())
        shutil.copyfile(self.path, aside)
        text = f"{self.path} is damaged, or something else: kept as {aside.name}; going on with {num_good} rows of it"
        warnings.warn(text, RecordWarning, stacklevel=2)

    def _check_log_dir_exists(self) -> None:
        """The base class would delete the file."""


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row has all its fields, a step, and no bytes that were never text (a crash leaves zeros)."""
    if None in row or None in row.values():
        return False
    return row.get("step", "").isdecimal() and not {"\0", "\ufffd"} & set("".join(row.values()))
