"""One checkpoint file: its checksum, and what is refused."""

import io
import pickle
import zipfile
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from revdeq_lightning.checkpoints.files import (
    contents,
    newest_good,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
)
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.errors import CheckpointError
from tests.helpers.runs import Malice, limited_file_sizes


def content(step=1, size=40):
    return {"global_step": step, "state_dict": {"w": torch.arange(float(size))}, "loops": {"a": [1, (2, None)]}}


def test_a_checkpoint_is_what_torch_writes_and_its_checksums_are_those_of_the_archive(tmp_path):
    path = tmp_path / "folder" / "a.ckpt"
    write_checkpoint(content(), path)
    plain = io.BytesIO()
    torch.save(content(), plain)
    assert path.read_bytes() == plain.getvalue()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (data,) = [name for name in archive.namelist() if name.endswith("data/0")]
        assert zlib.crc32(torch.arange(40.0).numpy()) == archive.getinfo(data).CRC
    for mmap in (False, True):
        assert same(read_checkpoint(path, mmap=mmap), content())
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def same(read, written):
    weights, expected = (checkpoint.pop("state_dict")["w"] for checkpoint in (read, written))
    return torch.equal(weights, expected) and read == written


@pytest.mark.parametrize("mmap", [False, True])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_change_is_found_or_changes_nothing_of_what_is_read(tmp_path, mmap, data):
    """Padding, dates and the like are not covered by the archive's checksums; nothing that is read depends on them."""
    path = tmp_path / "a.ckpt"
    write_checkpoint(content(), path)
    whole = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    match kind := data.draw(st.sampled_from(["bit", "cut", "addition"])):
        case "cut":
            del whole[position:]
        case "bit":
            whole[position] ^= 1 << data.draw(st.integers(0, 7))
        case _:
            whole += data.draw(st.binary(min_size=1, max_size=200))
    path.write_bytes(whole)
    if fault := newest_good(tmp_path).faults:
        assert len(fault[path].splitlines()) == 1
        with pytest.raises(CheckpointError):
            read_checkpoint(path, mmap=mmap)
    else:
        assert kind != "cut"
        assert same(read_checkpoint(path, mmap=mmap), content())


def entry_as_a_folder(whole):
    """PyTorch then reads memory that was never filled (zip: external attributes of an entry in the directory)."""
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    whole[entry + 38] ^= 0x10


def bit_of_a_weight(whole):
    whole[whole.index(torch.arange(40.0).numpy().tobytes()) + 50] ^= 1


@pytest.mark.parametrize("change", [entry_as_a_folder, bit_of_a_weight])
def test_changes_that_pytorch_would_not_notice_are_found(tmp_path, change):
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(), path)
    whole = bytearray(path.read_bytes())
    change(whole)
    path.write_bytes(whole)
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged \(its checksum does not match\)"):
        read_checkpoint(path)


def test_a_file_sealed_by_an_earlier_version_is_read(tmp_path):
    """It had a SHA-256 in the comment of the archive."""
    path = tmp_path / "last.ckpt"
    torch.save(content(), path)
    comment = b"sha256:" + 64 * b"0"
    path.write_bytes(path.read_bytes()[:-2] + len(comment).to_bytes(2, "little") + comment)
    for mmap in (False, True):
        assert same(read_checkpoint(path, mmap=mmap), content())
    assert newest_good(tmp_path) == (path, {})


@pytest.mark.parametrize("kind", ["archive", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, kind):
    path, trace = tmp_path / "last.ckpt", tmp_path / "trace"
    if kind == "archive":
        write_checkpoint(content() | {"callbacks": Malice(trace)}, path)  # with a checksum that is right
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps(Malice(trace), protocol=2))
        pickle.loads(path.read_bytes())
    assert trace.exists()  # it does what is feared
    trace.unlink()
    for read in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError, match="is refused: it holds Python objects"):
            read(path)
    found = newest_good(tmp_path)
    assert found.path is None
    assert "is refused" in found.faults[path]
    with pytest.raises(ValueError, match="weights_only=False would run code"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("text"), "is not a checkpoint"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is not a checkpoint"),
        (lambda path: torch.save(torch.ones(3), path), r"is not a checkpoint \(it holds a Tensor\)"),
        (lambda path: torch.save({"global_step": 99}, path), "is not the checkpoint of a training run"),
        (lambda path: path.mkdir(), "is incomplete"),
    ],
)
def test_something_else_is_told_in_one_line(tmp_path, write, words):
    path = tmp_path / "last.ckpt"
    write(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        contents(path)
    assert len(str(caught.value).splitlines()) == 1
    assert list(newest_good(tmp_path).faults) == [path]


def test_one_that_was_written_on_a_gpu_is_found_where_there_is_none(tmp_path, monkeypatch):
    """`location_tag` is what `torch.save` writes of a tensor's device."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    write_checkpoint(content(3), tmp_path / "last.ckpt")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert newest_good(tmp_path) == (tmp_path / "last.ckpt", {})
    assert contents(tmp_path / "last.ckpt")["global_step"] == 3


def test_the_newest_good_one_is_last_or_that_of_most_steps_and_best_if_it_is_alone(tmp_path):
    assert newest_good(tmp_path) == (None, {})
    for name, step in (("step-200", 200), ("best", 1100), ("step-1000", 1000), ("last", 1100)):
        write_checkpoint(content(step), tmp_path / f"{name}.ckpt")
    write_checkpoint(content(1050), tmp_path / ".best.ckpt.old")  # left by a kill: no more exact than `best.ckpt`
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "alien.ckpt").write_text("from elsewhere")
    assert newest_good(tmp_path) == (tmp_path / "last.ckpt", {})
    for damaged, then in (("last", "step-1000"), ("step-1000", "step-200"), ("step-200", "best")):
        path = tmp_path / f"{damaged}.ckpt"
        path.write_bytes(path.read_bytes()[:-100])
        found = newest_good(tmp_path)
        assert found.path == tmp_path / f"{then}.ckpt"
        assert {path, tmp_path / "alien.ckpt"} <= found.faults.keys()


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """The kernel refuses to write more: first in the midst of the tensors, then in the last bytes."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(1, size=40_000), path)
    size = path.stat().st_size
    before = path.read_bytes()
    io_ = AtomicCheckpointIO(errors="warn")
    with limited_file_sizes() as limit:
        for most in (size // 2, size - 10):
            limit(most)
            with pytest.raises(OSError, match="File too large"):
                AtomicCheckpointIO().save_checkpoint(content(2, size=40_000), path)
            with pytest.warns(UserWarning, match="no checkpoint was written .*: File too large; the previous one"):
                io_.save_checkpoint(content(2, size=40_000), path)
            assert io_.failures.keys() == {path}
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    io_.save_checkpoint(content(3), path)
    assert not io_.failures
    assert read_checkpoint(path)["global_step"] == 3


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in (".last.ckpt.17.part", ".probe.4.part", "last.ckpt", "x.part"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in remove_leftovers(tmp_path)] == [".last.ckpt.17.part", ".probe.4.part"]
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "x.part"}
    assert remove_leftovers(tmp_path / "nowhere") == []
