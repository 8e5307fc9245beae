"""Signals end a run between two steps, on all ranks; what goes on from there is the whole run, bit for bit."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback, seed_everything

from revdeq_lightning.checkpoints.callbacks import LastCheckpoint
from revdeq_lightning.runs.signals import STOP, StopSignals
from revdeq_lightning.runs.stop_signal import StopSignal
from tests.helpers.processes import QUICK_PATH, run_apart
from tests.helpers.runs import TRAINED, assert_equal, run, tiny_config, tiny_data, tiny_task, tiny_trainer

EXACT = (*TRAINED, "TextDataModule")


class SendSignal(Callback):
    """Signals this process at the start of one batch, on one rank; counts validations, in checkpoints too."""

    def __init__(self, number=signal.SIGUSR1, batch=None, rank=0):
        self.number, self.batch, self.rank = number, batch, rank
        self.validated, self.handlers = [], set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(1 + trainer.global_rank)  # each rank has random numbers of its own
        self.handlers |= {signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)

    def state_dict(self):
        return {"validated": list(self.validated)}

    def load_state_dict(self, state):
        self.validated = state["validated"]


def fit(folder, *callbacks, ckpt_path=None, seed=0, **settings):
    seed_everything(seed, verbose=False)
    data = tiny_data(folder)
    last = LastCheckpoint(folder, stop_signal=lambda: STOP.agreed)
    trainer = tiny_trainer(folder, [StopSignal(), *callbacks, last], **{"enable_checkpointing": True} | settings)
    try:
        trainer.fit(tiny_task(data, seed=seed), data, ckpt_path=ckpt_path)
    except SystemExit:
        assert trainer.interrupted
    except torch.multiprocessing.ProcessExitedException:  # of forked ranks
        assert settings["devices"] == 2
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("number", "batch", "accumulate", "stopped_at"),
    [(signal.SIGHUP, 1, 1, 2), (signal.SIGTERM, 2, 1, 3), (signal.SIGUSR1, 3, 3, 2)],
    ids=["between validations", "at a validation", "in the midst of accumulated gradients"],
)
def test_the_run_in_two_parts_is_the_whole_run(request, tmp_path, number, batch, accumulate, stopped_at):
    settings = {"max_steps": 5, "accumulate_grad_batches": accumulate, "val_check_interval": 3 * accumulate}
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, inherited))
    before = [signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM)]
    undisturbed, first, second = SendSignal(), SendSignal(number, batch), SendSignal()
    end = fit(tmp_path, undisturbed, **settings)
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    assert fit(tmp_path, first, **settings)["global_step"] == stopped_at
    rest = fit(tmp_path, second, ckpt_path=tmp_path / "last.ckpt", seed=1, **settings)
    for key in EXACT:
        assert_equal(rest[key], end[key], key)
    assert second.validated == undisturbed.validated == [3]
    assert first.handlers == {STOP._note}  # not Lightning's, which save or call collectives at any moment
    assert [signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM)] == before


def fit_on_two_ranks(folder, name, *callbacks, **settings):
    (folder / name).mkdir()
    for shared in ("text.txt", "cache"):
        (folder / name / shared).symlink_to(folder / shared)
    checkpoint = fit(folder / name, *callbacks, strategy="ddp_fork", devices=2, max_steps=5, **settings)
    torch.save(checkpoint, folder / f"{name}.ckpt")


def whole_half_and_rest(folder):
    fit_on_two_ranks(folder, "whole", SendSignal())
    fit_on_two_ranks(folder, "half", SendSignal(batch=2, rank=1))
    fit_on_two_ranks(folder, "rest", SendSignal(), ckpt_path=folder / "half.ckpt", seed=1)


def test_a_signal_to_one_rank_ends_both_after_the_same_step(tmp_path):
    tiny_data(tmp_path).prepare_data()
    output = run_apart(whole_half_and_rest, tmp_path)
    assert "Stopped by SIGUSR1\n" in output.err
    assert "Traceback" not in output.err
    whole, half, rest = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "half", "rest"))
    assert [part["global_step"] for part in (whole, half, rest)] == [5, 3, 5]
    for key in EXACT:
        assert_equal(rest[key], whole[key], key)


def start(config: Path, log: Path) -> subprocess.Popen:
    """The command as a job script starts it: SIGUSR1 is ignored until Python notes it."""
    command = [sys.executable, "-m", "revdeq_lightning", "fit", "--config", str(config), "--run.resume=auto"]
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "bash"}
    settings = {**os.environ, **job, "PYTHONPATH": QUICK_PATH, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what the new process begins with
        try:
            return subprocess.Popen(command, stdout=file, stderr=file, env=settings, start_new_session=True)
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_the_command_survives_signals_at_any_moment_and_goes_on_by_itself(tmp_path, capsys, monkeypatch):
    config, log = tiny_config(tmp_path, max_steps=100_000, val_check_interval=100_000), tmp_path / "log"
    config.write_text(config.read_text().replace("data:\n", "data:\n  num_workers: 1\n"))
    process = start(config, log)
    try:
        for _ in range(40):  # from its first instant on, all through the imports
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        assert process.wait(timeout=60) == 75, log.read_text()
        assert "Stopped by SIGUSR1 after step 0." in log.read_text()

        process = start(config, log)
        while "step 1/" not in log.read_text() and process.poll() is None:
            time.sleep(0.01)
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the process that loads data, too
        assert process.wait(timeout=60) == 130, log.read_text()
    finally:
        process.kill()
    folder = tmp_path / "runs/tiny/17"
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"Interrupted after step {step}." in log.read_text()
    assert f"fit --ckpt_path {folder}/checkpoints/last.ckpt" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert (folder / "report.html").is_file()
    options = ("--run.resume=auto", "--run.version=17", "--run.test=false", "--run.sample_tokens=0")
    first = shutil.copy(folder / "checkpoints" / "last.ckpt", tmp_path / "first.ckpt")
    run("fit", "--config", config, *options, "--ckpt_path", first, f"--trainer.max_steps={step + 2}")
    said = capsys.readouterr().out
    assert f"resumed at step {step}" in said
    assert f"{folder} has begun, --ckpt_path={first} is not read again" in said

    with pytest.raises(SystemExit):
        run("fit", "--config", config, "--run.resume=auto")
    assert re.fullmatch("error: run.resume=auto needs run.version, .*\n", capsys.readouterr().err)


def test_signals_are_noted_and_given_back_but_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = StopSignals()
    try:
        assert signals.take()
        assert not signals.take()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signals.give_back()
        assert signals.received == 0
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == (before[0], signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before[1])
