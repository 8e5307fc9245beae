"""Checkpoint files: whole or absent, sealed with a checksum, checked before they are trusted. No Lightning in here.

The checksum is the comment of the zip archive that `torch.save` writes: `sha256:` and 64 digits, over the file as it
would be without a comment. So it is in the file itself: it cannot be forgotten in a copy, and there is no moment
between two writes at which one file speaks of another's content. `torch.load` and `unzip` read it as any other.

A folder of shards holds `SHA256SUMS`, which `sha256sum --check` reads, and takes its name when all of it is there. It
has to list every other file: nothing else in the folder could be told from what was put there later.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from revdeq_lightning.checkpoints.names import BEST, LAST
from revdeq_lightning.errors import CheckpointError

SHARDED_PARTS = (".metadata", "meta.pt")
"""Without both a folder is no finished checkpoint of shards: the last that is written, by the first process."""

SUMS = "SHA256SUMS"

BETWEEN_STEPS = "between_steps"
"""Key of a checkpoint that was written in the midst of accumulated gradients, which it does not hold."""

_LABEL = b"sha256:"
_COMMENT_BYTES = len(_LABEL) + 64
_BEGIN_OF_ARCHIVE = b"PK\x03\x04"
_END_OF_ARCHIVE, _END_BYTES = b"PK\x05\x06", 22
"""What an archive ends with, before its comment; the last two bytes are the comment's length."""
_CHUNK_BYTES = 1 << 24


class Found(NamedTuple):
    """The newest checkpoint of a folder that can be used, and why others cannot.

    Attributes:
        path: None if there is none.
        faults: By path: what is wrong with a file that was looked at.
    """

    path: Path | None
    faults: dict[Path, str]


def write_checkpoint(checkpoint: Any, path: str | Path) -> None:
    """Write beside the target, sync, rename: at each moment the path holds a whole checkpoint, old or new.

    Raises:
        OSError: If the file cannot be written; what was at `path` is still there.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb+") as file:
            _save_sealed(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Check and read a checkpoint; no code in it is run.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or something else.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    if fault := fault_of_seal(Path(path)):
        raise CheckpointError(f"{path} {fault}")
    try:
        checkpoint = _load(path, map_location=map_location)
    except Exception as error:  # torch raises many kinds for what is not a checkpoint
        raise CheckpointError(f"{path} {reason_of(error)}") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds no checkpoint but a {type(checkpoint).__name__}")
    return checkpoint


def newest_good(folder: Path, *, at_most: int | None = None) -> Found:
    """The newest checkpoint of a run's folder: `last.ckpt`, and if that is not there or damaged the one of most steps.

    One from which a run does not go on exactly is taken only where there is no other. Leaves all files as they are;
    other names than `*.ckpt` are not looked at, but for what a process had put aside for a newer one when it was
    killed (`put_in_place`).

    Args:
        folder: Where the checkpoints lie.
        at_most: Of no more optimizer steps than these.
    """
    last = folder / LAST
    steps, faults = steps_of([last] if last.exists() else [], at_most)
    if not steps:
        others = [path for path in sorted(folder.glob("*.ckpt")) if path != last]
        others += sorted(folder.glob(".*.ckpt.old"))
        steps, other_faults = steps_of(others, at_most)
        faults |= other_faults
    return Found(max(steps, key=lambda path: steps[path], default=None), faults)


def other_checkpoint(path: str | Path) -> str:
    """For the message on one that cannot be used: the newest beside it that can."""
    other = newest_good(Path(path).parent).path
    return f": go on from {other}" if other else ""


class Steps(NamedTuple):
    """How far a run had got in a checkpoint; the later, the more.

    Attributes:
        is_exact: Whether a run goes on from there as if nothing had been: not from `BETWEEN_STEPS`, and not from
            `best.ckpt`, which is written before its validation is logged, and may be the end of the run.
        number: Optimizer steps.
    """

    is_exact: bool
    number: int


def steps_of(paths: list[Path], at_most: int | None = None) -> tuple[dict[Path, Steps], dict[Path, str]]:
    """Optimizer steps of the checkpoints that can be used, and what is wrong with the others."""
    steps: dict[Path, Steps] = {}
    faults: dict[Path, str] = {}
    for path in paths:
        try:
            content = contents(path)
        except CheckpointError as error:
            faults[path] = str(error).removeprefix(f"{path} ")
            continue
        is_exact = not content.get(BETWEEN_STEPS, False) and path.name != BEST
        found = Steps(is_exact, content["global_step"])
        if at_most is None or found.number <= at_most:
            steps[path] = found
    return steps, faults


def contents(path: Path) -> dict[str, Any]:
    """What a checkpoint of a training run holds, its weights as a memory map: of them nothing is read a second time.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    if fault := fault_of_seal(path):
        raise CheckpointError(f"{path} {fault}")
    file = path / "meta.pt" if path.is_dir() else path
    try:
        # Wherever it was written: on a GPU that is not here, or that is not to be filled.
        content = _load(file, mmap=zipfile.is_zipfile(file), map_location="cpu")
    except Exception as error:  # torch raises many kinds for what is not a checkpoint
        raise CheckpointError(f"{path} {reason_of(error)}") from None
    if not (isinstance(content, dict) and isinstance(content.get("global_step"), int) and "loops" in content):
        raise CheckpointError(f"{path} is something else than the checkpoint of a training run")
    return content


