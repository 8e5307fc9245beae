"""What the data modules of text and images have in common."""

import itertools
import json
import math
import pickle
import time

import huggingface_hub.constants
import pytest
import torch
from lightning import Callback

from revdeq_lightning.data.images.augmentation import AugmentationConfig
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.data.loading.array_cache import load_or_build
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.data.puzzles.module import PuzzleDataModule
from revdeq_lightning.data.text.module import TextDataModule, TokenWindows
from revdeq_lightning.data.text.tokenizers import build_tokenizer
from tests.helpers.data import fit, make_folder, refused
from tests.helpers.runs import limited_file_sizes


@pytest.fixture(params=["text", "images in memory", "decoded images", "puzzles"])
def build(request, tmp_path):
    """Builds one of the data modules."""
    common = {"batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    if request.param == "text":
        (tmp_path / "text.txt").write_text("A line of text.\n" * 60)
        settings = {"source": "files", "path": str(tmp_path / "text.txt"), "context_length": 8}
        return lambda **options: TextDataModule(**common | settings | options)
    if request.param == "puzzles":
        settings = {"puzzle": "prefix_sums", "size": 13, "num_train": 30, "num_validation": 9, "num_test": 5}
        return lambda **options: PuzzleDataModule(**common | settings | options)
    in_memory = request.param == "images in memory"
    settings = {"source": "folder", "path": str(make_folder(tmp_path / "images")), "image_size": 16}
    return lambda **options: ImageDataModule(**common | settings | {"in_memory": in_memory} | options)


def test_position_survives_without_lightning(build):
    interrupted, resumed = build(), build()
    expected = list(interrupted.train_dataloader())[3:]
    list(itertools.islice(interrupted.train_dataloader(), 3))
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    for ours, reference in zip(resumed.train_dataloader(), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_ranks_share_an_evaluation_in_equal_batches(build, monkeypatch):
    def examples(batches):
        pairs = [(batch[0].reshape(batch[1].numel(), -1).tolist(), batch[1].flatten().tolist()) for batch in batches]
        return sorted((x, y) for xs, ys in pairs for x, y in zip(xs, ys, strict=True) if y != IGNORE_INDEX)

    data = build()
    expected, ranks = examples(data.val_dataloader()), []
    for rank in range(4):
        monkeypatch.setattr(type(data), "_rank_and_world_size", lambda _, rank=rank: (rank, 4))
        ranks.append(list(data.val_dataloader()))
    assert len({tuple(batch[1].shape for batch in batches) for batches in ranks}) == 1
    assert examples(itertools.chain(*ranks)) == expected
    assert len(expected) % 4  # so that some are only padding


def test_datasets_pickle_for_spawned_workers(build):
    dataset = build().train_dataloader().dataset
    pickled = pickle.dumps(dataset)
    limit = 1000 if isinstance(dataset, TokenWindows) else 4000
    assert len(pickled) < limit  # a path, or names: neither tokens nor pixels
    again = pickle.loads(pickled)
    assert all(torch.equal(a, b) for a, b in zip(again[[3, 1]], dataset[[3, 1]], strict=True))


def test_printing_it_shows_the_settings_and_reads_no_batches(build):
    data = build()
    first = next(name for name in ("source", "puzzle") if name in data.hparams)
    assert str(data).startswith(f"{type(data).__name__}({first}='{data.hparams[first]}', ")
    assert not data._open_loaders


def test_a_failed_step_ends_the_workers(build, tmp_path, running):
    with pytest.raises(InterruptedError):
        fit(tmp_path, "run", data=build(num_workers=1), fail_at=0)
    assert not running()


@pytest.mark.parametrize("build", ["text"], indirect=True)
def test_loaders_made_again_in_each_epoch_end_the_workers_of_those_before(build, tmp_path, running):
    class Count(Callback):
        most = 0

        def on_train_epoch_end(self, trainer, module):
            self.most = max(self.most, len(running()))

    count = Count()
    fit(tmp_path, "run", data=build(num_workers=1), callbacks=[count], reload_dataloaders_every_n_epochs=1)
    assert count.most == 2  # of training and of validation
    assert not running()


WRONG = {
    TextDataModule: [
        ({"source": "web"}, "source must be one of 'python', 'files', 'huggingface', got 'web'"),
        ({"source": "python", "path": "x"}, "source \"python\" takes no path, got 'x'"),
        ({"source": "huggingface"}, 'source "huggingface" needs a path, got None'),
        ({"source": "python", "test_path": "x"}, 'are for source "files", the source is "python"'),
        ({"tokenizer": "words"}, 'one of bytes, characters, bpe, gpt2 or an existing path, .* got "words"'),
        ({"window_order": "sorted"}, "window_order must be one of 'shuffled', 'random', got 'sorted'"),
        ({"validation_fraction": -0.1}, r"validation_fraction must be in \[0, 1\), got -0.1"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "leave something to train on, got 0.6 and 0.4"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_workers": None}, "num_workers must be an integer, got None"),
        ({"bpe_vocab_size": 256}, "bpe_vocab_size must be at least 257, got 256"),
        ({"max_train_bytes": 0}, "max_train_bytes must be at least 1, got 0"),
    ],
    ImageDataModule: [
        ({"source": "web"}, "source must be one of 'digits', 'cifar10', .*, got 'web'"),
        ({"source": "digits", "path": "x"}, "source \"digits\" takes no path, got 'x'"),
        ({"source": "huggingface"}, 'source "huggingface" needs a path, got None'),
        ({"label_column": "x"}, 'label_column are for source "huggingface", the source is "digits"'),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"split_seed": -1}, "split_seed must be at least 0, got -1"),
        ({"max_train_images": 0}, "max_train_images must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be in .* got 1.0"),
        ({"crop_fraction": 1.5}, "crop_fraction must be in .* got 1.5"),
        ({"channels": 4}, "channels must be one of None, 1, 3, got 4: 1 is gray, 3 RGB"),
        ({"mean": [0.5]}, r"mean and std belong together, got mean \[0.5\] and std None"),
        ({"mean": [0.5], "std": [0.0]}, r"std must be in \(0, inf\), got 0.0"),
        ({"undecodable": "ignore"}, "undecodable must be one of 'raise', 'skip', got 'ignore'"),
        ({"augmentation": AugmentationConfig(crop_padding=32)}, "crop_padding must be smaller .* 32 pixels, got 32"),
    ],
    AugmentationConfig: [
        ({"crop_padding": -1}, "crop_padding must be at least 0, got -1"),
        ({"randaugment_ops": -1}, "randaugment_ops must be at least 0, got -1"),
        ({"randaugment_magnitude": 31}, r"randaugment_magnitude must be in \[0, 30\], got 31"),
        ({"mixup_alpha": -0.1}, r"mixup_alpha must be in \[0, inf\), got -0.1"),
        ({"cutmix_alpha": math.nan}, r"cutmix_alpha must be in \[0, inf\), got nan"),
        ({"erasing_probability": 1.5}, r"erasing_probability must be in \[0, 1\], got 1.5"),
        ({"mix_probability": -1}, r"mix_probability must be in \[0, 1\], got -1"),
        ({"random_resized_crop": (0.0, 1.0)}, r"two ascending fractions of the area, got \[0.0, 1.0\]"),
        ({"random_resized_crop": (0.5, 0.2)}, r"ascending .* got \[0.5, 0.2\]"),
        ({"random_resized_crop": (0.5, 1.0), "crop_padding": 4}, r"use one of them, got 4 and \[0.5, 1.0\]"),
    ],
    PuzzleDataModule: [
        *(({"puzzle": "sudoku", "size": 4, "num_empty": number}, "num_empty must be") for number in (0, 16, 2.0)),
        ({"puzzle": "sudoku", "size": 5}, "size must be one of 4, 6, 9, got 5"),
        ({"algorithm": "wilson"}, "algorithm must be one of 'depth_first', "),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
        ({"size": 1}, "^size must be at least 2, got 1: a maze has a start and a goal$"),
        ({"test_sizes": [4, 1]}, "^test_sizes must be at least 2, got 1: a maze has a start and a goal$"),
        ({"puzzle": "prefix_sums", "size": 0}, "^size must be at least 1, got 0$"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"), [(kind, *case) for kind, cases in WRONG.items() for case in cases]
)
def test_wrong_settings_are_refused_at_construction(kind, arguments, message):
    with refused(message):
        kind(**arguments)


HUB = {
    r"the dataset a/b .* path=FOLDER.*HF_HUB_OFFLINE": lambda: TextDataModule("huggingface", "a/b").prepare_data(),
    "the dataset a/b from the Hub .* path=FOLDER": lambda: ImageDataModule("huggingface", "a/b").prepare_data(),
    "train.csv of a/b .* set path=FOLDER": lambda: PuzzleDataModule("sudoku", 9, path="a/b").prepare_data(),
    "gpt2.* not reachable.*tokenizer.json.* path": lambda: build_tokenizer("gpt2", bpe_vocab_size=0, training_text=[]),
}


@pytest.mark.parametrize("message", HUB)
def test_an_unreachable_hub_is_reported_within_seconds(tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    start = time.monotonic()
    with refused(message, ConnectionError):
        HUB[message]()
    assert time.monotonic() - start < 8


def test_errors_of_the_cache_folder_name_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cache_dir=.*file/x cannot be written to: Not a directory; set data.cache_dir"):
        TextDataModule(cache_dir=str(tmp_path / "file/x")).setup("fit")


@pytest.mark.parametrize("most_bytes", [100, 20_000])
def test_a_full_disk_names_the_setting(tmp_path, most_bytes):
    (tmp_path / "text.txt").write_text("A line of text.\n" * 1000)
    data = TextDataModule("files", str(tmp_path / "text.txt"), context_length=8, cache_dir=str(tmp_path / "cache"))
    says = r"^cache_dir=\S+/cache cannot be written to: File too large; set data.cache_dir"
    with limited_file_sizes() as limit, refused(says, OSError):
        limit(most_bytes)
        data.setup("fit")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "elsewhere/1"), ConnectionError("none")])
def test_errors_of_what_is_read_do_not_name_the_setting(tmp_path, error):
    def build(writer):
        raise error

    with pytest.raises(type(error)) as raised:
        load_or_build(tmp_path / "a.arrays", build)
    assert raised.value is error
