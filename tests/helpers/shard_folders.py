"""Folders of shards, written by this process, and what may happen to them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from revdeq_lightning.checkpoints.files import checksums, write_checksums
from revdeq_lightning.checkpoints.names import SUMS
from revdeq_lightning.checkpoints.sharded import VALUES, other_values, write_part

STATE = {
    "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7)},
    "optimizer_0": {"param_groups": [{"lr": 0.25}], "state": {"w": {"exp_avg": torch.ones(2, 3).bfloat16()}}},
}


def write_shards(folder: Path, step: int = 1) -> Path:
    """A checkpoint of this step, sealed."""
    folder.mkdir(exist_ok=True)
    write_part(STATE, folder, 0)
    torch.save({"global_step": step, "loops": {}, VALUES: other_values(STATE)}, folder / "meta.pt")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the checksums of all that is in the folder now."""
    write_checksums(folder, checksums(path for path in folder.iterdir() if path.name != SUMS))


def change_places(folder: Path, change: Any) -> None:
    """Let `change` do something to what the file of the first process says of its tensors' places; sealed."""
    path = folder / "process-0.safetensors"
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    changed = change(places)
    save_file(load_file(path), path, {"DCP_SHARDING_INFO": changed if isinstance(changed, str) else json.dumps(places)})
    seal(folder)


class Malice:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (str(self.path),)


def touch(path: str) -> None:
    Path(path).touch()
