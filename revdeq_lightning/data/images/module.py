"""Images for classifiers: decoded once or by workers, augmented on the device, in a resumable order."""

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unicodedata import normalize as in_unicode

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from revdeq_lightning.data.images import decoding
from revdeq_lightning.data.images.augmentation import (
    NO_AUGMENTATION,
    AugmentationConfig,
    augment_normalized,
    augment_pixels,
)
from revdeq_lightning.data.images.batches import (
    DecodedImages,
    ImageBatch,
    ImageCollection,
    ImageSource,
    PreparedImages,
    split_images,
)
from revdeq_lightning.data.images.sources import IMAGE_SOURCES, KNOWN_STATISTICS, open_image_source
from revdeq_lightning.data.loading.array_cache import ArrayWriter, load_or_build
from revdeq_lightning.data.loading.base import AbstractDataModule, digest
from revdeq_lightning.data.loading.draws import shuffled_keys
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX, ResumableLoader
from revdeq_lightning.equilibrium.validation import require_choice, require_count, require_in_range
from revdeq_lightning.errors import CheckpointError

_CACHE_FORMAT = 2
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SOURCE = ("dataset_name", "image_column", "label_column", "download")
_SPLITTING = ("validation_fraction", "split_seed", "max_train_images", "max_eval_images")


class ImageData(NamedTuple):
    """Datasets by split, and their properties; mean and standard deviation are per channel, on the scale 0 ... 1.

    The checksums are of the training split's labels and images (of their names if images are decoded on demand).
    """

    class_names: list[str]
    channels: int
    mean: list[float]
    std: list[float]
    datasets: dict[str, PreparedImages] | dict[str, DecodedImages]
    checksums: dict[str, str]
    left_out: list[str]


