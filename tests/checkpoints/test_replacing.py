"""A checkpoint takes the place of another, a file or a folder: what is on the disk at every moment."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from revdeq_lightning.checkpoints.files import (
    make_folder,
    newest_good,
    put_in_place,
    remove_leftovers,
    steps_of,
    write_checkpoint,
)
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.runs.folder import RunConfig, find_checkpoint
from tests.helpers.runs import seal, watch_disk, write_shards

KINDS = ["file", "folder"]


def write(kind, path, step):
    if kind == "file":
        write_checkpoint({"global_step": step, "loops": {}}, path)
    else:
        write_shards(path, step)
    return path


def replace(kind, path, step):
    """As `AtomicCheckpointIO` does, or `EquilibriumFSDP2`."""
    if kind == "file":
        write_checkpoint({"global_step": step, "loops": {}}, path)
    else:
        put_in_place(write_shards(path.with_name(f".{path.name}.part"), step), path)


@pytest.fixture
def moments(monkeypatch):
    """Calls a function before and after each change of names."""
    moments = []

    def watch(owner, name):
        change = getattr(owner, name)

        def watched(*args, **options):
            for moment in moments:
                moment()
            result = change(*args, **options)
            for moment in moments:
                moment()
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, names in ((os, ("rename", "replace", "unlink", "rmdir")), (Path, ("rename", "replace", "unlink"))):
        for name in names:
            watch(owner, name)
    watch(shutil, "rmtree")
    return moments


def step_found(folder):
    """What `--ckpt_path last` goes on from, of a run killed just now."""
    run = RunConfig(folder=str(folder.parents[2]), name=folder.parents[1].name, version=folder.parent.name)
    try:
        path = find_checkpoint("last", run).path
    except (CheckpointError, FileNotFoundError):  # not to be taken for an error of the change itself
        return None
    return steps_of(path).number


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("aside", [None, "whole", "half removed", "beside a damaged one"])
def test_at_every_moment_of_a_replacement_a_good_one_is_found(tmp_path, moments, old, new, aside):
    folder = tmp_path / "runs/n/v/checkpoints"
    folder.mkdir(parents=True)
    last, hidden = folder / "last.ckpt", folder / ".last.ckpt.old"
    write(old, last, 5)
    if aside:
        write("folder", hidden, 4)
    if aside == "half removed":
        (hidden / "meta.pt").unlink()
    if aside == "beside a damaged one":
        damaged = last / "meta.pt" if old == "folder" else last
        damaged.write_bytes(damaged.read_bytes()[:-60])
    steps, earlier = [], {4, 5} if aside == "beside a damaged one" else {5}

    def moment():
        watching, moments[:] = list(moments), []
        steps.append(step_found(folder))
        copy = tmp_path / "killed/runs/n/v/checkpoints"  # where the next start has cleaned up
        shutil.copytree(folder, copy)
        remove_leftovers(copy)
        steps.append(step_found(copy))
        shutil.rmtree(tmp_path / "killed")
        moments[:] = watching

    moments.append(moment)
    replace(new, last, 6)
    moments.clear()
    assert len(steps) >= 4
    assert set(steps) <= earlier | {6}
    assert steps == sorted(steps)
    assert step_found(folder) == 6
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_put_aside_stays_until_the_newer_one_can_be_used(tmp_path, kind):
    last = tmp_path / "last.ckpt"
    aside = write(kind, tmp_path / ".last.ckpt.old", 3)
    part = write(kind, tmp_path / ".last.ckpt.17.part", 4)
    assert newest_good(tmp_path).path == aside  # killed between the two renames
    assert remove_leftovers(tmp_path) == [part]
    last.write_bytes(b"")
    assert newest_good(tmp_path).path == aside
    assert remove_leftovers(tmp_path) == []
    last.unlink()
    write("folder", last, 4)
    (last / "SHA256SUMS").unlink()
    assert newest_good(tmp_path).path == aside
    assert remove_leftovers(tmp_path) == []
    seal(last)
    assert newest_good(tmp_path).path == last
    assert remove_leftovers(tmp_path) == [aside]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("new", KINDS)
def test_a_folder_of_something_else_is_not_replaced(tmp_path, new):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/precious").write_text("x")
    with pytest.raises(IsADirectoryError, match="no checkpoint"):
        replace(new, tmp_path / "data", 1)
    assert (tmp_path / "data/precious").read_text() == "x"


def test_where_names_cannot_be_changed_the_old_one_stays(tmp_path, monkeypatch):
    last = write("folder", tmp_path / "last.ckpt", 1)

    def rename(path, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Read-only file system"):
        replace("file", last, 2)
    assert newest_good(tmp_path) == (last, {})
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the kernel is asked for: syncs of files and folders, and new names."""
    calls = []

    def note(call, path):
        calls.append((call, str(Path(path).relative_to(tmp_path.resolve())).replace(f".{os.getpid()}.", ".PID.")))

    watch_disk(note, monkeypatch.setattr)
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    write_checkpoint({"global_step": 1}, tmp_path / "run/checkpoints/a.ckpt")
    written = [
        ("sync", "run/checkpoints/.a.ckpt.PID.part"),
        ("rename", "run/checkpoints/a.ckpt"),
        ("sync", "run/checkpoints"),
    ]
    assert calls == [("sync", "run"), ("sync", "."), *written]
    calls.clear()
    write_checkpoint({"global_step": 2}, tmp_path / "run/checkpoints/a.ckpt")
    assert calls == written


def test_new_folders_are_on_the_disk(tmp_path, calls):
    make_folder(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    assert sorted(calls) == [("sync", "."), ("sync", "a"), ("sync", "a/b")]
    calls.clear()
    make_folder(tmp_path / "a/b/c")
    assert calls == []
