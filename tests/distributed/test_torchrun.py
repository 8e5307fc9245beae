"""Our torchrun script on one machine: signals, wrong settings, logs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import QUICK_PATH, pids_with
from tests.helpers.runs import tiny_config

pytestmark = pytest.mark.slow

SCRIPT = Path("configs/cluster/torchrun.sh").resolve()


class Script:
    """Two processes that train for ever, by the script."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.log = folder, folder / "log"
        config = tiny_config(folder, max_steps=1_000_000, val_check_interval=1_000_000, strategy="ddp")
        variables = {"RUN": "first", "GPUS": "2", "PYTHON": sys.executable, "PYTHONPATH": QUICK_PATH}
        self.environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
        self.command = ["bash", str(SCRIPT), "fit", "--config", str(config), "--run.test=false", *options]

    def __enter__(self) -> "Script":
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.torchrun(), *self.training()]:
            subprocess.run(["kill", "-KILL", str(pid)], capture_output=True, check=False)
        self.process.wait()

    def torchrun(self) -> list[int]:
        return pids_with("torch.distributed.run", str(self.folder))

    def training(self) -> list[int]:
        return [pid for pid in pids_with("fit", str(self.folder)) if pid not in self.torchrun()]

    def until_it_trains(self) -> None:
        end = time.monotonic() + 120
        while "step 1/" not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return self.log.read_text()

    def own_text(self) -> str:
        """Without what torchrun logs, of a signal that interrupted it too."""
        return re.sub(r"^[IWE]\d{4} .* torch/distributed/elastic/.*\n", "", self.text(), flags=re.MULTILINE)

    def end(self) -> int:
        try:
            return self.process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            pytest.fail(self.text())


@pytest.mark.parametrize(
    ("whom", "number", "code", "says"),
    [
        ("script", signal.SIGINT, 130, "Interrupted"),
        ("torchrun", signal.SIGUSR1, 75, "Stopped by SIGUSR1"),
    ],
)
def test_a_signal_ends_all_with_a_checkpoint_and_nothing_runs_on_or_is_begun_again(tmp_path, whom, number, code, says):
    with Script(tmp_path) as script:
        script.until_it_trains()
        (torchrun,) = script.torchrun()
        os.kill(script.process.pid if whom == "script" else torchrun, number)
        assert script.end() == code, script.text()
        step = torch.load(tmp_path / "runs/tiny/first/checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert step > 0
        assert f"{says} after step {step}." in script.text()
        assert "resumed at step" not in script.text()
        assert script.torchrun() == script.training() == []
        if whom != "torchrun":  # it tells of the signal by a traceback of its own
            assert "Traceback" not in script.own_text()
    assert "[default0]:step 1/" in script.text()
    logs = sorted((tmp_path / "runs/torchrun/first").rglob("stdout.log"))
    assert [path.parent.name for path in logs] == ["0", "1"]
    assert f"{says} after" in logs[0].read_text()


def test_a_signal_before_the_first_step_is_heeded_at_it(tmp_path):
    with Script(tmp_path) as script:
        while not script.training() or not script.torchrun():
            time.sleep(0.01)
        script.process.send_signal(signal.SIGTERM)
        assert script.end() == 75, script.text()
        assert "Stopped by SIGUSR1 after step 0." in script.text()
        assert "Traceback" not in script.own_text()


def test_a_wrong_setting_is_told_once_and_not_begun_again(tmp_path):
    with Script(tmp_path, "--trainer.max_stepz=3") as script:
        assert script.end() == 2
    assert re.fullmatch(r"error: unrecognized arguments: --trainer.max_stepz=3 .*max_steps\?\)\n", script.text())
