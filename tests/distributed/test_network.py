"""Our torchrun script on two machines with own addresses: a cut cable, a lost machine, and what goes on after."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from revdeq_lightning.cli.main import main
from tests.distributed.machines import Machine, namespaces_are_missing, two_machines
from tests.helpers.processes import run_apart, run_group
from tests.helpers.runs import assert_equal, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("network")]

SCRIPT = Path("configs/cluster/torchrun.sh").resolve()
EXACT = ("state_dict", "trained_weights", "optimizer_states", "lr_schedulers", "random_states", "TextDataModule")
OPTIONS = ("--run.test=false", "--run.sample_tokens=0")
TIMEOUT = 15
SAVED, MAX_STEPS = 20, 60

# Begun again, rank 0 comes last: the other one must not take what the ended process left for its address.
SLOW_RESTART = """
import os, time
from tests.helpers.quick_start import sitecustomize
if os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
    time.sleep(4)
"""


@pytest.fixture(scope="module")
def machines():
    if reason := namespaces_are_missing():
        pytest.skip(reason)
    with two_machines() as machines:
        yield machines


def config(folder: Path) -> Path:
    strategy = {
        "class_path": "revdeq_lightning.distributed.strategies.EquilibriumDDP",
        "init_args": {"timeout_seconds": TIMEOUT},
    }
    settings = {"max_steps": MAX_STEPS, "val_check_interval": SAVED, "log_every_n_steps": 5}
    return tiny_config(folder, strategy=strategy, **settings)


class Job:
    """The script on both machines, for one run."""

    def __init__(self, machines, folder: Path, run: str, *options: str, max_restarts: int = 0) -> None:
        self.machines, self.folder, self.run, self.max_restarts = machines, folder, run, max_restarts
        self.options = (*OPTIONS, *options)
        (folder / "sitecustomize.py").write_text(SLOW_RESTART)
        self.processes = [self.start(machine) for machine in machines]

    def start(self, machine: Machine):
        variables = {
            "RUN": self.run,
            "NODES": "2",
            "GPUS": "1",
            "ADDRESS": f"{self.machines[0].address}:29400",
            "LOCAL_ADDRESS": machine.address,
            "MAX_RESTARTS": str(self.max_restarts),
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{self.folder}:{os.getcwd()}",
        }
        command = ("bash", SCRIPT, "fit", "--config", config(self.folder), *self.options)
        return machine.start(self.log(machine), self.folder, *command, **variables)

    def log(self, machine: Machine) -> Path:
        return self.folder / f"{self.run}-{machine.address}.log"

    def text(self) -> str:
        return "\n".join(self.log(machine).read_text() for machine in self.machines)

    def rows(self) -> int:
        """How many are in the file of metrics; not one for each step."""
        path = self.folder / f"runs/tiny/{self.run}/metrics.csv"
        return path.read_text().count("\n") - 1 if path.exists() else 0

    def until(self, condition, what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"never {what}:\n{self.text()}"
            time.sleep(0.02)

    def end(self, *machines: int, seconds: float = 240) -> list[int]:
        try:
            return [self.processes[i].wait(timeout=seconds) for i in machines or (0, 1)]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended in {seconds} s:\n{self.text()}")

    @property
    def path(self) -> Path:
        return self.folder / f"runs/tiny/{self.run}/checkpoints/last.ckpt"

    def checkpoint(self) -> dict:
        return torch.load(self.path, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of the undisturbed run, of two processes of one machine."""
    folder = tmp_path_factory.mktemp("whole")
    own = ("--run.version=whole", "--trainer.devices=2")
    run_apart(run_group, 2, main, ["fit", "--config", str(config(folder)), *OPTIONS, *own])
    return torch.load(folder / "runs/tiny/whole/checkpoints/last.ckpt", weights_only=True)


def assert_ended_like(whole: dict, job: Job) -> None:
    for key in EXACT:
        assert_equal(job.checkpoint()[key], whole[key], key)


def test_a_cut_cable_is_waited_for_and_a_killed_process_begun_again_from_the_checkpoint(machines, whole, tmp_path):
    job = Job(machines, tmp_path, "disturbed", max_restarts=3)
    job.until(job.path.exists, "saved")
    machines[1].plug(in_=False)
    time.sleep(3)
    still = job.rows()
    time.sleep(1)
    assert job.rows() == still, job.text()
    assert [process.poll() for process in job.processes] == [None, None], job.text()
    (pid,) = machines[1].pids("-m", "revdeq_lightning")  # now: the rest takes less than a second
    machines[1].plug(in_=True)
    job.until(lambda: job.rows() > still, "gone on after the cable was mended", seconds=TIMEOUT)

    os.kill(pid, signal.SIGKILL)
    assert job.end() == [0, 0], job.text()
    text = job.text()
    assert text.count("resumed at step") == 1
    assert "rank 0 lost another process" in text
    assert "Traceback" not in text.split("resumed at step")[1]
    assert_ended_like(whole, job)


def test_a_vanished_machine_ends_the_job_in_bounded_time_and_the_same_command_goes_on(machines, whole, tmp_path):
    job = Job(machines, tmp_path, "vanished")
    job.until(job.path.exists, "saved")
    machines[1].plug(in_=False)  # before: nothing tells the other one
    machines[1].switch_off()
    begin = time.monotonic()
    (code,) = job.end(0)
    assert code != 0
    assert time.monotonic() - begin < TIMEOUT + 30  # torchrun looks at its processes now and then, and Python ends
    assert "error: rank 0 lost another process, which ended or does not respond (" in job.text()

    machines[1].plug(in_=True)
    job.processes = [job.start(machine) for machine in machines]
    assert job.end() == [0, 0], job.text()
    assert "resumed at step" in job.text()
    assert_ended_like(whole, job)


def test_a_signal_to_the_script_on_one_machine_ends_both_and_none_is_begun_again(machines, tmp_path):
    job = Job(machines, tmp_path, "asked", "--trainer.max_steps=100000", max_restarts=3)
    job.until(lambda: job.rows() > 0, "trained")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.end() == [75, 75], job.text()
    assert 0 < job.checkpoint()["global_step"] < 100_000
    assert "resumed at step" not in job.text()
    assert "Traceback" not in job.text()
