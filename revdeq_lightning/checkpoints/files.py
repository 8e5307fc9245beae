"""Checkpoint files that are written atomically and verified before use. Independent of Lightning.

A file is the zip archive that `torch.save` writes, with a CRC-32 checksum of each entry, which `unzip -t` also checks.
A sharded checkpoint is a folder with `SHA256SUMS`, readable by `sha256sum --check`, and gets its name when it is
complete. `SHA256SUMS` must list every other file, so that files added later are detected.
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
from typing import Any, NamedTuple

import torch

from revdeq_lightning.checkpoints.names import BEST, LAST, REST, SUMS
from revdeq_lightning.errors import CheckpointError

BETWEEN_STEPS = "between_steps"
"""Key of a checkpoint written between two optimizer steps, without the gradients accumulated so far."""


class Found(NamedTuple):
    """The newest usable checkpoint of a folder, if any, and what is wrong with others, by path."""

    path: Path | None
    faults: dict[Path, str]


class Steps(NamedTuple):
    """Progress of a run at a checkpoint; more progress compares greater.

    Attributes:
        is_exact: Whether a run resumed from it equals the uninterrupted run. False for `BETWEEN_STEPS`, and for
            `best.ckpt`, which is written before its validation is logged.
        number: Number of optimizer steps.
    """

    is_exact: bool
    number: int


def write_checkpoint(checkpoint: Any, path: str | Path) -> None:
    """Write a temporary file, sync it, and rename it: the path always has a complete checkpoint, old or new.

    Raises:
        OSError: If the file cannot be written; an existing file is left unchanged.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # by which `torch.save` may replace the error of the file
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Verify and read a checkpoint without running code from it.

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
            warnings.simplefilter("ignore")  # about files of other programs, which are rejected anyway
            mmap = mmap and zipfile.is_zipfile(file)
            content = torch.load(file, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # torch raises many types
        raise CheckpointError(f"{path} {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint (it holds a {type(content).__name__})")
    return content


def contents(path: Path) -> dict[str, Any]:
    """Like `read_checkpoint`, but only for training runs, and with tensors mapped into memory instead of read."""
    content = read_checkpoint(path, mmap=True)
    if not (isinstance(content.get("global_step"), int) and "loops" in content):
        raise CheckpointError(f"{path} is not the checkpoint of a training run")
    return content


def steps_of(path: Path) -> Steps:
    """Progress at a checkpoint; raises what `read_checkpoint` raises, also if it is not one of a training run."""
    content = contents(path)
    is_exact = not content.get(BETWEEN_STEPS, False) and path.name not in (BEST, f".{BEST}.old")
    return Steps(is_exact, content["global_step"])


def newest_good(folder: Path) -> Found:
    """The newest checkpoint in a folder: `last.ckpt`, or the one with the most steps if that is missing or damaged.

    Inexact checkpoints (see `Steps`) are chosen only if there is no other. The search covers `*.ckpt` and files that a
    process killed in `put_in_place` had set aside. No file is changed.
    """
    last = folder / LAST
    others = [*sorted(folder.glob("*.ckpt")), *sorted(folder.glob(".*.ckpt.old"))]
    steps: dict[Path, Steps] = {}
    faults: dict[Path, str] = {}
    for path in [last] * last.exists() + [path for path in others if path != last]:
        try:
            steps[path] = steps_of(path)
        except CheckpointError as error:
            faults[path] = str(error).removeprefix(f"{path} ")
        if last in steps:
            break
    return Found(max(steps, key=lambda path: steps[path], default=None), faults)


def other_checkpoint(path: str | Path) -> str:
    """End of an error message about an unusable checkpoint: the newest usable one in its folder."""
    other = newest_good(Path(path).parent).path
    return f": continue from {other}" if other not in (None, Path(path)) else ""


def fault_of(path: Path) -> str | None:
    """What is wrong with a file or folder according to its checksums; None also for files that are not zip archives."""
    if path.is_dir():
        return fault_of_folder(path)
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            if begin != b"PK\x03\x04":
                return None if begin else "is empty"
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # PyTorch treats an entry with this bit as a folder and returns uninitialized memory.
            folders = any(entry.external_attr & 0x10 for entry in archive.infolist())
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except zipfile.BadZipFile:
        return "is damaged (it does not end where its archive does)"
    except Exception as error:  # the zip module raises many types
        return f"is damaged ({type(error).__name__})"
    return "is damaged (its checksum does not match)" if damaged or folders else None


def fault_of_folder(path: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a folder of shards: a file that is missing, changed, or not in `SHA256SUMS`.

    Args:
        path: The folder.
        share: Index of this process among those that verify the folder together; each reads a part of the files.
        num_shares: Number of these processes.
    """
    if (path / ".metadata").exists():
        return (
            "is a sharded checkpoint of version 0.1.0.dev0, which can no longer be read: resume it with that version"
            " and --trainer.strategy.sharded_checkpoints=false, then continue from the file that it writes"
        )
    if missing := [name for name in (REST, SUMS) if not (path / name).is_file()]:
        return f"is incomplete (a folder of shards without {missing[0]})"
    try:
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return f"cannot be read (its {SUMS})"
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = {file.name for file in path.iterdir()} - {SUMS}
    if unlisted := present - sums.keys():
        return f"is refused: its {SUMS} does not list {min(unlisted)}, so this file is not part of the checkpoint"
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
    """Hexadecimal SHA-256 of each file, by name."""
    sums = {}
    for path in files:
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def write_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Write the checksums of files, by name, into their folder, and sync it."""
    with (folder / SUMS).open("w", encoding="utf-8") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def put_in_place(new: Path, target: Path) -> None:
    """Rename a complete, synced file or folder to `target`, replacing an older one.

    A file replaces a file atomically. If either is a folder, the old one is set aside first: if the process is killed
    before the new one is in place, `newest_good` finds the old one there.

    Raises:
        OSError: If a rename fails, or the target is a folder that is not a checkpoint.
    """
    if target.is_dir() and not (target / REST).exists():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, and no checkpoint", str(target))
    aside = target.with_name(f".{target.name}.old")
    if target.is_dir() or (new.is_dir() and os.path.lexists(target)):
        if os.path.lexists(aside):  # a killed process left both, perhaps while removing one
            remove(target if fault_of(target) else aside)
        if os.path.lexists(target):
            target.rename(aside)
    new.replace(target)
    sync(target.parent)
    with contextlib.suppress(OSError):  # the next save tries again
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove files of killed processes; no process may be writing there.

    A checkpoint that was set aside for a newer one is kept until the newer one is usable.
    """
    leftovers = sorted(folder.glob(".*.part"))
    for aside in folder.glob(".*.ckpt.old"):
        with contextlib.suppress(FileNotFoundError, CheckpointError):
            steps_of(aside.with_name(aside.name.removeprefix(".").removesuffix(".old")))
            leftovers.append(aside)
    for path in leftovers:
        remove(path)
    return leftovers


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and sync their names, without which their content could be lost."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def try_folder(folder: Path) -> None:
    """Create a folder if it is missing; raise OSError if no file can be written there."""
    probe = folder / f".probe.{os.getpid()}.part"
    make_folder(folder)
    probe.write_bytes(b"x")
    probe.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: BaseException) -> str:
    """Why a file is not a checkpoint, from the error that PyTorch raised."""
    if "unsupported global" in str(error).lower():
        return "is refused: it holds Python objects besides plain data and tensors, which could run arbitrary code"
    return f"is not a checkpoint, or a truncated one ({type(error).__name__})"
