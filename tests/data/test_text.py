import json
import logging
import multiprocessing
import re
import sys
import sysconfig
import time
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow
import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer

from benchmarks.quality import text as text_benchmark
from revdeq_lightning.data.loading import files
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.data.text import sources as text_sources
from revdeq_lightning.data.text.module import SplitStatistics, TextDataModule
from revdeq_lightning.data.text.tokenizers import BytePairTokenizer
from revdeq_lightning.data.text.windows import window_starts
from tests.helpers.data import SaveAt, data_module, fit, fit_two_ranks, recorded
from tests.helpers.processes import run_apart

# Lightning 2.6 uses what PyTorch 2.15 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
PROSE = "".join(f"Line {i}: the {i * i}th caf\u00e9,\tand so on.\n\n" for i in range(60))
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture
def module(tmp_path):
    """Builds a data module on the file text.txt, which holds PROSE unless another text is given."""

    def build(text=PROSE, **arguments):
        if isinstance(text, str):
            text = text.encode("utf-8")
        file = tmp_path / "text.txt"
        if not file.exists() or file.read_bytes() != text:
            file.write_bytes(text)
        defaults = {"source": "files", "cache_dir": str(tmp_path / "cache"), "context_length": 8, "batch_size": 4}
        if arguments.get("source", "files") == "files":
            defaults["path"] = str(file)
        return TextDataModule(**defaults | arguments)

    return build


def split_ids(data, split):
    return data._prepared().arrays[split].open().tolist()


def split_text(data, split):
    return data.tokenizer.decode(split_ids(data, split))


# Sources and splits


def test_python_source_is_the_library_split_by_file(tmp_path):
    data = TextDataModule(cache_dir=str(tmp_path), max_train_bytes=None)
    texts = {split: split_text(data, split) for split in data.splits}
    assert sorted(texts) == ["test", "train", "validation"]
    assert 5e6 < sum(map(len, texts.values())) < 40e6
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py", "os.py", "typing.py", "heapq.py", "email/message.py"):
        source = (root / name).read_text(encoding="utf-8")
        assert sum(source in text for text in texts.values()) == 1, name
    assert not any("class TestHeap(" in text for text in texts.values())  # from test/test_heapq.py
    fraction = {split: len(text) / sum(map(len, texts.values())) for split, text in texts.items()}
    assert 0.6 < fraction["train"] < 0.95
    assert min(fraction["validation"], fraction["test"]) > 0.02


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="recorded with the library of Python 3.11.7")
def test_the_default_text_has_the_ids_of_earlier_versions(tmp_path):
    settings = yaml.safe_load(Path("configs/lm/default.yaml").read_text())["data"]
    data = TextDataModule(**settings, cache_dir=str(tmp_path))
    found = {split: (len(split_ids(data, split)), data._prepared().checksums[split]) for split in data.splits}
    expected = {"train": (3_093_937, "b84841dd"), "validation": (127_425, "4db0fe12"), "test": (123_518, "c18737f1")}
    assert found == expected
    assert data.split_statistics("test") == SplitStatistics(123_517, 399_999, 50_768)


def test_last_tenth_is_cut_like_nanogpt_does(module):
    data = module(tokenizer="characters", validation_fraction=0.1, test_fraction=0.0)
    cut = int(0.9 * len(PROSE))
    assert data.splits == ("train", "validation")
    assert (split_text(data, "train"), split_text(data, "validation")) == (PROSE[:cut], PROSE[cut:])


def test_fractions_cut_contiguous_parts_that_make_up_the_text(module):
    data = module(validation_fraction=0.2, test_fraction=0.1)
    parts = [split_text(data, split) for split in ("train", "validation", "test")]
    assert "".join(parts) == PROSE
    assert [round(len(part) / len(PROSE), 2) for part in parts] == [0.7, 0.2, 0.1]