def fault_of_seal(path: Path) -> str | None:
    """What is wrong with a file whose end or checksum tells it; None also for a file that has no checksum."""
    if path.is_dir():
        return fault_of_folder(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES - _COMMENT_BYTES))
            tail = file.read()
            end = tail.rfind(_END_OF_ARCHIVE)
            comment = tail[end + _END_BYTES :]
            if end < 0:
                file.seek(0)
                if file.read(4) == _BEGIN_OF_ARCHIVE:
                    return "is damaged (it does not end where its archive does)"
                return "is empty" if size == 0 else None  # of another kind: reading will tell
            if tail[end + _END_BYTES - 2 : end + _END_BYTES] != struct.pack("<H", len(comment)):
                return "is damaged (its end is missing)"
            if not comment:
                return None
            file.seek(0)
            computed = hashlib.sha256()
            for chunk in _chunks(file, size - len(comment) - 2):
                computed.update(chunk)
            computed.update(b"\0\0")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    whole = comment == _LABEL + computed.hexdigest().encode()
    return None if whole else "is damaged (its checksum does not match)"


def fault_of_folder(path: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a folder of shards: a file that is missing, changed, or not in `SHA256SUMS`.

    Args:
        path: The folder.
        share: Every `num_shares`-th file is read, from this one on: so several processes read a folder together.
        num_shares: Number of these processes.
    """
    missing = [name for name in (*SHARDED_PARTS, SUMS) if not (path / name).is_file()]
    if missing:
        return f"is incomplete (a folder of shards without {missing[0]})"
    try:
        lines = (path / SUMS).read_text().splitlines()
        unlisted = {file.name for file in path.iterdir()} - {SUMS}
    except (OSError, UnicodeDecodeError):
        return f"cannot be read (its {SUMS})"
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if unlisted := unlisted - sums.keys():
        return f"is refused: its {SUMS} does not list {min(unlisted)}, which did not come with the checkpoint"
    for name in sorted(sums)[share::num_shares]:
        if not (path / name).is_file():
            return f"is incomplete (a folder of shards without {name})"
        try:
            computed = checksums([path / name])[name]
        except OSError as error:
            return f"cannot be read ({name}: {error.strerror})"
        if computed != sums[name]:
            return f"is damaged (the checksum of {name} does not match)"
    return None


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their names, in hexadecimal digits."""
    sums = {}
    for path in files:
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def synced_checksums(files: Iterable[Path]) -> dict[str, str]:
    """The same of files just written, once they are on the disk."""
    paths = list(files)
    for path in paths:
        sync(path)
    return checksums(paths)


def write_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Write the checksums of files by name into their folder, and wait until it is on the disk."""
    with (folder / SUMS).open("w") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def put_in_place(new: Path, target: Path) -> None:
    """Give a file or folder that is whole and on the disk its name, which an older one may have.

    A file takes the place of a file in one step. Where one of them is a folder the old one is put aside first: of a
    process that is killed in between it stays there, as the only one of its name, and `newest_good` finds it.

    Raises:
        IsADirectoryError: If the target is a folder of something else.
        OSError: If names cannot be changed there.
    """
    if target.is_dir() and not any((target / name).exists() for name in SHARDED_PARTS):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, and no checkpoint", str(target))
    aside = target.with_name(f".{target.name}.old")
    if target.is_dir() or (new.is_dir() and os.path.lexists(target)):
        if os.path.lexists(aside):  # a process that was killed left both, and the removal of one may have begun
            remove(target if fault_of_seal(target) else aside)
        if os.path.lexists(target):
            target.rename(aside)
    new.replace(target)
    sync(target.parent)
    with contextlib.suppress(OSError):  # the next one tries again
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what processes that were killed in the midst of a write left behind; no other may be writing there.

    What was put aside for a newer one stays until that one can be used.
    """
    leftovers = sorted(folder.glob(".*.part"))
    for aside in folder.glob(".*.ckpt.old"):
        newer = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
        leftovers += [aside] if newer.exists() and steps_of([newer])[0] else []
    for path in leftovers:
        remove(path)
    return leftovers


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; their names are on the disk, as otherwise nothing in them would be."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashingWriter:
    """A file for `torch.save`, which hashes what it is given and keeps the error that PyTorch would replace."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.hash.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        if self.error is None:
            self.file.flush()


def _save_sealed(checkpoint: Any, file: BinaryIO) -> None:
    writer = _HashingWriter(file)
    try:
        torch.save(checkpoint, cast(Any, writer))
    except Exception:
        if writer.error is not None:
            raise writer.error from None
        raise
    file.seek(-_END_BYTES, os.SEEK_END)
    end = file.read()
    if not (end.startswith(_END_OF_ARCHIVE) and end.endswith(b"\0\0")):
        raise OSError(f"{getattr(file, 'name', file)}: torch.save wrote no zip archive to put a checksum in")
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _COMMENT_BYTES) + _LABEL + writer.hash.hexdigest().encode())


def _load(path: str | Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on foreign files, which are refused anyway
        return torch.load(path, weights_only=True, **options)


def _chunks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0 and (chunk := file.read(min(num_bytes, _CHUNK_BYTES))):
        num_bytes -= len(chunk)
        yield chunk


def reason_of(error: BaseException) -> str:
    """Why something is no checkpoint, by what PyTorch raised of it."""
    if "unsupported global" in str(error).lower():
        return "is refused: it holds Python objects, whose loading could run any code, not only plain data and tensors"
    return f"is not a checkpoint, or a truncated one ({type(error).__name__})"
