"""Folders of shards that were made to run code, or to read memory or files that are not theirs."""

import io
import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from revdeq_lightning.checkpoints.files import fault_of_folder, newest_good, read_checkpoint
from revdeq_lightning.checkpoints.sharded import VALUES, load_into, read_whole
from revdeq_lightning.cli.main import main
from revdeq_lightning.errors import CheckpointError
from tests.helpers.runs import STATE, Malice, change_places, seal, write_shards

PART = "process-0.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "last.ckpt")


@pytest.fixture
def trace(tmp_path):
    """The file that malice creates."""
    path = tmp_path / "trace"
    pickle.loads(pickle.dumps(Malice(path)))
    assert path.exists()
    path.unlink()
    return path


def zeros():
    return {
        "state_dict": {"w": torch.zeros(2, 3), "n": torch.tensor(0)},
        "optimizer_0": {"param_groups": [{"lr": 0.0}], "state": {"w": {"exp_avg": torch.zeros(2, 3).bfloat16()}}},
    }


def test_what_was_written_is_read_and_nothing_is_unpickled(folder, monkeypatch):
    """But `meta.pt`, by PyTorch's own reader of plain data (`weights_only=True`)."""
    values = read_checkpoint(folder)[VALUES]

    def refuse(*args, **options):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    load_into(state := zeros(), folder, values, no_dist=True)
    assert torch.equal(state["state_dict"].pop("w"), STATE["state_dict"]["w"])
    assert state["state_dict"] == {"n": torch.tensor(7)}
    assert state["optimizer_0"]["param_groups"] == [{"lr": 0.25}]
    assert torch.equal(state["optimizer_0"]["state"]["w"]["exp_avg"], torch.ones(2, 3).bfloat16())


def assert_refused(folder):
    for read in (
        lambda: read_whole(folder, "state_dict"),
        lambda: load_into(zeros(), folder, {"optimizer_0.param_groups": [{"lr": 0.25}]}, no_dist=True),
    ):
        with pytest.raises(CheckpointError, match=r"last\.ckpt is not a sharded checkpoint \(") as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1


def pickled(trace):
    return pickle.dumps(Malice(trace))


def archived(trace):
    torch.save(Malice(trace), file := io.BytesIO())
    return file.getvalue()


def header_of_a_pickle(trace):
    return struct.pack("<Q", len(pickled(trace))) + pickled(trace)


@pytest.mark.parametrize("content", [pickled, archived, header_of_a_pickle])
def test_code_in_the_place_of_tensors_is_refused(folder, trace, content):
    (folder / PART).write_bytes(content(trace))
    seal(folder)
    assert_refused(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda places: places["state_dict.w"].update(saved_offsets=[-1, 0]),
        lambda places: places["state_dict.w"].update(saved_offsets=[1 << 40, 0]),
        lambda places: places["state_dict.w"].update(saved_offsets=[0]),
        lambda places: places["state_dict.w"].update(saved_offsets="/etc/hostname"),
        lambda places: places.pop("state_dict.w") and None,
        lambda places: "[]",
        lambda places: "{not json",
    ],
    ids=["before", "far behind", "of another shape", "of another kind", "missing", "list", "no JSON"],
)
def test_places_that_cannot_be_are_refused(folder, change):
    change_places(folder, change)
    assert_refused(folder)


def test_a_part_that_is_missing_is_told(folder):
    """Without its values memory would be read that was never filled."""
    places = {"DCP_SHARDING_INFO": json.dumps({"state_dict.w": {"saved_offsets": [3, 0]}})}
    save_file({"state_dict.w": torch.ones(1, 3)}, folder / "process-1.safetensors", places)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"parts of state_dict\.w are missing"):
        read_whole(folder, "state_dict")


def older(folder, trace):
    (folder / ".metadata").write_bytes(pickled(trace))


def part(folder, trace):
    (folder / PART).write_bytes(archived(trace))


def rest(folder, trace):
    torch.save({"global_step": 1, "callbacks": Malice(trace)}, folder / "meta.pt")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (older, "is a sharded checkpoint of version 0.1.0.dev0, which can no longer be read: resume it with that"),
        (part, "is not a sharded checkpoint (SafetensorError: "),
        (rest, "is refused: it holds Python objects"),
    ],
)
def test_commands_refuse_code_in_one_line(folder, trace, capsys, place, words):
    place(folder, trace)
    seal(folder)
    for command in ("export", "generate"):
        with pytest.raises(SystemExit):
            main([command, "--ckpt_path", str(folder)])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder}")
        assert words in line
    if place is not part:  # its tensors are not looked at
        assert words in newest_good(folder.parent).faults[folder]
    assert not trace.exists()


def test_every_file_of_a_folder_has_to_be_listed(tmp_path):
    folder = write_shards(tmp_path / "last.ckpt")
    assert fault_of_folder(folder) is None
    (folder / "process-1.safetensors").write_bytes(b"x")
    fault = "is refused: its SHA256SUMS does not list process-1.safetensors, so this file is not part of the checkpoint"
    assert [fault_of_folder(folder, share, 2) for share in range(2)] == [fault, fault]
    assert newest_good(tmp_path) == (None, {folder: fault})
    seal(folder)
    assert fault_of_folder(folder) is None
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert fault_of_folder(folder) == "cannot be read (its SHA256SUMS)"
    (folder / "SHA256SUMS").unlink()
    assert fault_of_folder(folder) == "is incomplete (a folder of shards without SHA256SUMS)"


@pytest.mark.parametrize("listed", ["../secret", "/etc/hostname", "a/b"])
def test_a_place_outside_of_the_folder_is_not_read(folder, listed):
    (folder.parent / "secret").write_text("x")
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'0' * 64}  {listed}\n")
    assert fault_of_folder(folder) == f"is incomplete (a folder of shards without {listed})"