def test_files_and_folders_are_concatenated_in_order_of_names(module, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden"):
        (folder / name).write_text(f"content of {name}\n")
    data = module(path=[str(tmp_path / "text.txt"), str(folder)], validation_fraction=0.0, test_fraction=0.0)
    assert split_text(data, "train") == PROSE + "".join(f"content of {n}\n" for n in ("a.txt", "b.txt", "sub/c.txt"))


def test_files_are_not_joined_word_to_word(module, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {
        "1": b"\xef\xbb\xbfno line end",
        "2": b"",
        "3": b"windows\r\n",
        "4": "wide".encode("utf-16"),
        "5": b"mac\r",
    }
    for name, content in (contents | {"6": b"last", "Thumbs.db": b"\0\0", "6~": b"backup"}).items():
        (folder / name).write_bytes(content)
    data = module(path=str(folder), validation_fraction=0.0, test_fraction=0.0)
    assert split_text(data, "train") == "no line end\nwindows\r\nwide\nmac\rlast"
    (line,) = data.found()["left_out"]
    assert line.endswith("folder: 2 made by the system: 6~, Thumbs.db")
    assert data.found()["tokens"] == {"train": len("no line end\nwindows\r\nwide\nmac\rlast")}


def test_a_folder_of_splits_is_not_one_text(module, tmp_path):
    folder = tmp_path / "folder"
    for name in ("wiki.train.raw", "wiki.valid.raw", "train.py", "eval.py", "notes/test.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(PROSE)
    message = r"holds several splits \(wiki.train.raw, wiki.valid.raw\), .*: set path, validation_path and test_path"
    with pytest.raises(ValueError, match=message):
        module(path=str(folder)).setup("fit")
    (folder / "wiki.valid.raw").unlink()
    module(path=str(folder)).setup("fit")


def test_explicit_files_are_the_splits_whatever_the_fractions(module, tmp_path):
    for split in ("validation", "test"):
        (tmp_path / split).write_text(f"the {split} text")
    data = module(validation_path=str(tmp_path / "validation"), test_path=[str(tmp_path / "test")])
    assert split_text(data, "train") == PROSE
    assert split_text(data, "validation") == "the validation text"
    assert split_text(data, "test") == "the test text"
    assert module(validation_path=str(tmp_path / "validation")).splits == ("train", "validation")


@pytest.mark.parametrize("form", ["parquet", "parquet with a card", "save_to_disk"])
def test_local_huggingface_dataset(module, tmp_path, form):
    rows = {"train": ["", " = Title = \n", "", " one two \n"], "validation": ["three\n"], "test": ["four"]}
    folder = tmp_path / "dataset"
    folder.mkdir()
    parts = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in rows.items()}
    if form.startswith("parquet"):
        for split, part in parts.items():
            part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        if form != "parquet":
            files = "".join(f"  - {{split: {split}, path: {split}-*}}\n" for split in parts)
            (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: small\n  data_files:\n{files}---\n")
    else:
        datasets.DatasetDict(parts).save_to_disk(folder)
    data = module(source="huggingface", path=str(folder), dataset_name="small", context_length=4)
    assert split_text(data, "train") == "\n = Title = \n\n one two \n"
    assert (split_text(data, "validation"), split_text(data, "test")) == ("three\n", "four\n")


def test_a_hub_dataset_that_was_tokenized_needs_no_hub(module, monkeypatch):
    rows = {split: datasets.Dataset.from_dict({"text": ["once upon a time"]}) for split in ("train", "test")}
    monkeypatch.setattr(text_sources, "load_huggingface", lambda path, name, streaming: rows)
    first = module(source="huggingface", path="a/b", context_length=4)
    assert split_text(first, "train") == "once upon a time\n"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert module(source="huggingface", path="a/b", context_length=4).vocab_size == 256


ROWS = ["", "one\n", "two \u00e9 words", None]


def write_table(path, rows):
    """JSON lines or parquet, compressed as the name says."""
    if ".parquet" in path.name:
        datasets.Dataset.from_dict({"id": list(range(len(rows))), "text": rows}).to_parquet(path)
        return
    content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(rows)).encode()
    compression = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}.get(path.suffix)
    with pyarrow.output_stream(str(path), compression=compression) as file:
        file.write(content)


@pytest.mark.parametrize("name", ["a.jsonl", "a [1].jsonl.gz", "a.jsonl.zst", "a.ndjson.bz2", "a.parquet"])
def test_tables_are_the_column_text_a_line_a_row(module, tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_table(folder / name, ROWS)
    (folder / "0.txt").write_text("before")
    data = module(path=str(folder), validation_fraction=0.0, test_fraction=0.0)
    assert split_text(data, "train") == "before\n\none\ntwo \u00e9 words\n"
    assert data.found()["left_out"] == ["1 row(s) of the file without text, such as row 3"]


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "lz4"])
def test_compressed_text_is_unpacked(module, tmp_path, suffix):
    compression = {"gz": "gzip", "zst": "zstd"}.get(suffix, suffix)
    with pyarrow.output_stream(str(tmp_path / f"text.{suffix}"), compression=compression) as file:
        file.write(PROSE.encode())
    data = module(path=str(tmp_path / f"text.{suffix}"), validation_fraction=0.0, test_fraction=0.0)
    assert split_text(data, "train") == PROSE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "cannot read the dataset .*a.jsonl"),
        ('{"words": "a"}', "has the columns .'words'."),
    ],
)
def test_tables_that_hold_no_text_are_told(module, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        module(path=str(tmp_path / "a.jsonl")).setup("fit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [{"max_train_bytes": 3000}, {"max_train_tokens": 2000, "tokenizer": "bpe"}])
def test_a_part_of_a_hub_dataset_is_streamed_and_no_more_is_read(module, monkeypatch, limit):
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"text": f"document {number} of many", "url": "x"}

    def load_dataset(path, name, streaming):
        assert (path, name, streaming) == ("HuggingFaceFW/fineweb-edu", "sample-10BT", True)
        return {"train": datasets.IterableDataset.from_generator(rows)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(files, "hub_is_reachable", lambda: True)
    hub = {"source": "huggingface", "path": "HuggingFaceFW/fineweb-edu", "dataset_name": "sample-10BT"}
    data = module(**hub, **limit, bpe_vocab_size=300, validation_fraction=0.2)
    text = "".join(f"document {number} of many\n" for number in range(10**4))
    assert text.startswith(split_text(data, "train"))
    assert data.splits == ("train", "validation", "test")
    if "max_train_tokens" in limit:
        assert len(split_ids(data, "train")) == 2000
        expected = data.tokenizer.decode_bytes(split_ids(data, "train")[1:])
        assert data.split_statistics("train") == SplitStatistics(
            1999, len(expected), len(expected.split()) + expected.count(b"\n")
        )
    else:
        assert abs(len(split_text(data, "train")) - 3000) < 10
    assert len(read) < 1500
    assert split_ids(module(**hub, **limit, bpe_vocab_size=300, validation_fraction=0.2), "test") == split_ids(
        data, "test"
    )


def test_a_text_larger_than_a_block_is_cut_at_the_same_characters(module):
    text = "".join(f"{i} \u6f22\u5b57 caf\u00e9\U0001f642 \u00a0 . \n" for i in range(20_000))
    data = module(text, tokenizer="characters", validation_fraction=0.2, test_fraction=0.1)
    ends = int(0.7 * len(text)), int(0.9 * len(text))
    parts = dict(
        zip(("train", "validation", "test"), (text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]), strict=True)
    )
    assert {split: split_text(data, split) for split in data.splits} == parts
    for split, part in parts.items():
        words = len(part[1:].split()) + part[1:].count("\n")
        assert data.split_statistics(split) == SplitStatistics(len(part) - 1, len(part[1:].encode()), words)
    limited = module(text, max_train_bytes=400_001)
    assert split_text(limited, "train") == text.encode()[:400_001].decode(errors="ignore")


def test_byte_caps_cut_each_split_at_a_character(module):
    data = module("\u00e9" * 300, max_train_bytes=101, max_eval_bytes=33)
    assert split_text(data, "train") == "\u00e9" * 50
    assert split_text(data, "validation") == split_text(data, "test") == "\u00e9" * 16


# Cache


def cached_folder(data):
    (folder,) = Path(data.hparams["cache_dir"]).glob("*.arrays")
    return folder


def test_tokens_are_stored_once_and_read_as_a_memory_map(module, monkeypatch):
    first = module(tokenizer="bpe", bpe_vocab_size=280)
    assert first.vocab_size == 280
    monkeypatch.setattr(TextDataModule, "_tokenize", lambda *_: pytest.fail("tokenized twice"))
    again = module(tokenizer="bpe", bpe_vocab_size=280)
    assert split_ids(again, "train") == split_ids(first, "train")
    assert isinstance(again._prepared().arrays["train"].open(), np.memmap)
    assert again._prepared().arrays["train"].open().dtype == np.uint16
    assert again.tokenizer_state() == first.tokenizer_state()


@pytest.mark.parametrize("change", [{"text": PROSE + "!"}, {"tokenizer": "characters"}, {"validation_fraction": 0.2}])
def test_other_content_or_settings_are_other_tokens(module, change):
    before = module()
    ids = split_ids(before, "train")
    assert split_ids(module(**change), "train") != ids
    assert split_ids(module(), "train") == ids


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train", lambda content: content[:-100]),
        ("train", lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
        ("index.json", lambda content: content[:3]),
        ("index.json", lambda content: b"\xff" * 500),
    ],
)
def test_damaged_tokens_are_noticed_and_built_anew(module, name, damage):
    expected = split_ids(module(), "train")
    file = cached_folder(module()) / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged and will be rebuilt"):
        assert split_ids(module(), "train") == expected
    assert split_ids(module(), "train") == expected


