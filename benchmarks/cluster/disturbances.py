"""Faults that `benchmarks.cluster.faults` injects into a run, its process, or its disk."""

import gc
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def malice(path: Path) -> None:
    """Replace the checkpoint by one that would create a file when loaded."""
    from revdeq_lightning.checkpoints.files import write_checkpoint

    class Malice:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path.parent}/malice",)

    path.unlink()
    write_checkpoint({"global_step": 10**6, "state_dict": Malice()}, path)


def poison() -> None:
    """Set a weight of the model that this process trains to NaN."""
    import torch
    from lightning import LightningModule

    task = next(found for found in gc.get_objects() if isinstance(found, LightningModule))
    with torch.no_grad():
        next(task.parameters()).view(-1)[0] = torch.nan


def kill_logger() -> None:
    """Kill the W&B child processes of this process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):  # the process has ended
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and "wandb-core" in path.with_name("cmdline").read_text():
                os.kill(int(path.parent.name), signal.SIGKILL)


def kill_children() -> None:
    for process in multiprocessing.active_children():
        os.kill(int(process.pid or 0), signal.SIGKILL)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system of 8 MB at this folder, which requires root; yield whether it is mounted."""
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def make_read_only(folder: Path) -> None:
    """Make the folder read-only until it is unmounted. A bind mount: a remount fails if a file is open for writing."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
