"""Small images and texts, and fits that record their data."""

import contextlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch.multiprocessing import ProcessRaisedException

from revdeq_lightning.data.images.batches import ImageBatch
from revdeq_lightning.data.text.module import SplitStatistics, TextDataModule

# The image task's command line on tiny JPEG files, in this process.


TINY_CLASSES = ("blue", "green", "red")


def image_folder(folder: Path, *, splits=("train", "test"), num_images=16, size=20) -> Path:
    """JPEG files of noise around one color a class: `SPLIT/CLASS/NN.jpg`."""
    root = folder / "images"
    if not root.exists():
        generator = np.random.default_rng(0)
        for split in splits:
            for channel, name in zip((2, 1, 0), TINY_CLASSES, strict=True):
                (root / split / name).mkdir(parents=True)
                for i in range(num_images):
                    pixels = generator.integers(0, 120, (size, size, 3))
                    pixels[..., channel] += 120
                    image = Image.fromarray(pixels.astype(np.uint8))
                    image.save(root / split / name / f"{i:02}.jpg", quality=90)
    return root


def tiny_image_config(folder: Path, *, network=None, solver=None, data=None, **trainer) -> Path:
    config = {
        "model": {
            "network": {"channels": [16, 16], "stem_stride": 2, **(network or {})},
            "solver": {"max_steps": 2, "mismatch": "raise", **(solver or {})},
            "optimizer": {"optimizer": "muon", "lr": 0.01, "ema_decay": 0.5},
        },
        "data": {
            "source": "folder",
            "path": str(image_folder(folder)),
            "image_size": 16,
            "batch_size": 8,
            "validation_fraction": 0.25,
            "augmentation": {"crop_padding": 2, "flip": True},
            "cache_dir": str(folder / "cache"),
            **(data or {}),
        },
        "trainer": {
            "max_steps": 12,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            **trainer,
        },
        "run": {"folder": str(folder / "runs")},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.contextmanager
def refused(message: str, kind: type[Exception] | tuple[type[Exception], ...] = ValueError):
    """An error of this kind, whose message matches, is raised and has one line."""
    with pytest.raises(kind, match=message) as error:
        yield error
    assert "\n" not in str(error.value)


# Folders and archives of images that a test makes.


IMAGE_CLASSES = ("ant", "bee", "cat")


def pixels(number: int, width: int = 40, height: int = 32) -> np.ndarray:
    """Smooth colors that differ from number to number, so that JPEG keeps them apart."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(2 * np.pi * (x * (1 + number % 3) + y + number * 0.17 * (c + 1))) for c in range(3)]
    return (127 + 90 * np.stack(waves, -1) + 7 * (number % 5)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, suffix: str = "jpg", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.save(stream, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
    return stream.getvalue()


def make_folder(root: Path, splits: dict[str, int] | None = None, classes=IMAGE_CLASSES, suffix: str = "jpg") -> Path:
    """`splits`: images a class below each folder ("" for the root itself), sizes differ."""
    number = 0
    for split, count in (splits or {"train": 10, "val": 3, "test": 2}).items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = pixels(number, 36 + number % 7, 33 + number % 4)
                (folder / f"{index:03d}.{suffix}").write_bytes(encoded(image, suffix))
                number += 1
    return root


def make_archive(folder: Path, path: Path, prefix: str = "") -> Path:
    """Members in another order than the names', so that nothing relies on it."""
    mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for file in sorted(folder.rglob("*"), key=lambda file: (file.name, file.parent)):
            archive.add(file, prefix + file.relative_to(folder).as_posix(), recursive=False)
    return path


def whole(loader):
    """All batches as one."""
    batches = list(loader)
    return ImageBatch(*(torch.cat(field) for field in zip(*batches, strict=True)))


def split(data, name):
    """All images of a split in order, uint8, and their labels."""
    batch = whole(data._evaluation_loader(name))
    data.teardown("fit")
    return batch.images, batch.labels


def assert_same_splits(ours, other):
    assert ours.splits == other.splits
    assert ours.class_names == other.class_names
    for name in ours.splits:
        for a, b in zip(split(ours, name), split(other, name), strict=True):
            assert torch.equal(a, b)


# Fits a one-parameter model and writes down every batch that it trains on; as a script, on two ranks.


class Recorder(LightningModule):
    """Appends each training batch to a file of this rank."""

    def __init__(self, record: Path, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.record, self.fail_at = record, fail_at

    def training_step(self, batch, batch_idx):
        path = self.record.with_suffix(f".{self.global_rank}")
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) == self.fail_at:
            raise InterruptedError("as asked")
        path.write_text("\n".join([*lines, json.dumps([field.tolist() for field in batch])]))
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint at the nth call of one hook, then stops the run by an exception."""

    def __init__(self, hook: str, nth: int, path: Path):
        self.calls = 0

        def save(trainer, *args):
            if trainer.sanity_checking:
                return
            self.calls += 1
            if self.calls == nth:
                trainer.save_checkpoint(path)
                if hook != "on_exception":
                    raise InterruptedError("as asked")

        setattr(self, hook, save)


def data_module(folder: Path, **arguments) -> TextDataModule:
    text = folder / "text.txt"
    if not text.exists():
        numbers = torch.randint(97, 123, (800,), generator=torch.Generator().manual_seed(0))
        text.write_text("".join(chr(i) for i in numbers.tolist()), encoding="utf-8")
    arguments = {"context_length": 8, "batch_size": 3, "test_fraction": 0.0, "seed": 5} | arguments
    arguments = {"tokenizer": "characters", "validation_fraction": 0.1} | arguments
    return TextDataModule(source="files", path=str(text), cache_dir=str(folder / "cache"), **arguments)


def fit(folder: Path, name: str, *, callbacks=(), ckpt_path=None, fail_at=None, data=None, **trainer) -> None:
    settings = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "limit_val_batches": 1} | trainer
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(callbacks=list(callbacks), enable_checkpointing=False, **quiet, **settings)
    run.fit(Recorder(folder / name, fail_at), data or data_module(folder), ckpt_path=ckpt_path)


def recorded(folder: Path, name: str, rank: int = 0) -> list:
    return [json.loads(line) for line in (folder / f"{name}.{rank}").read_text().splitlines()]


def fit_two_ranks(directory: Path) -> None:
    """A whole run, and in two parts: 20 batches, and the rest."""
    two_ranks = {"strategy": "ddp_fork", "devices": 2}
    fit(directory, "whole", **two_ranks)
    save = SaveAt("on_train_batch_end", 20, directory / "run.ckpt")
    with contextlib.suppress(InterruptedError, ProcessRaisedException):
        fit(directory, "begin", callbacks=[save], data=data_module(directory, num_workers=2), **two_ranks)
    rest = data_module(directory, num_workers=2)
    fit(directory, "rest", ckpt_path=directory / "run.ckpt", data=rest, **two_ranks)


# Texts.

PROSE = "".join(f"Line {i}: the {i * i}th caf\u00e9,\tand so on.\n\n" for i in range(60))
ALL_FOR_TRAINING = {"validation_fraction": 0.0, "test_fraction": 0.0}


def text_module(folder, text=PROSE, **arguments):
    """A data module on the file text.txt, which holds PROSE unless another text is given."""
    content = text.encode("utf-8") if isinstance(text, str) else text
    file = folder / "text.txt"
    if not file.exists() or file.read_bytes() != content:
        file.write_bytes(content)
    defaults = {"source": "files", "cache_dir": str(folder / "cache"), "context_length": 8, "batch_size": 4}
    if arguments.get("source", "files") == "files":
        defaults["path"] = str(file)
    return TextDataModule(**defaults | arguments)


def split_ids(data, split):
    return data._prepared().arrays[split].array.tolist()


def statistics_of(data, split):
    """By definition: all but the first token; words as separated by white space, and one for each line end."""
    ids = split_ids(data, split)
    covered = data.tokenizer.decode_bytes(ids[1:])
    text = covered.decode(errors="replace")
    return SplitStatistics(len(ids) - 1, len(covered), len(text.split()) + text.count("\n"))
