"""What a run of the command line left in its folder."""

import csv
import shutil
from pathlib import Path
from typing import Any

import torch

TRAINED = ("state_dict", "trained_weights", "optimizer_states", "lr_schedulers", "random_states", "global_step")


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what depends on the clock; evaluations after training are left out."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            {key: v for key, v in row.items() if v and not key.startswith("system/")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"step"} and not any(key.startswith("test/") for key in row)]


def trained(checkpoint: Path) -> dict[str, Any]:
    """What training goes on from."""
    content = torch.load(checkpoint, weights_only=True)
    return {key: content[key] for key in TRAINED if key in content}


def put_back(kept: Path, folder: Path, *names: str) -> None:
    """The run's folder as it was kept, with these checkpoints alone. (At another path `best.ckpt` begins anew.)"""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name not in names:
            path.unlink()


def names(folder: Path) -> set[str]:
    """All files of a run."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def damage(path: Path) -> None:
    """Cut the end off, as a crash of the machine does."""
    content = path.read_bytes()
    path.unlink()  # another name of the file stays whole
    path.write_bytes(content[: len(content) // 2])
