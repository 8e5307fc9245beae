"""Weights exported: what is told where that fails, and what it leaves. What they hold: `test_sharded_checkpoint.py`."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from revdeq_lightning.checkpoints.files import read_checkpoint, write_checkpoint
from revdeq_lightning.cli.inference import ModelSettings, SolverSteps, solver_for
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from tests.helpers.runs import run, tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run("fit", "--config", tiny_config(folder, max_steps=1), "--run.version=v", "--run.test=false")
    return folder / "runs/tiny/v/checkpoints/last.ckpt"


def error(capsys, *arguments, code=2):
    """The only line."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO: Tokenizing")]
    return line


def test_generate_needs_only_the_checkpoint_and_no_lightning(checkpoint, tmp_path):
    elsewhere = shutil.copy(checkpoint, tmp_path / "elsewhere.ckpt")
    program = """
import sys
from revdeq_lightning.cli.main import main
options = ["--ckpt_path", sys.argv[1], "--prompt", "abc", "--max_new_tokens", "30", "--top_k", "5"]
for seed in "001":
    main(["generate", *options, "--seed", seed])
    print("|")
assert "lightning" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", program, str(elsewhere)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, again, other, _ = result.stdout.split("|\n")
    assert first == again != other
    assert first.startswith("abc")
    assert len(first) == len("abc") + 30 + 1


def test_a_setting_that_is_gone_is_told(checkpoint, tmp_path, capsys):
    older = read_checkpoint(checkpoint)
    older["hyper_parameters"]["network"]["initial_state"] = "zero"
    write_checkpoint(older, tmp_path / "older.ckpt")
    told = error(capsys, "generate", "--ckpt_path", tmp_path / "older.ckpt", "--prompt=a")
    assert "has settings that this version does not have" in told
    assert "initial_state" in told


def test_a_tolerance_is_possible_where_training_stored_evaluations():
    settings = {"network": {}, "solver": {"solver": "momentum", "reversible_stored_evaluations": 1}}
    solver = solver_for(settings, ModelSettings(SolverSteps(rtol=0.1)))
    assert solver.build_solver().rtol == 0.1
    assert solver.build_adjoint().stored_evaluations == 0


def test_it_says_of_a_damaged_checkpoint_what_generate_says(checkpoint, tmp_path, capsys):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(content)
    capsys.readouterr()
    told = error(capsys, "export", "--ckpt_path", damaged)
    assert told == f"error: {damaged} is damaged (its checksum does not match)"
    assert told == error(capsys, "generate", "--ckpt_path", damaged)


def test_a_full_disk_is_told_and_leaves_the_file_of_before(checkpoint, tmp_path, capsys):
    target = tmp_path / "weights.safetensors"
    run("export", "--ckpt_path", checkpoint, "--output", target)
    before = target.read_bytes()
    capsys.readouterr()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        told = error(capsys, "export", "--ckpt_path", checkpoint, "--output", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert told.startswith(f"error: cannot write {target}: ")
    assert "File too large" in told
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_new_run_begins_with_exported_weights(checkpoint, tmp_path, capsys, monkeypatch):
    weights = checkpoint.with_name("w.safetensors")
    run("export", "--ckpt_path", checkpoint, "--output", weights)
    begun = {}
    start = LanguageModelingTask.on_train_batch_start
    monkeypatch.setattr(
        LanguageModelingTask,
        "on_train_batch_start",
        lambda task, *step: (begun.update({n: w.clone() for n, w in task.state_dict().items()}), start(task, *step))[1],
    )
    run("fit", "--ckpt_path", weights, "--run.version=new", "--seed_everything=7", "--run.test=false")
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(begun[name], before[name]) for name in before if name.startswith("model."))
    new = checkpoint.parents[2] / "new/checkpoints/last.ckpt"
    assert torch.load(new, weights_only=True)["global_step"] == 1
    capsys.readouterr()
    options = ("--run.version=other", "--model.network.d_mlp=40")
    assert "network.d_mlp 24 -> 40" in error(capsys, "fit", "--ckpt_path", weights, *options)
    weights.write_bytes(weights.read_bytes()[:100])
    told = error(capsys, "fit", "--ckpt_path", weights, "--run.version=other")
    assert told.startswith(f"error: {weights} is no file of weights, or a damaged one")


def test_what_cannot_be_used_is_told(checkpoint, tmp_path, capsys):
    run("export", "--ckpt_path", checkpoint, "--output", tmp_path / "w.safetensors")
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.ckpt")
    config, folder, file, missing = tiny_config(tmp_path), checkpoint.parents[1], tmp_path / "w", tmp_path / "none/w"
    capsys.readouterr()
    for command in ("test", "generate", "export"):
        told = error(capsys, command, "--ckpt_path", f"{file}.safetensors")
        assert told.startswith(f"error: {file}.safetensors holds weights alone, as `export` writes them: use a check")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").touch()
    told = error(capsys, "generate", "--ckpt_path", tmp_path / "folder")
    assert told.startswith(f"error: {tmp_path}/folder holds weights alone, as `export` writes them")
    for command, code in (("fit", 1), ("test", 2)):
        told = error(capsys, command, "--config", config, "--ckpt_path", f"{file}.ckpt", code=code)
        assert told.startswith(f"error: {file}.ckpt is not the checkpoint of a training run but weights alone")
    told = error(capsys, "test", "--ckpt_path", shutil.copy(checkpoint, tmp_path / "moved.ckpt"))
    assert told.startswith(f"error: {tmp_path}/moved.ckpt is not in the folder of its run, so its settings are not")
    told = error(capsys, "export", "--ckpt_path", f"{file}.ckpt")
    assert told == f"error: {file}.ckpt is not a checkpoint of a training run (it has no 'hyper_parameters')"
    told = error(capsys, "fit", "--ckpt_path", folder)
    assert told == f"error: {folder} is the folder of a run: set --ckpt_path to a file in {folder}/checkpoints"
    told = error(capsys, "export", "--ckpt_path", checkpoint, "--output", missing)
    assert told == f"error: cannot write {missing}: there is no folder {missing.parent}"
    for device in ("cuda:97", "gpu", "meta"):
        told = error(capsys, "generate", "--ckpt_path", checkpoint, "--device", device)
        assert told.startswith(f"error: --device={device} cannot be used (")
        assert told.endswith("choose another, for example cpu")


def test_predictions_go_where_output_says_and_a_read_only_folder_is_told_before_the_work(
    checkpoint, tmp_path, capsys, monkeypatch
):
    target = tmp_path / "nats.bin"
    run("predict", "--ckpt_path", checkpoint, "--output", target)
    assert f"in {target}" in capsys.readouterr().out
    assert np.load(target).ndim == 1
    monkeypatch.setattr(LanguageModelingTask, "predict_step", lambda *_: pytest.fail("the work was done"))
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "file/x", "there is no folder")):
        told = error(capsys, "predict", "--ckpt_path", checkpoint, "--output", path)
        assert told.startswith(f"error: cannot write {path}: {reason}")
