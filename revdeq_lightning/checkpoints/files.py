"""Checkpoint files: whole or absent, and checked before they are trusted. No Lightning in here.

A file is the zip archive that `torch.save` writes, with the zip's own checksum (CRC-32) of each entry, which `unzip -t`
checks, too. A folder of shards holds `SHA256SUMS`, which `sha256sum --check` reads, and gets its name when all of it is
there. It has to list every other file: nothing else shows what was added to the folder later.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from revdeq_lightning.checkpoints.names import BEST, LAST, REST, SUMS
from revdeq_lightning.errors import CheckpointError

BETWEEN_STEPS = "between_steps"
"""Key of a checkpoint written between two optimizer steps; it does not hold the gradients accumulated so far."""


class Found(NamedTuple):
    """The newest usable checkpoint of a folder, if any, and by path what is wrong with others."""

    path: Path | None
    faults: dict[Path, str]


class Steps(NamedTuple):
    """How far a run had got at a checkpoint; later ones compare greater.

    Attributes:
        is_exact: Whether a run resumed from it equals the undisturbed run. Not so for `BETWEEN_STEPS`, nor for
            `best.ckpt`, which is written before its validation is logged and may be the end of the run.
        number: Optimizer steps.
    """

    is_exact: bool
    number: int


def write_checkpoint(checkpoint: Any, path: str | Path) -> None:
    """Write beside the target, sync, rename: at each moment the path holds a whole checkpoint, old or new.

    Raises:
        OSError: If the file cannot be written; what was at `path` is still there.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            writer = _Writer(file)
            try:
                torch.save(checkpoint, cast(Any, writer))
            except Exception:
                if writer.error is not None:
                    raise writer.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Check and read a checkpoint without running code in it.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    if fault := fault_of(path):
        raise CheckpointError(f"{path} {fault}")
    file = path / REST if path.is_dir() else path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of other programs, which are refused anyway
            mmap = mmap and zipfile.is_zipfile(file)
            content = torch.load(file, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise CheckpointError(f"{path} {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint (it holds a {type(content).__name__})")
    return content


def contents(path: Path) -> dict[str, Any]:
    """What a checkpoint of a training run holds; tensors are mapped into memory, not read. Raises as above."""
    content = read_checkpoint(path, mmap=True)
    if not (isinstance(content.get("global_step"), int) and "loops" in content):
        raise CheckpointError(f"{path} is not the checkpoint of a training run")
    return content


def newest_good(folder: Path, *, at_most: int | None = None) -> Found:
    """The newest checkpoint of a run's folder: `last.ckpt`, or if that is missing or damaged the one of most steps.

    Inexact checkpoints (`Steps`) are taken only if there is no other. Apart from `*.ckpt`, only what a process killed
    in `put_in_place` had set aside is considered. No file is changed.

    Args:
        folder: Folder of the checkpoints.
        at_most: Greatest number of optimizer steps.
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
    """The end of an error about an unusable checkpoint: the newest usable one in its folder."""
    other = newest_good(Path(path).parent).path
    return f": go on from {other}" if other not in (None, Path(path)) else ""


def steps_of(paths: list[Path], at_most: int | None = None) -> tuple[dict[Path, Steps], dict[Path, str]]:
    """Optimizer steps of the usable checkpoints, and what is wrong with the others."""
    steps: dict[Path, Steps] = {}
    faults: dict[Path, str] = {}
    for path in paths:
        try:
            content = contents(path)
        except CheckpointError as error:
            faults[path] = str(error).removeprefix(f"{path} ")
            continue
        is_exact = not content.get(BETWEEN_STEPS, False) and path.name != BEST
        if at_most is None or content["global_step"] <= at_most:
            steps[path] = Steps(is_exact, content["global_step"])
    return steps, faults


def fault_of(path: Path) -> str | None:
    """What is wrong with a file or folder, as its checksums tell; None also for files that are no zip archive."""
    if path.is_dir():
        return fault_of_folder(path)
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            if begin != b"PK\x03\x04":
                return None if begin else "is empty"
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # PyTorch takes an entry with this bit for a folder, and returns memory that it never filled.
            folders = any(entry.external_attr & 0x10 for entry in archive.infolist())
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except zipfile.BadZipFile:
        return "is damaged (it does not end where its archive does)"
    except Exception as error:  # the zip module raises many kinds
        return f"is damaged ({type(error).__name__})"
    return "is damaged (its checksum does not match)" if damaged or folders else None


def fault_of_folder(path: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a folder of shards: a file that is missing, changed, or not in `SHA256SUMS`.

    Args:
        path: The folder.
        share: Every `num_shares`-th file is read, from this one on: so several processes read a folder together.
        num_shares: Number of these processes.
    """
    if (path / ".metadata").exists():
        return (
            "is a sharded checkpoint of version 0.1.0.dev0, which is not read any more: resume it with that version and"
            " --trainer.strategy.sharded_checkpoints=false, and go on from the file that it writes"
        )
    if missing := [name for name in (REST, SUMS) if not (path / name).is_file()]:
        return f"is incomplete (a folder of shards without {missing[0]})"
    try:
        lines = (path / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return f"cannot be read (its {SUMS})"
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = {file.name for file in path.iterdir()} - {SUMS}
    if unlisted := present - sums.keys():
        return f"is refused: its {SUMS} does not list {min(unlisted)}, which did not come with the checkpoint"
    if absent := sums.keys() - present:
        return f"is incomplete (a folder of shards without {min(absent)})"
    for name in sorted(sums)[share::num_shares]:
        try:
            if checksums([path / name])[name] != sums[name]:
                return f"is damaged (the checksum of {name} does not match)"
        except OSError as error:
            return f"cannot be read ({name}: {error.strerror})"
    return None


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their names, in hexadecimal digits."""
    sums = {}
    for path in files:
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


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
    if target.is_dir() and not (target / REST).exists():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, and no checkpoint", str(target))
    aside = target.with_name(f".{target.name}.old")
    if target.is_dir() or (new.is_dir() and os.path.lexists(target)):
        if os.path.lexists(aside):  # a process that was killed left both, and the removal of one may have begun
            remove(target if fault_of(target) else aside)
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


class _Writer:
    """A file for `torch.save`, which would replace the file's own error by one of another kind."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        if self.error is None:
            self.file.flush()


def reason_of(error: BaseException) -> str:
    """Why something is not a checkpoint, from the error that PyTorch raised."""
    if "unsupported global" in str(error).lower():
        return "is refused: it holds Python objects beside plain data and tensors, and loading those could run any code"
    return f"is not a checkpoint, or a truncated one ({type(error).__name__})"