def test_an_interrupted_write_leaves_nothing(module, monkeypatch):
    data = module()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert [f.suffix for f in Path(data.hparams["cache_dir"]).iterdir()] in ([], [".lock"])
    monkeypatch.undo()
    data.prepare_data()


def test_what_a_killed_preparation_left_is_neither_used_nor_kept(module, tmp_path):
    data = module()
    expected = split_ids(data, "train")
    left = cached_folder(data).rename(tmp_path / "cache" / f".{cached_folder(data).name}.abc")
    (left / "arrays").write_bytes(b"half")
    assert split_ids(module(), "train") == expected
    assert not left.exists()


def _prepare_and_count(folder, start, builds):
    data = data_module(folder, tokenizer="bpe", bpe_vocab_size=270)
    tokenize = TextDataModule._tokenize

    def counted(self, *arguments):
        with builds.get_lock():
            builds.value += 1
        time.sleep(0.2)
        return tokenize(self, *arguments)

    TextDataModule._tokenize = counted
    start.wait()
    assert data.vocab_size == 270
    assert len(data._prepared().arrays["train"].open()) > 0


def test_processes_that_prepare_at_the_same_time_build_once(tmp_path):
    data_module(tmp_path)
    context = multiprocessing.get_context("fork")
    start, builds = context.Barrier(4), context.Value("i", 0)
    processes = [context.Process(target=_prepare_and_count, args=(tmp_path, start, builds)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert builds.value == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", text_benchmark.KINDS)
def test_preparing_takes_as_much_memory_for_a_text_three_times_as_large(tmp_path, kind):
    found = {}
    for size in (12, 36):
        path = tmp_path / f"{size}.{text_benchmark.KINDS[kind]}"
        text_benchmark.write(path, kind, size * 1e6)
        found[size] = text_benchmark.Prepared(path, "bpe", tmp_path / "cache").start()
    assert found[36]["peak_bytes"] < 1.5e9
    assert found[36]["peak_bytes"] - found[12]["peak_bytes"] < 100e6  # mostly new words; it was 4 GB
    again = text_benchmark.Prepared(path, "bpe", tmp_path / "cache").start()
    assert again["resident_bytes"] - again["imported_bytes"] < 20e6


# Windows


@pytest.mark.parametrize("order", ["shuffled", "random"])
@pytest.mark.parametrize(("num_tokens", "context_length"), [(9, 8), (16, 8), (17, 8), (24, 8), (200, 7), (1000, 64)])
def test_training_windows_lie_within_the_text(order, num_tokens, context_length):
    sizes = {"num_tokens": num_tokens, "context_length": context_length, "order": order}
    epochs = [window_starts(epoch, seed=1, **sizes) for epoch in range(1000)]
    assert len({len(starts) for starts in epochs}) == 1
    assert min(starts.min() for starts in epochs) == 0
    assert max(starts.max() for starts in epochs) == num_tokens - context_length - 1  # the last token is predicted too
    if order == "shuffled":
        for starts in epochs:
            assert set(np.diff(np.sort(starts))) <= {context_length}
        assert len(epochs[0]) >= (num_tokens - 1) // context_length - 1
    assert not np.array_equal(window_starts(0, seed=1, **sizes | {"num_tokens": 500}), epochs[0])


@pytest.mark.parametrize("order", ["shuffled", "random"])
def test_training_batches_are_windows_of_the_text_with_targets_shifted_by_one(module, order):
    data = module(window_order=order)
    text = bytes(split_ids(data, "train"))
    batches = list(data.train_dataloader())
    for batch in batches:
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.shape == batch.targets.shape == (4, 8)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            assert tokens[1:] == targets[:-1]
            assert bytes([tokens[0], *targets]) in text
    assert len(batches) == len(data.train_dataloader())


def test_training_order_depends_on_seed_and_epoch_only(module):
    def epochs(seed):
        loader = module(seed=seed).train_dataloader()
        return [torch.cat([batch.tokens for batch in loader]).tolist() for _ in range(2)]

    first, second = epochs(0)
    assert epochs(0) == [first, second]
    assert len({json.dumps(order) for order in (first, second, *epochs(1))}) == 4


@pytest.mark.parametrize("context_length", [1, 7, 8, 500])
def test_evaluation_predicts_every_token_but_the_first_exactly_once(module, context_length):
    data = module(context_length=context_length)
    for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        targets = torch.cat([batch.targets.flatten() for batch in batches])
        tokens = torch.cat([batch.tokens.flatten() for batch in batches])
        ids = split_ids(data, split)
        assert targets[targets != IGNORE_INDEX].tolist() == ids[1:]
        assert tokens[targets != IGNORE_INDEX].tolist() == ids[:-1]
        assert int((targets == IGNORE_INDEX).sum()) == -(len(ids) - 1) % context_length
        assert data.split_statistics(split).num_tokens == len(ids) - 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_over_ranks_predicts_the_same_targets_in_equal_batches(module, monkeypatch, world_size):
    data = module()
    expected = sorted(t for batch in data.test_dataloader() for t in batch.targets.flatten().tolist() if t >= 0)
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(TextDataModule, "_rank_and_world_size", lambda _, rank=rank: (rank, world_size))
        ranks.append(list(data.test_dataloader()))
    assert len({tuple(batch.tokens.shape for batch in batches) for batches in ranks}) == 1
    targets = [t for batches in ranks for batch in batches for t in batch.targets.flatten().tolist()]
    assert sorted(t for t in targets if t != IGNORE_INDEX) == expected


def test_statistics_count_bytes_and_words_of_the_predicted_text(module):
    text = "\u00e9a b\n\n c d\u00a0e\tf\n" * 10
    for tokenizer, first_bytes in (("bytes", 1), ("characters", 2), ("bpe", None)):
        data = module(text, tokenizer=tokenizer, bpe_vocab_size=258, validation_fraction=0.0, test_fraction=0.0)
        statistics = data.split_statistics("train")
        ids = split_ids(data, "train")
        covered = data.tokenizer.decode_bytes(ids[1:])
        num_words = sum(len(line.split()) + 1 for line in covered.decode(errors="replace").split("\n")) - 1
        assert statistics == SplitStatistics(len(ids) - 1, len(covered), num_words)
        assert num_words == 90
        if first_bytes:
            assert statistics.num_bytes == len(text.encode()) - first_bytes


def test_vocabulary_is_known_at_once_and_can_be_padded(module):
    assert module(tokenizer="characters").vocab_size == len(set(PROSE[: int(0.8 * len(PROSE))]))
    assert module(tokenizer="bpe", bpe_vocab_size=270, pad_vocab_size_to_multiple=64).vocab_size == 320
    assert module(pad_vocab_size_to_multiple=64).vocab_size == 256


def test_a_large_vocabulary_is_stored_in_32_bits(module, monkeypatch):
    monkeypatch.setattr("revdeq_lightning.data.text.tokenizers.ByteTokenizer.vocab_size", 2**16 + 1)
    data = module()
    assert data._prepared().arrays["train"].open().dtype == np.uint32
    assert bytes(split_ids(data, "train") + split_ids(data, "validation") + split_ids(data, "test")).decode() == PROSE


# Resuming with Lightning

STOPS = {
    "middle of the first epoch": ("on_train_batch_end", 5, {}),
    "middle of the second epoch": ("on_train_batch_end", 40, {}),
    "last batch of an epoch": ("on_train_batch_end", 29, {}),
    "validation in mid-epoch": ("on_validation_end", 4, {"val_check_interval": 10}),
    "validation at the end of an epoch": ("on_validation_end", 2, {}),
    "end of an epoch": ("on_train_epoch_end", 1, {}),
    "end of an epoch, limited by steps": ("on_train_epoch_end", 1, {"max_steps": 70, "max_epochs": -1}),
    "failed step": ("on_exception", 1, {"fail_at": 40}),
    "between accumulated gradients": ("on_train_batch_end", 34, {"accumulate_grad_batches": 4}),
    "part of the batches": ("on_train_batch_end", 13, {"limit_train_batches": 10}),
    "workers": ("on_train_batch_end", 40, {"num_workers": 2}),
    "new loaders every epoch": ("on_train_batch_end", 40, {"reload_dataloaders_every_n_epochs": 1}),
    "random windows": ("on_train_batch_end", 40, {"window_order": "random"}),
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_resumed_run_sees_the_batches_of_the_uninterrupted_run(tmp_path, stop):
    hook, nth, options = STOPS[stop]
    options = dict(options)
    fail_at = options.pop("fail_at", None)
    window_order = options.pop("window_order", "shuffled")
    num_workers = options.pop("num_workers", 0)

    def data(workers=num_workers):
        return data_module(tmp_path, num_workers=workers, window_order=window_order)

    fit(tmp_path, "whole", data=data(0), **options)
    save = SaveAt(hook, nth, tmp_path / "run.ckpt")
    with pytest.raises(InterruptedError):
        fit(tmp_path, "begin", callbacks=[save], fail_at=fail_at, data=data(), **options)
    before = recorded(tmp_path, "begin")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["TextDataModule"]
    per_epoch = options.get("limit_train_batches", 29)
    assert state["position"] == {"epoch": len(before) // per_epoch, "batch": len(before) % per_epoch}
    fit(tmp_path, "rest", ckpt_path=tmp_path / "run.ckpt", data=data(), **options)
    assert before + recorded(tmp_path, "rest") == recorded(tmp_path, "whole")


def test_two_ranks_share_each_batch_and_resume_exactly_with_and_without_workers(tmp_path):
    run_apart(fit_two_ranks, tmp_path)
    whole = [recorded(tmp_path, "whole", rank) for rank in (0, 1)]
    fit(tmp_path, "joined", data=data_module(tmp_path, batch_size=6))
    assert [a + b for a, b in zip(*whole, strict=True)] == recorded(tmp_path, "joined")
    for workers in (0, 2):
        for rank in (0, 1):  # rank 1 may have recorded one batch more when rank 0 stopped
            begin = recorded(tmp_path, f"begin{workers}", rank)[:20]
            assert len(begin) == 20
            assert begin + recorded(tmp_path, f"rest{workers}", rank) == whole[rank]


def test_overfit_batches_gives_the_same_batches_every_epoch(tmp_path):
    fit(tmp_path, "run", data=data_module(tmp_path), overfit_batches=2)
    batches = recorded(tmp_path, "run")
    assert batches == batches[:2] * 3
    assert batches[0] != batches[1]


def test_every_fit_starts_at_the_first_epoch_and_ends_its_workers(tmp_path):
    data = data_module(tmp_path, num_workers=1)
    fit(tmp_path, "first", data=data, max_epochs=1)
    assert not multiprocessing.active_children()
    fit(tmp_path, "second", data=data, max_epochs=1)
    assert recorded(tmp_path, "first") == recorded(tmp_path, "second")


def test_resuming_in_another_order_warns_and_in_another_vocabulary_fails(module):
    state = module().state_dict() | {"position": {"epoch": 0, "batch": 1}}
    other = module(seed=7, batch_size=2)
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"seed 0 -> 7, global_batch_size 4 -> 2"):
        other.train_dataloader()
    with pytest.raises(ValueError, match=r"different vocabulary .*tokenizer=\"characters\""):
        module(tokenizer="characters").load_state_dict(state)


def test_resuming_with_another_text_of_the_same_length_warns(module):
    state = json.loads(json.dumps(module().state_dict())) | {"position": {"epoch": 0, "batch": 1}}
    other = module(PROSE.replace("Line", "line"))
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"training data or its order changed .*\(token_checksum \w{8} -> \w{8}\)"):
        other.train_dataloader()


def test_a_checkpoint_of_before_there_were_checksums_resumes(module):
    state = module().state_dict() | {"position": {"epoch": 0, "batch": 1}}
    del state["order"]["token_checksum"]
    same = module()
    same.load_state_dict(state)
    same.train_dataloader()  # a warning is an error here


def test_a_missing_split_is_told_and_training_without_validation_works(tmp_path):
    data = data_module(tmp_path, validation_fraction=0.0)
    fit(tmp_path, "run", data=data, max_epochs=1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"no validation split: set validation_fraction above 0 .*limit_val_batches=0"):
        fit(tmp_path, "run", data=data)
    with pytest.raises(ValueError, match=r"no test split: set test_fraction above 0"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', got 'val'"):
        data.split_statistics("val")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "web"}, "source must be one of 'python', 'files', 'huggingface', got 'web'"),
        ({"source": "python", "path": "x"}, "source \"python\" takes no path, got 'x'"),
        ({"source": "huggingface"}, 'source "huggingface" needs a path, got None'),
        ({"source": "python", "test_path": "x"}, 'are for source "files", the source is "python"'),
        ({"tokenizer": "words"}, 'tokenizer must be one of .* got "words"'),
        ({"window_order": "sorted"}, "window_order must be one of 'shuffled', 'random', got 'sorted'"),
        ({"validation_fraction": -0.1}, r"validation_fraction must be in \[0, 1\), got -0.1"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "leave something to train on, got 0.6 and 0.4"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"bpe_vocab_size": 256}, "bpe_vocab_size must be at least 257, got 256"),
        ({"max_train_bytes": 0}, "max_train_bytes must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(module, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        module(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "the train text is empty"),
        (b"good\xe9bad", {}, r"text.txt is not UTF-8: byte 0xe9 at offset 4: convert it"),
        ("short", {"test_fraction": 0.0}, "the train text has 4 tokens, a window needs 9.*context_length than 8"),
        (" " * 400, {}, "the validation text has no words, only spaces"),
        (PROSE, {"validation_fraction": 0.0003}, "the validation text has 1 tokens, a window needs 2"),
        (
            PROSE,
            {"batch_size": 1000},
            r"batch_size 1000 on 1 rank\(s\) needs 1000 items, the data has \d+: lower batch",
        ),
        (
            "a" * 500 + "z" * 50,
            {"tokenizer": "characters", "test_fraction": 0.0},
            "validation text: character 'z' .position 5.*tokenizer=",
        ),
    ],
)
def test_texts_that_do_not_fit_are_told(module, text, arguments, message):
    data = module(text, **arguments)

    def start():
        data.setup("fit")
        data.train_dataloader()

    with pytest.raises(ValueError, match=message) as error:
        start()
    assert "\n" not in str(error.value)


