"""Two processes of one machine, the second one started by Lightning: signals and errors end both, in order."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from revdeq_lightning.checkpoints.files import read_checkpoint
from revdeq_lightning.cli.main import main
from tests.distributed import faulty_command
from tests.helpers.processes import QUICK_PATH, run_python
from tests.helpers.runs import tiny_config

OPTIONS = ("--config", "configs/trainer/cpu_ddp.yaml", "--run.test=false", "--run.sample_tokens=0")
pytestmark = pytest.mark.slow


class Run:
    """A run with a fault; what it says goes to a pipe that all of its processes hold open."""

    def __init__(self, fault: str, config: Path, *options: str) -> None:
        command = [sys.executable, "-W", "ignore", faulty_command.__file__, fault, "fit", "--config", str(config)]
        settings = {**os.environ, "PYTHONPATH": QUICK_PATH, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *OPTIONS, *options],
            env=settings | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said = ""

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.communicate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def second(self) -> int:
        """The process that Lightning started."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def wait_for(self, words: str) -> None:
        while words not in self.said:
            self.said += (line := self.process.stdout.readline())
            assert line, self.said

    def end(self, seconds: float = 60) -> int:
        """The exit code of the first process, once all of them are gone."""
        begin = time.monotonic()
        alarm = threading.Timer(seconds, self.kill)
        alarm.start()
        self.said += self.process.stdout.read()
        alarm.cancel()
        assert time.monotonic() - begin < seconds, f"there are processes after {seconds} s: {self.said}"
        self.process.wait()
        assert "Traceback" not in self.said, self.said
        return self.process.returncode


@pytest.mark.parametrize(
    ("number", "whom", "code"),
    [
        (signal.SIGTERM, "first", 75),
        (signal.SIGUSR1, "second", 75),
        (signal.SIGINT, "all", 130),
    ],
)
def test_a_signal_ends_both_with_a_checkpoint_and_the_exit_code_that_says_so(tmp_path, number, whom, code):
    config = tiny_config(tmp_path, max_steps=100_000, val_check_interval=100_000)
    options = ("--run.version=v", "--run.resume=auto")
    with Run("slow_end", config, *options) as run:
        run.wait_for("step 1/")
        if whom == "all":
            os.killpg(run.process.pid, number)
        else:
            os.kill(run.process.pid if whom == "first" else run.second, number)
        assert run.end() == code, run.said
    words = "Interrupted" if number == signal.SIGINT else f"Stopped by {number.name}"
    step = int(re.search(rf"^{words} after step (\d+)\.$", run.said, re.MULTILINE)[1])
    last = tmp_path / "runs/tiny/v/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == step
    assert "error" not in run.said
    if whom == "second":
        output, _ = run_python(
            *("-m", "revdeq_lightning", "fit", "--config", config, *OPTIONS, *options),
            f"--trainer.max_steps={step + 1}",
        )
        assert f"resumed at step {step}" in output
        assert read_checkpoint(last)["global_step"] == step + 1


def test_a_second_interrupt_ends_both_at_once(tmp_path):
    config = tiny_config(tmp_path, max_steps=100_000, val_check_interval=100_000)
    with Run("slow_step", config) as run:
        run.wait_for("step 1/")
        os.killpg(run.process.pid, signal.SIGINT)
        run.wait_for("Stopping with a checkpoint after this step")
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.end() == 130, run.said
    assert not list(tmp_path.glob("runs/tiny/*/checkpoints/*.ckpt"))


def test_an_error_of_the_first_ends_the_other(tmp_path):
    with Run("error_of_first", tiny_config(tmp_path)) as run:
        run.wait_for("error: ")
        assert run.end() == 1, run.said
    (error,) = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: process 0 ran out of GPU memory (it requested 20.00 GiB more)")


def test_a_divergence_of_the_second_ends_both_and_can_be_replayed(tmp_path, capsys):
    with Run("not_a_number_of_second", tiny_config(tmp_path)) as run:
        run.wait_for("error: ")
        assert run.end() == 1, run.said
    assert "the loss is not finite (nan) on process 1" in run.said
    (folder,) = (tmp_path / "runs/tiny").iterdir()
    (file,) = {line.split("--file ")[1] for line in run.said.splitlines() if "--file " in line}
    assert Path(file).parent.parent.parent == folder
    main(["replay", "--file", file])
    assert "Step 3, as recorded: the loss is not finite (nan)" in capsys.readouterr().out
