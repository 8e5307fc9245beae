"""Our batch script on a real SLURM of two nodes: a job told that its time is up ends, later, as if never told."""

import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from revdeq_lightning.cli.main import main
from tests.distributed.slurm import SlurmCluster, slurm_cluster, slurm_is_missing
from tests.helpers.processes import QUICK_PATH, run_apart, run_group
from tests.helpers.runs import assert_equal, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

SCRIPT = Path("configs/cluster/slurm.sh").resolve()
MAX_STEPS = 120
OPTIONS = ("--run.test=false", "--run.sample_tokens=0")
EXACT = ("state_dict", "trained_weights", "optimizer_states", "lr_schedulers", "random_states", "TextDataModule")


@pytest.fixture(scope="module")
def cluster():
    if reason := slurm_is_missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short
    try:
        with slurm_cluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def config(folder: Path, strategy: str) -> Path:
    path = tiny_config(folder, max_steps=MAX_STEPS, val_check_interval=30, strategy=strategy)
    path.write_text(path.read_text().replace("data:\n", "data:\n  num_workers: 1\n"))
    return path


def submit(cluster: SlurmCluster, folder: Path, strategy: str) -> str:
    settings = {"PYTHON": sys.executable, "PYTHONPATH": QUICK_PATH, "MASTER_ADDR": "127.0.0.1", "GRACE": "100"}
    settings["PYTHONFAULTHANDLER"] = "1"  # SIGABRT prints the stacks of all threads
    command = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--time=9", f"--chdir={folder}"]
    exports = ",".join(["ALL", *(f"{key}={value}" for key, value in settings.items())])
    return cluster.run(*command, f"--export={exports}", SCRIPT, "fit", "--config", config(folder, strategy), *OPTIONS)


def checkpoint(folder: Path, job: str) -> dict:
    return torch.load(folder / f"runs/tiny/{job}/checkpoints/last.ckpt", weights_only=True)


def logs(folder: Path, job: str) -> str:
    paths = [folder / f"slurm-{job}.log", *sorted((folder / f"runs/slurm/{job}").glob("*.log"))]
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in paths if path.exists())


def until_it_trains(cluster: SlurmCluster, folder: Path, job: str) -> None:
    log, end = folder / f"runs/slurm/{job}/rank-0.log", time.monotonic() + 240
    while not (log.exists() and "step 1/" in log.read_text()):
        assert time.monotonic() < end, logs(folder, job)
        time.sleep(0.05)


def end_of(cluster: SlurmCluster, folder: Path, job: str) -> dict:
    try:
        state = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")["JobState"]
    except AssertionError as error:  # it hangs: where?
        cluster.run("scancel", "--signal=ABRT", job)
        time.sleep(5)
        error.add_note(logs(folder, job) + cluster.logs())
        raise
    assert state == "COMPLETED", logs(folder, job) + cluster.logs()
    return checkpoint(folder, job)


def as_lists(value):
    """Under FSDP2 an optimizer's tuples come back as lists."""
    if isinstance(value, dict):
        return {key: as_lists(v) for key, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, list | tuple) else value


def test_a_job_told_that_its_time_is_up_goes_on_where_it_was(cluster, tmp_path):
    job = submit(cluster, tmp_path, "fsdp2")
    until_it_trains(cluster, tmp_path, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 does
    cluster.wait_for(job, "PENDING")
    saved = checkpoint(tmp_path, job)
    assert 0 < saved["global_step"] < MAX_STEPS
    text = logs(tmp_path, job)
    assert "time limit reached (exit code 75): requeued" in text
    assert f"Stopped by SIGUSR1 after step {saved['global_step']}." in text

    # At once, not two minutes later; within the same second SLURM would refuse it.
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    rest = end_of(cluster, tmp_path, job)
    own = ("--run.version=whole", "--trainer.devices=2")
    run_apart(run_group, 2, main, ["fit", "--config", str(config(tmp_path, "fsdp2")), *OPTIONS, *own])
    end = checkpoint(tmp_path, "whole")
    assert f"resumed at step {saved['global_step']}" in logs(tmp_path, job)
    assert rest["global_step"] == end["global_step"] == MAX_STEPS
    for key in EXACT:
        assert_equal(as_lists(rest[key]), as_lists(end[key]), key)
    assert cluster.job(job)["Restarts"] == "1"
    # One run: one folder, one file of metrics, which holds each step once.
    assert sorted(p.name for p in (tmp_path / "runs/tiny").iterdir()) == sorted(["whole", job])
    metrics = [(tmp_path / f"runs/tiny/{number}/metrics.csv").read_text().splitlines() for number in ("whole", job)]
    assert len(metrics[0]) == len(metrics[1])
    assert "Traceback" not in logs(tmp_path, job)


def test_each_process_gets_the_cpus_that_the_job_asked_for(cluster, tmp_path):
    exports = "ALL,PYTHON=true,MASTER_ADDR=127.0.0.1,SLURM_DEBUG=1"  # srun says which options it goes by
    options = ("--parsable", "--nodes=2", "--cpus-per-task=2", "--time=9", f"--chdir={tmp_path}")
    job = cluster.run("sbatch", *options, f"--export={exports}", SCRIPT)
    cluster.wait_for(job, "COMPLETED")
    assert re.search(r"srun: cpus-per-task +: 2\n", logs(tmp_path, job))


def test_what_takes_a_machine_away_finds_a_checkpoint_and_a_cancelled_job_stays_away(cluster, tmp_path):
    job = submit(cluster, tmp_path, "ddp")
    until_it_trains(cluster, tmp_path, job)
    cluster.run("scancel", job)  # SIGTERM to every process, as in a pre-emption
    cluster.wait_for(job, "CANCELLED")
    time.sleep(1)
    text = logs(tmp_path, job)
    step = checkpoint(tmp_path, job)["global_step"]
    assert f"Stopped by SIGTERM after step {step}." in text
    assert "requeued" not in text
    assert cluster.job(job)["JobState"] == "CANCELLED"
