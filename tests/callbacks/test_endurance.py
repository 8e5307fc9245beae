"""Loggers that fail: one warning, and the run as it would have been."""

import errno
import os
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.errors import RecordWarning
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.loggers.endurance import Enduring, Survives, enduring
from revdeq_lightning.loggers.wandb_logger import log_picture
from tests.helpers.modules import StepByStep, Stranger, loader, table, trainer
from tests.helpers.runs import limited_file_sizes


class Failing(Logger):
    """Fails in one of its methods, from some call on."""

    name, version = "failing", "0"

    def __init__(self, method, after=0):
        self.method, self.calls, self.after = method, 0, after

    def _maybe(self, method):
        if method == self.method:
            self.calls += 1
            if self.calls > self.after:
                raise OSError(errno.ENOSPC, "no space left")

    @property
    def experiment(self):
        self._maybe("experiment")
        return self

    def log_metrics(self, metrics, step=None):
        self._maybe("log_metrics")

    def log_hyperparams(self, params, *args):
        self._maybe("log_hyperparams")

    def log_graph(self, model, input_array=None):
        self._maybe("log_graph")

    def save(self):
        self._maybe("save")

    def finalize(self, status):
        self._maybe("finalize")


class Parametrised(Stranger):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"a": 1})


def losses(folder, logger):
    notes = StepByStep()
    trainer(folder, [FunctionEvaluations(), notes], logger=logger, log_every_n_steps=1).fit(Parametrised(), loader())
    return notes.losses


@pytest.mark.parametrize("method", ["experiment", "log_metrics", "log_hyperparams", "log_graph", "save", "finalize"])
def test_whatever_fails_is_told_once_and_the_run_goes_on(tmp_path, method):
    logger = enduring(Failing(method, after=1 if method == "log_metrics" else 0))
    with pytest.warns(RecordWarning, match=r"Failing failed \(OSError.*no space left.*Training continues") as caught:
        found = losses(tmp_path, logger)
    assert len([w for w in caught if w.category is RecordWarning]) == 1
    assert found == losses(tmp_path, False)
    assert len(found) == 6
    if method == "log_metrics":
        assert logger.calls > 5  # it is tried again, as a disk may be emptied
    if method == "experiment":
        assert logger.calls == 1  # who cannot begin is not asked again


def test_a_picture_that_cannot_be_read_is_told_once_and_the_run_goes_on(tmp_path):
    class Pictures(WandbLogger):
        def __init__(self):
            pass

    logger = enduring(Pictures())
    run = SimpleNamespace(loggers=[logger, logger], is_global_zero=True, global_step=1)
    with pytest.warns(RecordWarning, match=r"Pictures failed \(FileNotFoundError") as caught:
        log_picture(run, "samples/images", tmp_path / "missing.png", "caption")
    assert len(caught) == 1
    run.loggers = [Pictures()]
    with pytest.raises(FileNotFoundError):
        log_picture(run, "samples/images", tmp_path / "missing.png", "caption")


def test_without_endurance_the_training_ends(tmp_path):
    with pytest.raises(OSError, match="no space left"):
        losses(tmp_path, Failing("log_metrics"))


def test_an_interrupt_is_not_survived():
    with pytest.raises(KeyboardInterrupt), Survives("x"):
        raise KeyboardInterrupt


def test_a_logger_passes_for_what_it_was_and_can_be_sent_to_another_process(tmp_path):
    logger = enduring(CSVLogger(tmp_path, name="n", version="v"))
    assert isinstance(logger, CSVLogger)
    other = pickle.loads(pickle.dumps(logger))
    assert isinstance(other, CSVLogger)
    assert type(other) is Enduring
    assert other.log_dir == logger.log_dir
    other.experiment.log_metrics({"a": 1.0}, 0)
    other.save()
    assert (tmp_path / "n" / "v" / "metrics.csv").is_file()
    bare = enduring(Bare())
    assert not hasattr(bare, "experiment")  # as before


class Bare(Logger):
    """Without `experiment`."""

    name, version = "bare", "0"

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...


class FullDisk(Callback):
    """For some steps."""

    def __init__(self, limit, path, first, last):
        self.limit, self.path, self.first, self.last = limit, path, first, last

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.first:
            self.limit(self.path.stat().st_size + 10)
        if trainer.global_step == self.last:
            self.limit(None)


def test_a_full_disk_costs_no_row_once_there_is_room_again(tmp_path):
    results = []
    for name in ("free", "full"):
        path = tmp_path / name / "metrics.csv"
        logger = enduring(ContinuedCSVLogger(tmp_path / name))
        with limited_file_sizes() as limit, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callbacks = [FunctionEvaluations(), *([FullDisk(limit, path, 2, 4)] if name == "full" else [])]
            trainer(tmp_path, callbacks, logger=logger, log_every_n_steps=1).fit(Stranger(), loader())
        told = [str(w.message) for w in caught if w.category is RecordWarning]
        results.append((table(path), told))
    (free, no_warning), (full, (warning,)) = results
    assert no_warning == []
    assert "ContinuedCSVLogger failed (OSError: [Errno 27] File too large" in warning
    assert full == free
    assert len(full) >= 6
    assert os.listdir(tmp_path / "full") == ["metrics.csv"]


def test_a_file_of_a_callback_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.warns(RecordWarning, match="ResidualCurve failed"):
        trainer(tmp_path, [ResidualCurve(2, Path(tmp_path / "taken"))]).fit(Stranger(), loader())
