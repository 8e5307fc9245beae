"""One checkpoint file: its checksum, and what is refused."""

import hashlib
import io
import os
import pickle
import resource
import signal
import zipfile

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


def content(step=1, size=40):
    return {"global_step": step, "state_dict": {"w": torch.arange(float(size))}, "loops": {"a": [1, (2, None)]}}


class Malice:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_the_checksum_is_the_comment_of_the_archive_that_torch_writes(tmp_path):
    path = tmp_path / "folder" / "a.ckpt"
    write_checkpoint(content(), path)
    plain = io.BytesIO()
    torch.save(content(), plain)
    comment = b"sha256:" + hashlib.sha256(plain.getvalue()).hexdigest().encode()
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == comment
        assert archive.testzip() is None
    assert path.read_bytes() == plain.getvalue()[:-2] + len(comment).to_bytes(2, "little") + comment
    for mmap in (False, True):  # any PyTorch reads it
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)["state_dict"]["w"], torch.arange(40.0))
    read = read_checkpoint(path)
    assert read["global_step"] == 1
    assert read["loops"] == {"a": [1, (2, None)]}
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_changed_bit_every_cut_and_every_addition_is_found(tmp_path, data):
    path = tmp_path / "a.ckpt"
    write_checkpoint(content(), path)
    whole = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["bit", "cut", "addition"])):
        case "cut":
            del whole[position:]
        case "bit":
            whole[position] ^= 1 << data.draw(st.integers(0, 7))
        case _:
            whole += data.draw(st.binary(min_size=1, max_size=200))
    path.write_bytes(whole)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
    assert newest_good(tmp_path).path is None


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
        (lambda path: torch.save(torch.ones(3), path), "is something else than"),
        (lambda path: torch.save({"global_step": 99}, path), "something else than the checkpoint of a training run"),
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


def test_a_checkpoint_without_checksum_is_read(tmp_path):
    torch.save(content(7), tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 7
    assert newest_good(tmp_path) == (tmp_path / "last.ckpt", {})


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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    io_ = AtomicCheckpointIO(errors="warn")
    try:
        for limit in (size // 2, size - 10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                AtomicCheckpointIO().save_checkpoint(content(2, size=40_000), path)
            with pytest.warns(UserWarning, match="no checkpoint was written .*: File too large; what it held"):
                io_.save_checkpoint(content(2, size=40_000), path)
            assert io_.failures.keys() == {path}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
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
