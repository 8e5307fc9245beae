"""Which mode W&B gets, and what becomes of a training when it fails."""

import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import wandb
from lightning import Callback
from lightning.pytorch.loggers import WandbLogger

from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.errors import RecordWarning
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.loggers.endurance import enduring
from revdeq_lightning.loggers.wandb_logger import chosen_mode, finish_wandb, group_of, stored_key, wandb_logger
from revdeq_lightning.runs.folder import RunConfig
from tests.callbacks.wandb_records import read_back
from tests.helpers.modules import StepByStep, Stranger, loader, trainer
from tests.helpers.runs import without_key

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of W&B's own code


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    without_key(monkeypatch, tmp_path)
    yield
    finish_wandb(0)


@pytest.mark.parametrize(
    ("setting", "has_key", "variable", "expected"),
    [
        ("off", True, "online", "off"),
        ("auto", True, None, "online"),
        ("auto", False, None, "offline"),
        ("auto", True, "offline", "offline"),
        ("auto", True, "disabled", "off"),
        ("offline", True, "online", "offline"),
        ("online", True, "offline", "online"),
        ("online", False, None, "run.wandb=online needs a key"),
        ("auto", False, "online", "WANDB_MODE=online needs a key"),
        ("auto", True, "sideways", "WANDB_MODE must be one of .* got 'sideways'"),
    ],
)
def test_the_mode_is_chosen_without_asking(monkeypatch, setting, has_key, variable, expected):
    if has_key:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    run = RunConfig(wandb=setting)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            chosen_mode(run)
    else:
        assert chosen_mode(run) == expected
        assert (wandb_logger(run) is None) == (expected == "off")


@pytest.mark.parametrize("host", ["api.wandb.ai", "localhost:8080"])
@pytest.mark.parametrize("name", [".netrc", "_netrc", "elsewhere"])
def test_a_key_that_w_and_b_saved_is_found(monkeypatch, tmp_path, name, host):
    """As `wandb login` writes it."""
    if host != "api.wandb.ai":
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
    if name == "elsewhere":
        monkeypatch.setenv("NETRC", str(tmp_path / name))
    (tmp_path / name).write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    assert stored_key() == "0" * 40
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9090")
    assert stored_key() is None


def test_the_group_is_that_of_the_setting_the_environment_or_the_job_array(monkeypatch):
    assert group_of(RunConfig()) is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    assert group_of(RunConfig()) == "slurm-77"
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert group_of(RunConfig()) == "mine"
    assert group_of(RunConfig(wandb_group="set")) == "set"


def children() -> list[int]:
    """W&B's processes below this one."""
    pids = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [int(pid) for pid in pids if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]


def kill(folder):
    killed = children()
    assert killed
    for process in killed:
        os.kill(process, signal.SIGKILL)


def replace_folder(folder):
    """A file in its place: nothing can be written below, not even by root."""
    (path,) = (folder / "wandb").glob("offline-run-*")
    shutil.rmtree(path)
    path.write_text("")


class AtStep(Callback):
    def __init__(self, action, folder):
        self.action, self.folder = action, folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            self.action(self.folder)


def fit(folder, *callbacks):
    """Losses, what was told, and steps in the CSV file."""
    notes = StepByStep()
    run = RunConfig(folder=str(folder), name="n", version="v", wandb="auto")
    loggers = [enduring(logger) for logger in (ContinuedCSVLogger(run.path), wandb_logger(run))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = trainer(folder, [ResidualCurve(1), *callbacks, notes], logger=loggers, log_every_n_steps=1)
        fit.fit(Stranger(), loader())
        finish_wandb(0)
    told = [str(w.message) for w in caught if w.category is RecordWarning]
    with (run.path / "metrics.csv").open() as file:
        return notes.losses, told, len(file.readlines())


@pytest.mark.parametrize(("action", "words"), [(kill, "ConnectionResetError"), (replace_folder, "NotADirectoryError")])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds W&B's process through /proc")
def test_a_failure_in_mid_run_is_told_once_and_changes_nothing_else(tmp_path, action, words):
    losses, told, lines = fit(tmp_path / "whole")
    assert told == []
    assert len(losses) == 6
    broken, (warning,), broken_lines = fit(tmp_path / "broken", AtStep(action, tmp_path / "broken/n/v"))
    assert warning.startswith(f"RunWandbLogger failed ({words}")
    assert broken == losses
    assert broken_lines == lines
    # The next run of this process is not affected.
    assert fit(tmp_path / "next")[1] == []
    assert len(read_back(tmp_path / "next/n/v").values("loss")) == 6


def test_where_w_and_b_does_not_answer_the_run_is_kept_offline(tmp_path, monkeypatch):
    wandb.teardown()  # it read the environment when this process's first run began
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    start = time.monotonic()
    losses, told, _ = fit(tmp_path)
    assert len(told) == 1, told
    (warning,) = told
    assert warning.startswith("W&B cannot be reached (")
    assert f"to send it: wandb sync {tmp_path}/n/v/wandb/offline-run-*" in warning
    assert len(losses) == 6
    assert len(read_back(tmp_path / "n/v").values("loss")) == 6
    assert time.monotonic() - start < 60
    wandb.teardown()


def test_a_stranger_finds_the_logger_that_it_knows(tmp_path):
    run = RunConfig(folder=str(tmp_path), name="a/b c", version="v", wandb="offline")
    logger = enduring(wandb_logger(run))
    assert isinstance(logger, WandbLogger)
    assert logger.version == "a-b-c-v"  # W&B takes no slash in the name of a run
