"""What the data modules of text and images have in common."""

import itertools
import json
import logging
import multiprocessing
import pickle
import time

import huggingface_hub.constants
import pytest
import torch

from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.data.puzzles.module import PuzzleDataModule
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.data.text.tokenizers import build_tokenizer
from revdeq_lightning.data.text.windows import TokenWindows
from tests.helpers.data import fit, make_folder, refused

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(params=["text", "images in memory", "decoded images"])
def build(request, tmp_path):
    """Builds one of the data modules."""
    common = {"batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    if request.param == "text":
        (tmp_path / "text.txt").write_text("A line of text.\n" * 60)
        settings = {"source": "files", "path": str(tmp_path / "text.txt"), "context_length": 8}
        return lambda **options: TextDataModule(**common | settings | options)
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
    assert str(data).startswith(f"{type(data).__name__}(source='{data.hparams['source']}', path=")
    assert not data._open_loaders


def test_a_failed_step_ends_the_workers(build, tmp_path):
    with pytest.raises(InterruptedError):
        fit(tmp_path, "run", data=build(num_workers=1), fail_at=0)
    assert not multiprocessing.active_children()


HUB = {
    r"the dataset a/b .* path=FOLDER.*HF_HUB_OFFLINE": lambda: TextDataModule("huggingface", "a/b").prepare_data(),
    "the dataset a/b from the Hub .* path=FOLDER": lambda: ImageDataModule("huggingface", "a/b").prepare_data(),
    "train.csv of a/b .* set path=FOLDER": lambda: PuzzleDataModule("sudoku", 9, path="a/b").prepare_data(),
    r"gpt2.* Hub is not reachable.*tokenizer.json.* path": lambda: build_tokenizer(
        "gpt2", bpe_vocab_size=300, training_text=[]
    ),
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
