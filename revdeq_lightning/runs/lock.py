"""A lock on a run's folder that prevents a second process from training in it."""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    descriptor: int | None = None
    before: bytes | None = None
    with suppress(OSError):  # another user's file
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if descriptor is not None:
            before = _take(descriptor, folder)
        yield
    finally:
        if descriptor is not None:
            if before is not None:  # a start that is refused changes nothing in the folder
                _write(descriptor, before)
            os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bytes:
    """Take the lock and write this process into the file; return what it held before."""
    begin = time.monotonic()
    is_told = False
    while not _is_ours(descriptor):
        host, _, pid = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
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
    before = os.pread(descriptor, 300, 0)
    _write(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode())
    return before


def _is_ours(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _write(descriptor: int, content: bytes) -> None:
    with suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
