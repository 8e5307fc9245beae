"""What a command line tells the user: one line for what can be mended."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.checkpoints.files import Found, make_folder
from revdeq_lightning.cli.main import fail
from revdeq_lightning.errors import CheckpointError


@contextmanager
def readable_checkpoint() -> Iterator[None]:
    """Tell in one line that a checkpoint cannot be used."""
    try:
        yield
    except CheckpointError as error:
        fail(str(error))


def lost_resource(error: Exception, what: str) -> str | None:
    """One line on what training or a test (`what`) lost on its way: a file, the disk, a worker; None: another error."""
    *_, text = str(error).strip().splitlines() or [type(error).__name__]  # a worker's begins with its traceback
    if caught := re.match(r"Caught (\w+) in DataLoader worker", str(error)):
        # One of another class could not be made anew in this process: those of network libraries.
        told = isinstance(error, OSError) or caught[1] != type(error).__name__
        return f"{what} cannot go on: {text}" if told else None
    if "DataLoader timed out" in text:
        return f"{what} cannot go on: a process that loads data does not answer: {text}"
    # A worker that dies while it hands a batch over is a broken or unanswered connection.
    if isinstance(error, ConnectionError | EOFError) or re.search(r"DataLoader worker \(pid", text):
        return f"{what} cannot go on: a process that loads data is gone: {text} Is memory short? Try data.num_workers"
    if isinstance(error, OSError):
        return f"{what} cannot go on: {text}"
    return None


def check_writable(folder: Path) -> None:
    """Say before the run that its folder cannot be written to; all processes write into that of the first one.

    Raises:
        OSError: If not.
    """
    if cast(Any, rank_zero_only).rank:
        return
    probe = folder / f".probe.{os.getpid()}.part"
    try:
        make_folder(folder)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; choose another run.folder") from None


def say(line: str) -> None:
    """Tell the user one line, once for all processes."""
    if cast(Any, rank_zero_only).rank == 0:
        print(line, file=sys.stderr, flush=True)


def chosen(found: Found) -> str:
    """Path of the checkpoint that was found; tells which newer ones cannot be used."""
    for path, fault in found.faults.items():
        say(f"warning: {path} {fault}: going on from {found.path}")
    return str(found.path)
