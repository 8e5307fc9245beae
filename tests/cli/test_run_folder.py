"""A run's folder can always be read back, and records what was used."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.runs.environment import write_environment
from revdeq_lightning.runs.folder import RunConfig, find_checkpoint, new_version
from revdeq_lightning.tasks.checkpoint_fit import kept_settings
from tests.helpers.runs import MUON, run, tiny_config, tiny_data, tiny_task, tiny_trainer

QUIET = ("--run.test=false", "--run.sample_tokens=0", "--diagnostics.depth_sweep_every_n_validations=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run, which no test changes."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder)
    run("fit", "--config", config, "--run.version=v", "--seed_everything=4", "--trainer.max_steps=3", *QUIET)
    return folder / "runs/tiny/v"


@pytest.fixture
def moved(trained, tmp_path):
    """The same in another place."""
    return Path(shutil.copytree(trained, tmp_path / "moved/tiny/v"))


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files if p.name[0] != "."
    }


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("--model.network.d_model=32", "does not fit this model"),
        ("--model.optimizer.optimizer=adamw", "the state of optimizer=muon"),
        ("--trainer.max_steps=-2", "max_steps"),
        ("--data.path=/nowhere", "nowhere"),
        ("--trainer.accelerator=gpu", "trainer (accelerator=gpu, "),
    ],
)
def test_a_refused_resumption_changes_no_file_of_the_run(trained, capsys, change, reason):
    before = content(trained)
    with pytest.raises(SystemExit) as stop:
        run("fit", "--ckpt_path", trained / "checkpoints/last.ckpt", "--run.tensorboard=true", change)
    assert stop.value.code in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error
    assert content(trained) == before


def test_what_a_resumed_run_takes_from_its_checkpoint_is_recorded(moved):
    last = moved / "checkpoints/last.ckpt"
    changes = ("--model.optimizer.lr=0.5", "--model.optimizer.weight_decay=0.25", "--seed_everything=9")
    with pytest.warns(UserWarning, match=r"without effect: lr 0.01 -> 0.5, weight_decay 0.0 -> 0.25"):
        run("fit", "--ckpt_path", last, "--trainer.max_steps=6", *changes)
    recorded = yaml.safe_load((moved / "config.yaml").read_text())
    assert recorded["model"]["optimizer"]["lr"] == 0.01
    assert recorded["model"]["optimizer"]["weight_decay"] == 0
    assert recorded["seed_everything"] == 4
    assert recorded["trainer"]["max_steps"] == 6  # which has an effect
    saved = checkpoint(moved)
    assert saved["hyper_parameters"]["optimizer"]["lr"] == 0.01
    assert {group["lr"] for group in saved["optimizer_states"][0]["param_groups"]} == {0.01, 0.02}


def test_a_complete_run_is_tested_again_and_the_folder_in_use_is_recorded(moved):
    last = moved / "checkpoints/last.ckpt"
    before = content(moved)
    run("fit", "--ckpt_path", last, *QUIET[1:], "--run.test=true")  # nothing is left to train
    assert "test/loss" in (moved / "metrics.csv").read_text()
    assert content(moved)[str(moved / "config.yaml")] == before[str(moved / "config.yaml")]
    run("fit", "--ckpt_path", last, "--trainer.max_steps=4", *QUIET)
    recorded = yaml.safe_load((moved / "config.yaml").read_text())["run"]
    assert (recorded["folder"], recorded["name"]) == (str(moved.parents[1]), "tiny")


def test_the_batch_size_of_another_number_of_processes_is_recorded(moved):
    saved, last = checkpoint(moved), moved / "checkpoints/last.ckpt"  # as two processes with batches of 4 write it
    saved["TextDataModule"]["world_size"] = 2
    saved["TextDataModule"]["order"]["global_batch_size"] = 8
    torch.save(saved, last)
    with pytest.warns(UserWarning, match="now 1 take 8 each"):
        run("fit", "--ckpt_path", last, "--trainer.max_steps=4", *QUIET)
    assert yaml.safe_load((moved / "config.yaml").read_text())["data"]["batch_size"] == 8
    run("fit", "--ckpt_path", last, "--trainer.max_steps=5", *QUIET)  # without a warning
    assert checkpoint(moved)["TextDataModule"]["order"]["global_batch_size"] == 8


def test_last_and_best_are_never_files_of_an_older_run(moved):
    run = RunConfig(folder=str(moved.parents[1]), name="tiny")
    for alias in ("last", "best"):
        assert find_checkpoint(alias, run).path == moved / f"checkpoints/{alias}.ckpt"
    newest = moved.parent / "w"
    (newest / "checkpoints").mkdir(parents=True)
    shutil.copy(moved / "config.yaml", newest)  # it has only begun
    for alias, instead in (("last", "the path"), ("best", "last or the path")):
        with pytest.raises(FileNotFoundError, match=f"tiny/w has no {alias}.ckpt yet: set --ckpt_path to {instead}"):
            find_checkpoint(alias, run)
    shutil.copy(moved / "checkpoints/last.ckpt", newest / "checkpoints")
    assert find_checkpoint("last", run).path == newest / "checkpoints/last.ckpt"
    with pytest.raises(FileNotFoundError, match=r"tiny/w has no best\.ckpt yet"):
        find_checkpoint("best", run)


def test_without_averaging_a_resumed_run_goes_on_from_the_trained_weights(tmp_path):
    data = tiny_data(tmp_path)
    first = tiny_trainer(tmp_path, max_steps=2)
    first.fit(tiny_task(data), data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    task = tiny_task(data, optimizer=MUON | {"ema_decay": 0.0}, seed=1)
    tiny_trainer(tmp_path, max_steps=2).fit(task, data, ckpt_path=tmp_path / "a.ckpt")  # complete already
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name, weights in task.state_dict().items():
        if name in saved["trained_weights"]:
            assert torch.equal(weights, saved["trained_weights"][name])
    assert any(not torch.equal(w, saved["state_dict"][name]) for name, w in saved["trained_weights"].items())


def test_settings_in_the_state_of_a_plateau_are_kept():
    then = {"optimizer": "adamw", "schedule": "plateau", "plateau_factor": 0.5, "lr": 0.1}
    with pytest.warns(UserWarning, match="plateau_factor 0.5 -> 0.9"):
        assert kept_settings(then, then | {"plateau_factor": 0.9}) == {"plateau_factor": 0.5}


@pytest.mark.parametrize(("then", "now"), [("cosine", "constant"), ("constant", "linear"), ("plateau", "cosine")])
def test_a_schedule_whose_state_is_of_another_kind_is_refused(then, now):
    with pytest.raises(CheckpointError, match=f"schedule=.*{then}.*this run has schedule=.*{now}"):
        kept_settings({"schedule": then}, {"schedule": now})
    assert kept_settings({"schedule": "linear"}, {"schedule": "cosine"}) == {}


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    (tmp_path / "runs" / "20260102-030405-3").mkdir(parents=True)
    versions = [new_version(tmp_path / "runs") for _ in range(3)]
    assert versions == ["20260102-030405", "20260102-030405-2", "20260102-030405-4"]
    assert all((tmp_path / "runs" / version).is_dir() for version in versions)


@pytest.mark.parametrize("options", [["--trainer.devices=0"], ["--ckpt_path={}/other.ckpt", "--run.version=mine"]])
def test_a_refused_new_run_leaves_no_folder(options, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "runs/other").mkdir(parents=True)
    if len(options) == 1:
        (tmp_path / "runs/tiny").mkdir()
    before = list((tmp_path / "runs").rglob("*"))
    with pytest.raises(SystemExit):
        run("fit", "--config", tiny_config(tmp_path), *(option.format(tmp_path) for option in options))
    assert capsys.readouterr().err.startswith("error: ")
    assert list((tmp_path / "runs").rglob("*")) == before


@pytest.mark.parametrize("setting", ["version=..", "name=a/b"])
def test_a_run_stays_in_the_folder_of_runs(setting, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("fit", "--config", tiny_config(tmp_path), f"--run.{setting}")
    key, value = setting.split("=")
    assert capsys.readouterr().err.startswith(f"error: run.{key} must be a name without '/', got {value!r}: ")


def test_a_damaged_record_of_the_environment_does_not_end_the_run(tmp_path):
    path = tmp_path / "environment.json"
    for damaged in ("", "{", "[]", "null"):
        path.write_text(damaged)
        write_environment(path, {"started": "now"})
        assert json.loads(path.read_text()) == {"started": "now"}
