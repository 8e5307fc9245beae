"""Folders of shards that were made to run code, to change PyTorch, or to read what lies elsewhere."""

import importlib
import io
import pickle
import pickletools

import pytest
import torch
from shard_folders import STATE, Malice, change_metadata, seal, write_shards
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from revdeq_lightning.checkpoints.files import fault_of_folder, newest_good
from revdeq_lightning.checkpoints.sharded import load_into, read_metadata, read_rest, read_whole
from revdeq_lightning.cli.main import main
from revdeq_lightning.errors import CheckpointError


def text(string):
    return b"\x8c" + bytes([len(string)]) + string.encode()


def named(module, name):
    """Opcodes that put it on the pickle's stack; of this kind the name may hold dots."""
    return text(module) + text(name) + b"\x93"


def globals_of(content):
    """What a pickle names, told by Python's own unpickler."""
    found = set()

    class Listing(pickle.Unpickler):
        def find_class(self, module, name):
            found.add((module, name))
            return super().find_class(module, name)

    Listing(io.BytesIO(content)).load()
    return found


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


def test_the_metadata_is_what_plain_pickle_reads(folder):
    ours, theirs = read_metadata(folder), pickle.loads((folder / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert {type(value) for value in ours.storage_data} == {type(value) for value in theirs.storage_data}
    state = {
        "state_dict": {"w": torch.zeros(2, 3), "n": torch.tensor(0)},
        "optimizer_0": {"param_groups": [{"lr": 0.0}], "state": {"w": {"exp_avg": torch.zeros(2, 3).bfloat16()}}},
    }
    load_into(state, folder, no_dist=True)
    assert torch.equal(state["state_dict"].pop("w"), STATE["state_dict"]["w"])
    assert state["state_dict"] == {"n": torch.tensor(7)}
    assert state["optimizer_0"]["param_groups"] == [{"lr": 0.25}]
    assert torch.equal(state["optimizer_0"]["state"]["w"]["exp_avg"], torch.ones(2, 3).bfloat16())


def test_metadata_of_one_process_is_not_looked_at(folder, trace):
    """PyTorch falls back to it where reading the other fails: here as `storage_meta` takes no attribute."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change_metadata(folder, lambda metadata: setattr(metadata, "storage_meta", 1))
    (folder / "__0.metadata").write_bytes(pickle.dumps(Malice(trace, metadata)))
    seal(folder)
    assert fault_of_folder(folder) is None
    assert torch.equal(read_whole(folder, "state_dict")["state_dict"]["w"], STATE["state_dict"]["w"])
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["itself", "within"])
def test_code_in_the_metadata_is_refused(folder, trace, kind):
    if kind == "itself":
        (folder / ".metadata").write_bytes(pickle.dumps(Malice(trace)))
        seal(folder)
    else:
        change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Malice(trace)))
    trace.unlink(missing_ok=True)
    for read in (read_metadata, lambda path: read_whole(path, "state_dict")):
        with pytest.raises(
            CheckpointError, match=r"last\.ckpt/\.metadata .*it refers to shard_folders\.touch"
        ) as caught:
            read(folder)
        assert len(str(caught.value).splitlines()) == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.filesystem", "torch.utils._pytree.TreeSpec"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.elastic.agent.server.api", "WorkerSpec"),
        ("torch", "load"),
        ("torch", "float32.to_real"),
        ("torch.serialization", "load"),
        ("builtins", "getattr"),
        ("builtins", "set"),
        ("collections", "defaultdict"),
        ("pathlib", "Path"),
    ],
)
def test_any_other_name_is_refused(folder, module, name):
    (folder / ".metadata").write_bytes(b"\x80\x04" + named(module, name) + b".")
    with pytest.raises(CheckpointError, match=rf"it refers to {module}\.{name}, which no checkpoint needs"):
        read_metadata(folder)


def test_the_metadata_changes_nothing_of_pytorch(folder):
    """Of each class that metadata names, and each object made from it, the pickle sets an attribute."""
    attribute = text("__post_init__") + b"K\x01s"
    names = globals_of((folder / ".metadata").read_bytes())
    assert len(names) > 10
    things = {name: getattr(importlib.import_module(name[0]), name[1]) for name in names}
    before = {name: dict(vars(thing)) for name, thing in things.items() if hasattr(thing, "__dict__")}
    for name in names:
        for made in (named(*name), named(*name) + b")\x81", named(*name) + b")R", named(*name) + b"K\x00\x85R"):
            for state in (b"}" + attribute, b"N}" + attribute + b"\x86"):
                content = b"\x80\x04" + made + state + b"b."
                (folder / ".metadata").write_bytes(content)
                pickletools.dis(content, out=io.StringIO())  # it is well formed
                with pytest.raises(CheckpointError):
                    read_metadata(folder)
    after = {name: dict(vars(thing)) for name, thing in things.items() if hasattr(thing, "__dict__")}
    assert after == before
    assert not any("__post_init__" in vars(member) for member in _MEM_FORMAT_ENCODING)


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "a/b"])
def test_a_place_outside_of_the_folder_is_refused(folder, place):
    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = place

    change_metadata(folder, change)
    with pytest.raises(CheckpointError, match="which is no plain file of the folder"):
        read_whole(folder, "state_dict")


def test_code_in_the_place_of_a_tensor_is_refused(folder, trace):
    put_in_values(folder, trace)
    for read in (
        lambda: read_whole(folder, "state_dict"),
        lambda: load_into({"optimizer_0": {"param_groups": [{"lr": 0.0}]}}, folder, no_dist=True),
    ):
        with pytest.raises(CheckpointError, match=r"last\.ckpt is refused: it holds Python objects") as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1
    assert not trace.exists()


def put_in_values(folder, trace):
    (file,) = folder.glob("*.distcp")
    torch.save(Malice(trace), trace)
    bad = trace.read_bytes()
    trace.unlink()
    end = file.stat().st_size
    file.write_bytes(file.read_bytes() + bad)

    def change(metadata):
        for info in metadata.storage_data.values():
            info.offset, info.length = end, len(bad)

    change_metadata(folder, change)


def test_code_in_what_lightning_stores_is_refused(folder, trace):
    torch.save({"global_step": 1, "callbacks": Malice(trace)}, folder / "meta.pt")
    seal(folder)
    with pytest.raises(CheckpointError, match=r"last\.ckpt/meta\.pt is refused: it holds Python objects"):
        read_rest(folder)
    assert "is refused" in newest_good(folder.parent).faults[folder]
    assert not trace.exists()


@pytest.mark.parametrize("command", ["export", "generate"])
@pytest.mark.parametrize("place", ["metadata", "values", "rest"])
def test_commands_refuse_code_in_one_line(folder, trace, capsys, command, place):
    if place == "metadata":
        change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Malice(trace)))
    elif place == "values":
        put_in_values(folder, trace)
    else:
        torch.save({"global_step": 1, "callbacks": Malice(trace)}, folder / "meta.pt")
        seal(folder)
    trace.unlink(missing_ok=True)
    with pytest.raises(SystemExit):
        main([command, "--ckpt_path", str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}")
    assert "refers to shard_folders.touch" in line or "is refused: it holds Python objects" in line
    assert not trace.exists()


def test_every_file_of_a_folder_has_to_be_listed(tmp_path):
    folder = write_shards(tmp_path / "last.ckpt")
    assert fault_of_folder(folder) is None
    (folder / "__1_0.distcp").write_bytes(b"x")
    fault = "is refused: its SHA256SUMS does not list __1_0.distcp, which did not come with the checkpoint"
    assert [fault_of_folder(folder, share, 2) for share in range(2)] == [fault, fault]
    assert newest_good(tmp_path) == (None, {folder: fault})
    seal(folder)
    assert fault_of_folder(folder) is None
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert fault_of_folder(folder) == "cannot be read (its SHA256SUMS)"
    (folder / "SHA256SUMS").unlink()
    assert fault_of_folder(folder) == "is incomplete (a folder of shards without SHA256SUMS)"
