"""Folders of shards, written by PyTorch in this process, and what may happen to them."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from revdeq_lightning.checkpoints.files import SUMS, checksums, write_checksums

STATE = {
    "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7)},
    "optimizer_0": {"param_groups": [{"lr": 0.25}], "state": {"w": {"exp_avg": torch.ones(2, 3).bfloat16()}}},
}


def write_shards(folder: Path, step: int = 1) -> Path:
    """A checkpoint of this step, sealed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no other process takes part
        save(STATE, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": step, "loops": {}}, folder / "meta.pt")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the checksums of all that is in the folder now."""
    write_checksums(folder, checksums(path for path in folder.iterdir() if path.name != SUMS))


def change_metadata(folder: Path, change: Any) -> None:
    """Let `change` do something to the metadata as PyTorch reads it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)


class Malice:
    """Unpickling it creates a file, and goes on with another object."""

    def __init__(self, path: Path, then: Any = None) -> None:
        self.path, self.then = path, then

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (str(self.path), self.then)


def touch(path: str, then: Any) -> Any:
    Path(path).touch()
    return then