def test_missing_files_are_told(module, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such text file or folder: {re.escape(str(tmp_path))}/none"):
        module(path=str(tmp_path / "none")).prepare_data()
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no files under .*folder: use a text file"):
        module(path=str(tmp_path / "folder")).prepare_data()


def test_datasets_without_text_or_training_split_are_told(module, tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"words": ["a"]})}).save_to_disk(tmp_path / "words")
    with pytest.raises(ValueError, match=r"has the columns \['words'\], \"text\" is not among them"):
        module(source="huggingface", path=str(tmp_path / "words")).prepare_data()
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "test")
    with pytest.raises(ValueError, match=r"has the splits \['test'\], \"train\" is not among them"):
        module(source="huggingface", path=str(tmp_path / "test")).prepare_data()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            list(range(50)),
            r"train, row 0: \"text\" must be a text, got 0: save a copy with a column \"text\" of strings",
        ),
        ([["a", "b"]] * 50, r"train, row 0: .* got \['a', 'b'\]"),
        ([None] * 50, r"no row of train has a text"),
        ([], r"the training split of \S+ has no rows"),
    ],
)
def test_rows_that_are_no_texts_are_told(module, tmp_path, rows, message):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": rows})}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=message) as error:
        module(source="huggingface", path=str(tmp_path / "rows")).setup("fit")
    assert "\n" not in str(error.value)


