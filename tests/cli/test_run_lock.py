"""One process at a time trains in a run's folder."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from revdeq_lightning.checkpoints.files import read_checkpoint
from revdeq_lightning.runs import lock as run_lock
from revdeq_lightning.runs.lock import LockedError, locked
from tests.helpers.processes import QUICK_PATH
from tests.helpers.runs import run, tiny_config

ENVIRONMENT = {**os.environ, "PYTHONPATH": QUICK_PATH, "PYTHONUNBUFFERED": "1"}
HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    file.write(sys.argv[2])
    file.flush()
    print("locked", flush=True)
    sys.stdin.read()
"""
"""What another process does, without our code: hold the lock until its input ends."""


@pytest.fixture
def held(tmp_path):
    """A folder locked by another process, which says that it is number 7 on this host."""
    processes = []

    def hold(host: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock"), f"{host} 7\n"]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"locked\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.communicate()


def refusal(folder: Path) -> str:
    with pytest.raises(LockedError) as stop, locked(folder):
        pytest.fail("two processes in one folder")
    return str(stop.value)


def test_a_second_run_is_refused_and_a_killed_one_leaves_the_folder_free(tmp_path, capsys):
    config = tiny_config(tmp_path, max_steps=100_000, val_check_interval=100_000)
    folder = tmp_path / "runs/tiny/v"
    last, part = folder / "checkpoints/last.ckpt", folder / "checkpoints/.last.ckpt.1.part"
    options = ("--run.version=v", "--run.checkpoint_every_n_steps=5", "--data.num_workers=1")
    command = [sys.executable, "-m", "revdeq_lightning", "fit", "--config", str(config), *options]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        while not last.exists():
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        part.write_text("half a checkpoint of the first")
        again = ("--run.resume=auto", "--run.test=false", "--run.sample_tokens=0", "--trainer.max_steps=1")
        with pytest.raises(SystemExit) as stop:
            run("fit", "--config", config, *options, *again)
        assert stop.value.code == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"another process trains in {folder} ({first.pid} on {socket.gethostname()})" in error
        assert part.exists()
        run("validate", "--ckpt_path", last)  # which writes nothing
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    # At once: the process that loaded its data may still be there.
    step = read_checkpoint(last)["global_step"]
    run("fit", "--ckpt_path", last, f"--trainer.max_steps={step + 1}", "--run.test=false", "--run.sample_tokens=0")
    assert read_checkpoint(last)["global_step"] == step + 1
    assert not part.exists()


def test_another_process_is_refused_at_once_and_another_machine_waited_for(tmp_path, held, capsys, monkeypatch):
    begin, process = time.monotonic(), held(socket.gethostname())
    assert f"(7 on {socket.gethostname()}): wait until it ends" in refusal(tmp_path)
    assert time.monotonic() - begin < 10
    process.communicate()
    process = held("elsewhere")
    monkeypatch.setattr(run_lock, "PATIENCE", 1.0)
    line = refusal(tmp_path)
    assert "(7 on elsewhere)" in line
    assert line.endswith(f"if its machine is lost, remove {tmp_path}/.lock")
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: process.communicate())  # its machine is found to be lost
    with locked(tmp_path):
        pass
    assert "waiting" in capsys.readouterr().err
    held("elsewhere")
    (tmp_path / ".lock").unlink()
    for _ in range(2):  # the process that holds it may come again
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_where_no_lock_can_be_taken_it_goes_on(tmp_path, monkeypatch):
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(number, os.strerror(number))))
        with locked(tmp_path):
            pass
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # as if it were another user's; as root one may open any file
    with locked(tmp_path):
        pass


def test_forked_processes_do_not_keep_it(tmp_path):
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(tmp_path):
            if os.fork() == 0:  # one that loads data, and outlives it
                os.close(write)
                os.read(read, 1)
            os._exit(0)
    os.close(read)
    os.waitpid(holder, 0)
    with locked(tmp_path):
        assert f" {os.getpid()}\n" in (tmp_path / ".lock").read_text()
    os.close(write)