class ImageDataModule(AbstractDataModule):
    """Images and their classes, as `ImageBatch`.

    Evaluation resizes the shorter side to `image_size / crop_fraction` (bicubic, antialiased) and crops the center; it
    uses every image exactly once and is deterministic. Training images are augmented individually on the device. Order
    and augmentation are functions of (seed, epoch, image), except for the partner in mixup and cutmix, the neighbor in
    the rank's batch. A run resumed from any checkpoint continues with the batch after the last trained one.

    Images of at most 64 pixels are decoded once, as for evaluation, into a folder in `cache_dir`, and read as a memory
    map. Larger ones are decoded on demand: set `num_workers`.

    Args:
        source: "digits" (scikit-learn's 1,797 gray digits of 8x8 pixels, of which 297 are the test split), "cifar10",
            "cifar100", "folder" or "huggingface".
        path: For "folder" a folder with `train/CLASS/*` (and `val/CLASS/*`, `test/CLASS/*`; or `Training`, `dev`, and
            other usual names) or `CLASS/*`, or a tar archive of one, which is not unpacked. For "huggingface" the
            dataset, or a local folder with its parquet files or its `save_to_disk` copy. For CIFAR the folder (default:
            data) with the published archive or its content, or to download it to; or the archive.
        dataset_name: For "huggingface" the configuration.
        image_column: For "huggingface", if there is more than one column of images.
        label_column: For "huggingface", if the choice is ambiguous.
        image_size: Side of the model's square input.
        crop_fraction: `image_size` divided by the shorter side that evaluation resizes to; null: 0.875 above 64 pixels
            (256 for 224), otherwise 1.
        channels: 1 (gray) or 3 (RGB); null: the source's (digits 1, the others 3).
        batch_size: Images per rank and step.
        augmentation: Augmentation of the training images.
        mean: Mean per channel on the scale 0 ... 1; null: CIFAR's known values, else computed from the prepared
            training images, else ImageNet's.
        std: Standard deviation, likewise.
        validation_fraction: Fraction of the training images, stratified by class, to use for validation if the data has
            no validation split. 0: no validation.
        split_seed: Determines them, together with the images' names; runs that differ only in `seed` share the split.
        max_train_images: Reduce the training split to this many images, stratified by class. None: all.
        max_eval_images: Likewise for validation and test, each.
        num_workers: Data-loading processes per rank. 0 is fast enough for prepared images.
        seed: Seed of order and augmentation, not negative.
        undecodable: For an image that cannot be decoded, "raise" an error that names it, or "skip" it with a warning.
        download: Whether CIFAR may be downloaded.
        in_memory: Decode all images once, regardless of size (true), or never (false). Null: up to 64 pixels.
        cache_dir: Folder for prepared images.

    Raises:
        ValueError: If an argument is out of range or does not fit the images.
        FileNotFoundError, ConnectionError: If the images cannot be found.
    """

    _items = "images"

    def __init__(
        self,
        source: str = "digits",
        path: str | None = None,
        dataset_name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int = 32,
        crop_fraction: float | None = None,
        channels: int | None = None,
        batch_size: int = 64,
        augmentation: AugmentationConfig = NO_AUGMENTATION,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        max_train_images: int | None = None,
        max_eval_images: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        undecodable: Literal["raise", "skip"] = "raise",
        download: bool = True,
        in_memory: bool | None = None,
        cache_dir: str = "data/cache",
    ) -> None:
        super().__init__()
        if isinstance(augmentation, dict):  # a checkpoint contains plain containers
            augmentation = AugmentationConfig(**augmentation)
        self.augmentation = replace(augmentation)  # a copy
        self.save_hyperparameters(ignore="augmentation")
        self.save_hyperparameters({"augmentation": asdict(self.augmentation)})
        require_choice("source", source, IMAGE_SOURCES)
        require_choice("undecodable", undecodable, decoding.UNDECODABLE)
        require_choice("channels", channels, (None, 1, 3), "1 is gray, 3 RGB")
        self._require_counts("image_size", optional=["max_train_images", "max_eval_images"])
        require_count("split_seed", split_seed, at_least=0)
        require_in_range("validation_fraction", validation_fraction, "[0, 1)")
        require_in_range("crop_fraction", 1 if crop_fraction is None else crop_fraction, "(0, 1]")
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std belong together, got mean {mean} and std {std}.")
        for value in std or ():
            require_in_range("std", value, "(0, inf)")
        if source == "digits" and path is not None:
            raise ValueError(f'source "digits" takes no path, got {path!r}.')
        if source in ("folder", "huggingface") and path is None:
            raise ValueError(f'source "{source}" needs a path, got None.')
        if source != "huggingface" and (dataset_name or image_column or label_column):
            raise ValueError(
                f'dataset_name, image_column and label_column are for source "huggingface", the source is "{source}".'
            )
        if self.augmentation.crop_padding >= image_size:
            got = self.augmentation.crop_padding
            raise ValueError(f"crop_padding must be smaller than the image of {image_size} pixels, got {got}.")
        self._skips = undecodable == "skip"
        self._data: ImageData | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices. Prepares the data if necessary."""
        return list(self._prepared().class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes. Prepares the data if necessary."""
        return len(self._prepared().class_names)

    @property
    def num_channels(self) -> int:
        """1 (gray) or 3 (RGB). Prepares the data if necessary."""
        return self._prepared().channels

    @property
    def image_size(self) -> int:
        """Side of the model's square input."""
        return int(self.hparams["image_size"])

    def num_images(self, split: str) -> int:
        """Images of a split."""
        return len(self._dataset(split))

    def found(self) -> dict[str, Any]:
        images = {split: self.num_images(split) for split in self.splits}
        return {"images": images, "classes": self.class_names, "left_out": self._prepared().left_out}

    def preprocessing_state(self) -> dict[str, Any]:
        """Preprocessing settings and class names for `preprocess_files`; plain containers."""
        data = self._prepared()
        return {
            "image_size": self.image_size,
            "resize": decoding.evaluation_resize(self.image_size, self.hparams["crop_fraction"]),
            "interpolation": decoding.INTERPOLATION,
            "channels": data.channels,
            "mean": list(data.mean),
            "std": list(data.std),
            "class_names": list(data.class_names),
        }

    def train_dataloader(self) -> ResumableLoader:
        dataset = self._dataset("train")
        return self._training_loader(dataset, len(dataset), partial(shuffled_keys, len(dataset), self.hparams["seed"]))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        # The host draws: it must know which images an operation changes.
        return moved._replace(keys=batch.keys) if isinstance(batch, ImageBatch) else moved

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, ImageBatch):
            return batch
        data, config, seed = self._prepared(), self.augmentation, self.hparams["seed"]
        if not batch.keys.shape[1]:
            return batch._replace(images=decoding.normalize(batch.images, data.mean, data.std))
        if isinstance(data.datasets["train"], DecodedImages):  # already cropped when decoded
            config = replace(config, random_resized_crop=None)
        pixels = augment_pixels(batch.images, config, batch.keys[:, 0], seed)
        mixed = augment_normalized(decoding.normalize(pixels, data.mean, data.std), config, batch.keys[:, 0], seed)
        partner_labels = batch.labels[mixed.partners]
        return batch._replace(images=mixed.images, partner_labels=partner_labels, weights=mixed.weights)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        then, now = ([in_unicode("NFC", n) for n in names] for names in (state_dict["class_names"], self.class_names))
        if then != now:
            other = [name for name in then if name not in now] or [name for name in now if name not in then] or then
            raise CheckpointError(
                f"the checkpoint was trained on different classes than these images have ({len(then)} and {len(now)}; "
                f'for example "{other[0]}" is in only one of them, or at a different index): use the data of that run.'
            )
        super().load_state_dict(state_dict)

    def _close_loaders(self) -> None:
        for loader in self._open_loaders.values():
            if isinstance(loader.dataset, DecodedImages) and (skipped := loader.dataset.take_skipped()):
                warnings.warn(decoding.skipped_message(skipped), stacklevel=2)
        super()._close_loaders()

    def _prepared(self) -> ImageData:
        self._data = self._data or self._prepare()
        return self._data

    def _prepare(self) -> ImageData:
        hparams = self.hparams
        source = open_image_source(hparams["source"], hparams["path"], **{name: hparams[name] for name in _SOURCE})
        resize = decoding.evaluation_resize(self.image_size, hparams["crop_fraction"])
        sizes = decoding.ImageSizes(hparams["channels"] or source.channels, self.image_size, resize)
        in_memory = self.image_size <= 64 if hparams["in_memory"] is None else hparams["in_memory"]
        data = self._in_memory(source, sizes) if in_memory else self._on_demand(source, sizes)
        if hparams["mean"] is not None:
            given: dict[str, Any] = {name: list(hparams[name]) for name in ("mean", "std")}
            for name, values in given.items():
                if len(values) != data.channels:
                    raise ValueError(f"{name} must have a value for each of the {data.channels} channel(s): {values}.")
            return data._replace(**given)
        if sizes.channels == 3 and (known := KNOWN_STATISTICS.get(hparams["source"])):
            return data._replace(mean=list(known[0]), std=list(known[1]))
        return data

    def _splitting(self) -> dict[str, Any]:
        return {name: self.hparams[name] for name in _SPLITTING}

    def _collect(self, source: ImageSource) -> ImageCollection:
        collection = source.open()
        return collection._replace(tables=split_images(collection.tables, **self._splitting()))

    def _in_memory(self, source: ImageSource, sizes: decoding.ImageSizes) -> ImageData:
        """Decode all images for evaluation into `cache_dir`, unless it has them."""
        key = [source.key(), self._splitting()]
        content = digest([_CACHE_FORMAT, key, sizes._asdict(), self._skips])
        path = Path(self.hparams["cache_dir"], f"{self.hparams['source']}-{self.image_size}px-{content}.arrays")
        cache = load_or_build(path, partial(self._decode_all, path, source, sizes))
        if skipped := cache.metadata["skipped"]:
            rank_zero_warn(decoding.skipped_message(skipped))
        datasets = {
            split: PreparedImages(cache.arrays[split], cache.arrays[f"{split}.labels"], training=split == "train")
            for split in cache.metadata["splits"]
        }
        mean, std, class_names = (cache.metadata[name] for name in ("mean", "std", "class_names"))
        checksums = {"image_checksum": cache.checksums["train"], "label_checksum": cache.checksums["train.labels"]}
        left_out = [*cache.metadata["left_out"], *([decoding.skipped_message(skipped)] if skipped else [])]
        return ImageData(class_names, sizes.channels, mean, std, datasets, checksums, left_out)

    def _decode_all(
        self, path: Path, source: ImageSource, sizes: decoding.ImageSizes, writer: ArrayWriter
    ) -> dict[str, Any]:
        class_names, tables, left_out = self._collect(source)
        rank_zero_info(f"Decoding {sum(map(len, tables.values()))} images into {path} (once) ...")
        skipped: list[str] = []
        counts = np.zeros((sizes.channels, 256))  # of the values in each channel of the training images
        for split, table in tables.items():
            dataset, num_decoded = DecodedImages(table, sizes, skip_undecodable=self._skips), 0
            for start in range(0, len(table), 256):
                batch = dataset[list(range(start, min(start + 256, len(table))))]
                decoded = batch.labels != IGNORE_INDEX
                images, num_decoded = batch.images[decoded].numpy(), num_decoded + int(decoded.sum())
                writer.append(split, images)
                writer.append(f"{split}.labels", batch.labels[decoded].numpy())
                if split == "train":
                    counts += [np.bincount(channel.ravel(), minlength=256) for channel in images.swapaxes(0, 1)]
            skipped += dataset.take_skipped()
            if not num_decoded:
                raise ValueError(f"none of the {len(table)} images of {split} can be decoded (such as {skipped[-1]}).")
        shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
        mean = shares @ values
        variance = (shares * (values - mean[:, None]) ** 2).sum(axis=1)
        std = np.sqrt(variance).clip(min=1 / 255)  # images of one color have 0
        metadata = {"class_names": class_names, "splits": list(tables), "skipped": skipped, "left_out": list(left_out)}
        return metadata | {"mean": mean.tolist(), "std": std.tolist()}

    def _on_demand(self, source: ImageSource, sizes: decoding.ImageSizes) -> ImageData:
        class_names, tables, left_out = self._collect(source)
        if getattr(tables["train"].read, "temporary", None):
            fault = "images of a compressed archive cannot be decoded as they are needed"
            raise ValueError(f"{fault}: set in_memory to true, or use the unpacked folder or an uncompressed .tar.")
        crop_scale, seed = self.augmentation.random_resized_crop, self.hparams["seed"]
        options: dict[str, Any] = {"crop_scale": crop_scale, "seed": seed, "skip_undecodable": self._skips}
        datasets = {s: DecodedImages(table, sizes, training=s == "train", **options) for s, table in tables.items()}
        gray = sizes.channels == 1
        mean, std = ([float(np.mean(v))] if gray else list(v) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        names, labels = tables["train"].names.tolist(), tables["train"].labels.astype(np.int64)
        checksums = {
            "name_checksum": f"{zlib.crc32(b''.join(name + bytes(1) for name in names)):08x}",
            "label_checksum": f"{zlib.crc32(labels.data):08x}",
        }
        return ImageData(class_names, sizes.channels, mean, std, datasets, checksums, list(left_out))

    def _by_split(self) -> Mapping[str, PreparedImages | DecodedImages]:
        return self._prepared().datasets

    def _dataset(self, split: str) -> PreparedImages | DecodedImages:
        advice = "set validation_fraction above 0" if split == "validation" else "add one to the data"
        return self._of_split(self._by_split(), split, advice)

    def _evaluation_loader(self, split: str) -> ResumableLoader:
        dataset = self._dataset(split)
        return self._loader(split, dataset, len(dataset))

    def _order_settings(self) -> dict[str, Any]:
        order = {"seed": self.hparams["seed"], "num_images": self.num_images("train")}
        return order | self._prepared().checksums
