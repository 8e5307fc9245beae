"""What a command line tells the user: one line for what can be mended, none of what nobody can act on."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.checkpoints import CheckpointError
from revdeq_lightning.cli import fail

# What Lightning says to everybody and what nobody who starts a run from here can or need act on.
QUIET_INFO = (
    *("GPU available", "TPU available", "HPU available", "💡 Tip", "Seed set to", "`Trainer.fit` stopped"),
    *("Restored all states", "Restoring states", "Loaded model weights", "`weights_only` was not set"),
    *("Detected KeyboardInterrupt", "to estimate number of stepping batches"),
)
QUIET_WARNINGS = (
    r"Be aware that when using `ckpt_path`",  # evaluation needs none of the callbacks of training
    r"LightningCLI's args parameter",  # the arguments are those of the command line, less the task
    r".*does not have many workers",  # text comes from a memory map: 0 workers is fast enough
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and PyTorch
)


def quieten_lightning() -> None:
    """Drop messages and warnings by name; all others stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: not any(text in record.getMessage() for text in QUIET_INFO))
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not the user's
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message)


@contextmanager
def readable_checkpoint() -> Iterator[None]:
    """Tell in one line that a checkpoint cannot be used."""
    try:
        yield
    except CheckpointError as error:
        fail(str(error))


def lost_resource(error: Exception) -> str | None:
    """One line on what a run lost on its way: a file, the disk, a worker; None for another error."""
    *_, text = str(error).strip().splitlines() or [type(error).__name__]  # a worker's begins with its traceback
    if isinstance(error, OSError):
        return f"training cannot go on: {text}"
    if "DataLoader worker" in str(error):
        return f"training cannot go on: a process that loads data is gone: {text} Is memory short? Try data.num_workers"
    return None


def check_writable(folder: Path) -> None:
    """Say before the run that its folder cannot be written to.

    Raises:
        OSError: If not.
    """
    probe = folder / f".probe.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; choose another run.folder") from None


def say(line: str) -> None:
    """Tell the user one line, once for all processes."""
    if cast(Any, rank_zero_only).rank == 0:
        print(line, file=sys.stderr, flush=True)
