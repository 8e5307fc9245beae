"""A lock on a run's folder that prevents a second process from training in it."""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path


class LockedError(RuntimeError):
    """Another process trains in the folder; the message is one line that says what to do."""


LOCK = ".lock"
PATIENCE = 120.0
"""Seconds to wait for another machine's lock, which network file systems release late if it died (NFS: 90 s)."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which only this process trains in the folder; raises `LockedError` if another one does.

    The kernel releases the lock when the process ends for any reason; the file remains, which named the owner. A record
    lock (`lockf`) belongs to this process only: unlike with `flock`, data-loading processes, which may outlive it, do
    not inherit it, and the process cannot lock itself out. On file systems without locks, continue without one.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # another user's file, a full disk
            file = stack.enter_context((folder / LOCK).open("a+b", buffering=0))
            _take(file, folder)
        yield


def _take(file: FileIO, folder: Path) -> None:
    """Take the lock and write this process into the file."""
    begin, is_told = time.monotonic(), False
    while not _is_ours(file):
        file.seek(0)
        host, _, pid = file.read(300).decode(errors="replace").strip().partition(" ")
        fault = f"another process trains in {folder} ({pid} on {host})"
        advice = "wait until it ends, or choose another run.version"
        if host == socket.gethostname():
            raise LockedError(f"{fault}: {advice}")
        if time.monotonic() - begin >= PATIENCE:
            raise LockedError(f"{fault}: {advice}; if its machine is lost, remove {folder / LOCK}")
        if host and not is_told:
            print(f"{fault}: waiting, in case its machine is lost", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}\n".encode())


def _is_ours(file: FileIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        return False
    except OSError:  # a file system without locks
        pass
    return True
