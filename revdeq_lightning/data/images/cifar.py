"""CIFAR-10 and CIFAR-100 in the files that their authors publish (Krizhevsky 2009)."""

import hashlib
import os
import pickle
import secrets
import shutil
import tarfile
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from revdeq_lightning.data.images.tables import ArrayReader, ImageCollection, ImageSource, ImageTable

KNOWN_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the 50,000 training images, by channel, on the scale 0 ... 1."""

_TIMEOUT_SECONDS = 20


def open_cifar(source: str, path: str | None, download: bool) -> ImageSource:
    """The published data, from its folder or its archive under `path` (or `path` itself), else downloaded there.

    Every file is checked against the published MD5, so the name alone identifies the content.
    """
    return ImageSource(lambda: source, partial(_read, source, Path(path or "data"), download))


def _read(source: str, folder: Path, download: bool) -> ImageCollection:
    files = _find(source, folder)
    if files is None:
        _download(source, folder, download)
        files = _find(source, folder)
    assert files is not None
    published = _published(source)
    tables = {}
    for split, names in (("train", published.train_list), ("test", published.test_list)):
        batches: list[Any] = [pickle.loads(files[name], encoding="latin1") for name, _ in names]
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([batch.get("labels", batch.get("fine_labels")) for batch in batches]).astype(np.int64)
        tables[split] = ImageTable(ArrayReader(pixels, f"{source}/{split}"), np.arange(len(labels)), labels)
    meta: Any = pickle.loads(files[published.meta["filename"]], encoding="latin1")
    return ImageCollection(list(meta[published.meta["key"]]), tables)


def _published(source: str) -> Any:
    """Names, address and checksums, as torchvision lists them."""
    from torchvision.datasets import CIFAR10, CIFAR100

    return CIFAR10 if source == "cifar10" else CIFAR100


def _find(source: str, folder: Path) -> dict[str, bytes] | None:
    """The published files' contents, or None."""
    published = _published(source)
    meta = [published.meta["filename"], published.meta["md5"]]
    checksums = dict([*published.train_list, *published.test_list, meta])
    for unpacked in (folder / published.base_folder, folder):
        if (unpacked / meta[0]).is_file() and all((unpacked / name).is_file() for name in checksums):
            files = {name: (unpacked / name).read_bytes() for name in checksums}
            for name, content in files.items():
                _check(unpacked / name, hashlib.md5(content).hexdigest(), checksums[name])
            return files
    archive = folder if folder.is_file() else folder / published.filename
    if not archive.is_file():
        return None
    with archive.open("rb") as file:
        _check(archive, hashlib.file_digest(file, "md5").hexdigest(), published.tgz_md5)
    with tarfile.open(archive) as members:
        return {
            name: file.read()
            for member in members
            if (name := Path(member.name).name) in checksums and (file := members.extractfile(member)) is not None
        }


def _check(path: Path, md5: str, expected: str) -> None:
    if md5 != expected:
        raise ValueError(f"{path} is damaged or another file: its MD5 is {md5}, published is {expected}: remove it.")


def _download(source: str, folder: Path, download: bool) -> None:
    """Fetch the archive into `folder`: whole and with the published checksum, or not at all."""
    published = _published(source)
    advice = (
        f"put {published.filename} (MD5 {published.tgz_md5}) into {folder}/, or try the embedded images: "
        "make train-cifar CONFIG=configs/digits/default.yaml"
    )
    if folder.is_file() or not download:
        why = "it is a file" if folder.is_file() else "download is false"
        raise FileNotFoundError(
            f"no {published.base_folder}/ and no {published.filename} in {folder} ({why}): {advice}"
        )
    target = folder / published.filename
    temporary = folder / f".{published.filename}.{secrets.token_hex(4)}"
    folder.mkdir(parents=True, exist_ok=True)
    rank_zero_info(f"Downloading {published.url} into {folder} (once) ...")
    try:
        with urllib.request.urlopen(published.url, timeout=_TIMEOUT_SECONDS) as response, temporary.open("wb") as file:
            shutil.copyfileobj(response, file)
        with temporary.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != published.tgz_md5:
            raise OSError(f"its MD5 is {md5}")
        os.replace(temporary, target)
    except OSError as error:  # URLError and timeouts are among them
        raise ConnectionError(f"cannot download {published.url} ({error}): {advice}") from None
    finally:
        temporary.unlink(missing_ok=True)
