"""Sources of labeled images, including the embedded digits and CIFAR."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from revdeq_lightning.data.images.folder import open_folder
from revdeq_lightning.data.images.huggingface import open_huggingface
from revdeq_lightning.data.images.tables import ImageCollection, ImageSource, ImageTable, numbered_names
from revdeq_lightning.data.loading.draws import Draws

IMAGE_SOURCES = ("digits", "cifar10", "cifar100", "folder", "huggingface")

KNOWN_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the 50,000 training images per channel, on the scale 0 ... 1."""


def open_image_source(
    source: str,
    path: str | None,
    *,
    dataset_name: str | None,
    image_column: str | None,
    label_column: str | None,
    download: bool,
) -> ImageSource:
    """Open one of the `IMAGE_SOURCES`, with the arguments of `ImageDataModule`."""
    if source == "digits":
        return ImageSource(lambda: "digits", _read_digits, channels=1)
    if source == "folder":
        return open_folder(Path(str(path)))
    if source == "huggingface":
        return open_huggingface(str(path), dataset_name, image_column, label_column)
    # The published MD5 is verified, so the name identifies the content.
    return ImageSource(lambda: source, partial(_read_cifar, source, Path(path or "data"), download))


def _pixels_table(prefix: str, pixels: Any, labels: Any) -> ImageTable:
    number = len(pixels)
    return ImageTable(
        numbered_names(prefix, number, 5), np.asarray(labels, np.int64), np.arange(number), pixels.__getitem__
    )


def _read_digits() -> ImageCollection:
    """Open the digits; a fixed permutation selects a sixth of them for the test split."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = _pixels_table("digits", pixels, digits.target)
    order = Draws(0, 0).permutation(len(pixels))
    num_test = 297
    tables = {"train": everything.take(np.sort(order[num_test:])), "test": everything.take(np.sort(order[:num_test]))}
    return ImageCollection([str(digit) for digit in range(10)], tables)


def published_cifar(source: str) -> Any:
    """Torchvision's class, with the published names, URL, and checksums."""
    from torchvision.datasets import CIFAR10, CIFAR100

    return {"cifar10": CIFAR10, "cifar100": CIFAR100}[source]


def _read_cifar(source: str, path: Path, download: bool) -> ImageCollection:
    """Find `path/cifar-10-batches-py`, that folder itself, the archive, or its folder; else download to `path`."""
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    published = published_cifar(source)
    root = path.parent if path.name == published.base_folder else path
    if (root / published.base_folder).is_dir():
        return _unpacked_cifar(source, root)
    archive = path if path.is_file() else path / published.filename
    advice = (
        f"put {published.filename} (MD5 {published.tgz_md5}) into {path}/, or try the embedded images: "
        "make train-cifar CONFIG=configs/digits/default.yaml"
    )
    if not archive.is_file():
        if not download:
            raise FileNotFoundError(
                f"no {published.base_folder}/ and no {archive.name} in {path} (download is false): {advice}"
            )
        try:
            download_url(published.url, str(path), f"{archive.name}.part", published.tgz_md5)
            archive.with_name(f"{archive.name}.part").rename(archive)
        except (OSError, RuntimeError) as error:
            archive.with_name(f"{archive.name}.part").unlink(missing_ok=True)
            raise ConnectionError(f"cannot download {published.url} ({error}): {advice}") from None
    if not check_integrity(archive, published.tgz_md5):
        raise ValueError(f"{archive} is damaged or a different file (its MD5 is not {published.tgz_md5}): remove it.")
    with TemporaryDirectory() as folder:
        extract_archive(str(archive), folder)
        return _unpacked_cifar(source, Path(folder))


def _unpacked_cifar(source: str, root: Path) -> ImageCollection:
    from torchvision.datasets.utils import check_integrity

    published = published_cifar(source)
    try:
        splits = {"train": published(root, train=True), "test": published(root, train=False)}
    except RuntimeError:  # wrong checksum
        files = [*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])]
        paths = {root / published.base_folder / name: md5 for name, md5 in files}
        path, md5 = next(item for item in paths.items() if not check_integrity(*item))
        raise ValueError(f"{path} is damaged or a different file (its MD5 is not {md5}): remove it.") from None
    tables = {split: _pixels_table(f"{source}/{split}", part.data, part.targets) for split, part in splits.items()}
    return ImageCollection(list(splits["train"].classes), tables)
