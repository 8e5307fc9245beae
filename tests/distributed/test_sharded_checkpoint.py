"""Checkpoints of FSDP2: read on other numbers of processes and by other strategies, exported, and never run as code."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from revdeq_lightning.checkpoints.files import Found, fault_of_folder, newest_good
from revdeq_lightning.checkpoints.sharded import load_into
from revdeq_lightning.cli.inference import load_language_model
from revdeq_lightning.cli.main import main
from revdeq_lightning.errors import CheckpointError
from tests.distributed import rank_resumes, sharded_run
from tests.helpers.processes import run_apart
from tests.helpers.runs import error_of

pytestmark = pytest.mark.xdist_group("sharded_checkpoint")

# FROM-TO: a run that stops after 10 of 20 steps, and the run that goes on.
FAST = ["folder_2-fsdp2_1", "file_2-one_1", "file_1-fsdp2_2"]
SLOW = ["folder_2-fsdp2_4", "folder_4-fsdp2_2", "file_2-ddp_2", "file_1-folder_2"]


def run(folder, names):
    run_apart(rank_resumes.main, folder, *names)
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("fast"), [*FAST, "damaged-fsdp2_2"])


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("slow"), SLOW)


def assert_as_if_never_stopped(folder, name):
    resumed, whole = torch.load(folder / f"{name}.pt"), torch.load(folder / "whole.pt")
    for kind in ("weights", "average"):  # of the moments a wrong one would show in the weights
        assert resumed[kind].keys() == whole[kind].keys()
        for key, tensor in whole[kind].items():
            torch.testing.assert_close(resumed[kind][key], tensor, rtol=0, atol=1e-12, msg=f"{name}: {kind} of {key}")
    assert any(not torch.equal(whole["weights"][key], whole["average"][key]) for key in whole["average"])


@pytest.mark.parametrize("name", FAST)
def test_a_run_goes_on_with_other_processes_as_if_never_stopped(fast, name):
    assert_as_if_never_stopped(fast, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_run_goes_on_with_another_strategy_as_if_never_stopped(slow, name):
    assert_as_if_never_stopped(slow, name)


def test_a_folder_is_whole_and_leaves_nothing_beside_it(fast):
    checkpoint = fast / "folder_2.ckpt"
    files = ["SHA256SUMS", "meta.pt", "process-0.safetensors", "process-1.safetensors"]
    assert sorted(p.name for p in checkpoint.iterdir()) == files
    assert not [p.name for p in fast.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_a_full_disk_or_a_name_that_cannot_be_changed_is_a_warning_and_the_next_save_tries_again(tmp_path):
    said = run_apart(sharded_run.disturbed, tmp_path)
    for fault in ("No space left on device", "Read-only file system"):
        assert f"last.ckpt: {fault}; the previous one is intact" in said.err
    assert said.err.count("no checkpoint was written to") == 2
    assert "Traceback" not in said.err
    checkpoints = tmp_path / "runs/tiny/v/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "step-5.ckpt"]
    assert fault_of_folder(checkpoints / "last.ckpt") is None
    assert torch.load(checkpoints / "last.ckpt/meta.pt", weights_only=True)["global_step"] == 6


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path):
    run_apart(sharded_run.recorded, tmp_path)
    calls = sorted(call for rank in range(2) for call in json.loads((tmp_path / f"calls-{rank}.json").read_text()))
    calls = [(call, path) for _, call, path in calls]
    named = calls.index(("rename", "last.ckpt"))
    sealed = calls.index(("sync", ".last.ckpt.part/SHA256SUMS"))
    assert sealed < calls.index(("sync", ".last.ckpt.part"), sealed) < named < calls.index(("sync", "."), named)
    assert calls.index(("rename", ".last.ckpt.part/meta.pt")) < sealed  # of itself: tests/checkpoints/test_replacing.py
    for rank in range(2):
        assert calls.index(("sync", f".last.ckpt.part/process-{rank}.safetensors")) < sealed


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    run_apart(sharded_run.refused, folder)
    return json.loads((folder / "refused.json").read_text())


MISFIT = "the checkpoint does not fit the model"
REFUSALS = {
    "code": r"bad\.ckpt/meta\.pt is refused: it holds Python objects",
    "part": r"bad\.ckpt is not a sharded checkpoint \(SafetensorError: ",
    "older": r"bad\.ckpt is a sharded checkpoint of version 0\.1\.0\.dev0, .*sharded_checkpoints=false",
    "unsealed": r"bad\.ckpt is incomplete \(a folder of shards without SHA256SUMS\): continue from .*last\.ckpt",
    "wider": rf"{MISFIT}: it needs state_dict\.\S+ of shape \(.*32.*\), \S+bad\.ckpt holds",
    "larger": rf"{MISFIT}: it needs state_dict\.\S+layers\.2\.\S+ of shape .*, \S+bad\.ckpt has none",
    "smaller": rf"{MISFIT}, which has no state_dict\.\S+layers\.1\.\S+: \S+bad\.ckpt",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", REFUSALS)
def test_commands_tell_in_one_line_what_they_refuse(refused, fault):
    for command in sharded_run.COMMANDS if fault == "code" else ("fit", "test"):
        (line,), code, ran = refused[f"{command} {fault}"]
        assert re.match(f"error: .*{REFUSALS[fault]}", line)
        assert code in (1, 2)
        assert not ran


def test_export_writes_the_averaged_weights_of_either_kind(fast, tmp_path, capsys):
    contents = []
    for name in ("folder_2", "file_2"):
        target = tmp_path / f"{name}.safetensors"
        main(["export", "--ckpt_path", str(fast / f"{name}.ckpt"), "--output", str(target)])
        contents.append(load_file(target))
        with safe_open(target, "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["hyper_parameters"])["network"]["d_model"] == 16
        assert metadata["global_step"] == "10"
        assert str(target) in capsys.readouterr().out
    average = torch.load(fast / "file_2.ckpt", weights_only=True)["state_dict"]
    expected = {key.removeprefix("model."): value for key, value in average.items() if key.startswith("model.")}
    for content in contents:
        assert content.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(content[key], value, rtol=0, atol=1e-14)
    model, _ = load_language_model(fast / "folder_2.ckpt")
    assert all(torch.equal(value, contents[0][key].float()) for key, value in model.state_dict().items())


@pytest.fixture
def checkpoint(fast, tmp_path):
    return shutil.copytree(fast / "folder_2.ckpt", tmp_path / "copy.ckpt")


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "has none"), ("head.weight", r"holds \(17, 16\)")], ids=["missing", "shape"]
)
def test_another_model_is_told_in_one_line(checkpoint, name, words):
    words = rf"needs state_dict.model.{name} of shape \(2,\).*{words}"
    with pytest.raises(CheckpointError, match=words) as caught:
        load_into({"state_dict": {f"model.{name}": torch.zeros(2)}}, checkpoint, {}, no_dist=True)
    assert "\n" not in str(caught.value)


def test_weights_that_the_model_does_not_have_are_told(checkpoint):
    with pytest.raises(CheckpointError, match=r"the model, which has no state_dict\.model\."):
        load_into({"state_dict": {"model.head.weight": torch.zeros(17, 16)}}, checkpoint, {}, no_dist=True)


def test_its_checksums_are_those_of_sha256sum(checkpoint):
    result = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [
        f"{name}: OK" for name in ("meta.pt", "process-0.safetensors", "process-1.safetensors")
    ]


@pytest.mark.parametrize("name", ["meta.pt", "process-0.safetensors", "process-1.safetensors"])
def test_one_changed_bit_is_found_and_another_checkpoint_named(fast, checkpoint, name):
    good = shutil.copytree(fast / "folder_2.ckpt", checkpoint.parent / "step-5.ckpt")
    last = checkpoint.rename(checkpoint.parent / "last.ckpt")
    rank_resumes.damage(last, name)
    message = f"is damaged (the checksum of {name} does not match)"
    assert newest_good(last.parent) == Found(good, {last: message})
    with pytest.raises(CheckpointError, match=re.escape(f"{last} {message}: continue from {good}")):
        load_language_model(last)
    shares = [fault_of_folder(last, share, 3) for share in range(3)]
    assert sorted(filter(None, shares)) == [message]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_refuse_what_one_of_them_found(fast, rank):
    text = (fast / f"damaged-fsdp2_2-{rank}.txt").read_text()
    assert text == f"{fast}/alone/damaged.ckpt is damaged (the checksum of process-1.safetensors does not match)"


@pytest.mark.parametrize("name", ["process-1.safetensors", "meta.pt"])
def test_a_missing_file_is_named(checkpoint, capsys, name):
    (checkpoint / name).unlink()
    error = error_of(capsys, "export", "--ckpt_path", checkpoint)
    assert f"copy.ckpt is incomplete (a folder of shards without {name})" in error
