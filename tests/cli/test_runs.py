import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.helpers.runs import error_of, run, tiny_config, without_key

FILES = {
    *("checkpoints", "config.yaml", "report.html", "metrics.csv", "environment.json", "samples.jsonl", "samples.txt"),
    *("depth_sweep.csv", "depth_sweep.png", "depth_sweep_validation.csv", ".lock"),
}
"""Of a short run: no curve of the residual is kept before step 100."""


def only(folder: Path) -> Path:
    (child,) = folder.iterdir()
    return child


def steps(folder: Path, key: str) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get(key)]


def test_a_run_leaves_all_that_is_needed_and_can_be_gone_on_with(tmp_path, capsys, monkeypatch):
    config = tiny_config(tmp_path)
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    precision = "--run.float32_matmul_precision=high"
    run("fit", "--config", config, "--model.solver.beta=0.8", "--run.name=small", precision)
    assert chosen == ["high"]
    folder = only(tmp_path / "runs" / "small")
    assert re.fullmatch(r"\d{8}-\d{6}", folder.name)
    assert {p.name for p in folder.iterdir()} == FILES
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "step-3.ckpt"}
    assert steps(folder, "train/loss") == list(range(6))
    assert steps(folder, "val/bits_per_byte") == [2, 5]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["solver"]["beta"] == 0.8
    assert resolved["run"]["name"] == "small"
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "Tokenizing the text" not in line] == []
    assert re.search(r"Test \(best.ckpt\): \d\.\d{4} bits per byte, \d\.\d{4} nats per token", out)
    assert re.search(r"Sample \(5 tokens.*\):\n\na", out)
    closing = out.splitlines()[-3:]
    for line, word in zip(closing, ("fit", "test", "generate"), strict=True):
        assert f"-m revdeq_lightning {word} --ckpt_path {folder}/checkpoints/" in line

    # Go on, from the checkpoint alone, for more steps: same folder, one continued file.
    last = folder / "checkpoints" / "last.ckpt"
    refused = error_of(capsys, "fit", "--ckpt_path", last, "--run.name=fork")
    assert f"--run.name=fork: with --ckpt_path the run goes on in {folder}: add --run.version for a new run" in refused
    run("fit", "--ckpt_path", last, "--trainer.max_steps=9")
    assert only(tmp_path / "runs" / "small") == folder
    assert steps(folder, "train/loss") == list(range(9))
    assert torch.load(last, weights_only=True)["global_step"] == 9
    assert "resumed at step 6" in capsys.readouterr().out

    # The other commands, by alias and by path.
    run("test", "--config", config, "--run.name=small", "--ckpt_path=best")
    run("validate", "--ckpt_path", last)
    run("predict", "--ckpt_path", last)
    nats = np.load(last.with_suffix(".nats.npy"))
    out = capsys.readouterr().out
    assert f"{nats.size:,} tokens, {nats.mean():.4f} nats per token" in out
    assert out.count("bits per byte") == 2

    # Relaunch from the resolved configuration: a new run.
    run("fit", "--config", folder / "config.yaml", "--run.version=again", "--trainer.max_steps=3", "--run.test=false")
    assert steps(folder.parent / "again", "train/loss") == [0, 1, 2]
    error = error_of(capsys, "fit", "--config", folder / "config.yaml", "--run.version=again")
    assert "already contains a run" in error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_is_offline_without_a_key_and_says_where(tmp_path, capsys, monkeypatch):
    without_key(monkeypatch, tmp_path)
    options = ("--run.version=v", "--run.wandb=auto", "--run.test=false", "--run.sample_tokens=0")
    run("fit", "--config", tiny_config(tmp_path), *options)
    folder = tmp_path / "runs/tiny/v/wandb"
    out, err = capsys.readouterr()
    assert f"W&B is offline: the run lies in {folder}; to send it: wandb sync" in out
    assert "wandb:" not in out + err  # nothing but this line
    assert list(folder.glob("offline-run-*/*.wandb"))