def test_a_dataset_that_cannot_be_read_is_told(module, tmp_path):
    for name, content in {"table.parquet": b"PAR1", "text.txt": b"\xff"}.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the dataset \S+ \(.*\): check its files") as error:
            module(source="huggingface", path=str(folder)).setup("fit")
        assert "\n" not in str(error.value)


def test_missing_rows_and_unused_splits_are_left_out_and_told(module, tmp_path):
    rows = ["one two three"] * 3
    parts = {"Train": [*rows, None, *rows, None], "valid": rows, "testing": [], "extra": rows}
    parts = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "rows")
    data = module(source="huggingface", path=str(tmp_path / "rows"))
    left_out = ["2 row(s) of train without text, such as row 3", "the split extra (3 rows)", "the split test (0 rows)"]
    with pytest.warns(UserWarning, match=re.escape("left out: ")):
        data.setup("fit")
    assert {split: split_text(data, split) for split in data.splits} == {
        "train": "one two three\n" * 6,
        "validation": "one two three\n" * 3,
    }
    again = module(source="huggingface", path=str(tmp_path / "rows"))
    assert sorted(data.found()["left_out"]) == sorted(again.found()["left_out"]) == left_out


def test_bytes_are_counted_although_a_tokenizer_strips_spaces(module, tmp_path):
    library = Tokenizer.from_str(BytePairTokenizer.train([PROSE], 300).state()["definition"])
    library.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    text = "To be, or not to be, that is the  <mask>  question.\n" * 40
    data = module(text, tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0.0, test_fraction=0.0)
    assert split_text(data, "train") == text
    assert data.split_statistics("train").num_bytes == len(text) - 1


def test_a_library_without_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"no source of its standard library .*use source=\"files\""):
        TextDataModule(cache_dir=str(tmp_path)).prepare_data()


def test_a_tokenizer_file_is_part_of_the_key(module, tmp_path):
    for size in (260, 270):
        (tmp_path / "tokenizer.json").write_text(BytePairTokenizer.train([PROSE], size).state()["definition"])
        assert module(tokenizer=str(tmp_path / "tokenizer.json")).vocab_size == size
