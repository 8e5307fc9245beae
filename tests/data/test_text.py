"""Texts: sources, splits, cache, and bad input. Windows and resuming: `test_text_windows.py`."""

import json
import multiprocessing
import re
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet
import pytest
import yaml
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer

from benchmarks.quality import text as text_benchmark
from revdeq_lightning.data.loading import files
from revdeq_lightning.data.text import sources as text_sources
from revdeq_lightning.data.text.module import SplitStatistics, TextDataModule
from revdeq_lightning.data.text.tokenizers import BytePairTokenizer
from tests.helpers.data import (
    ALL_FOR_TRAINING,
    PROSE,
    data_module,
    refused,
    split_ids,
    statistics_of,
    text_module,
)
from tests.helpers.processes import run_apart, run_python


@pytest.fixture
def module(tmp_path):
    return partial(text_module, tmp_path)


def texts_of(data):
    return {split: data.tokenizer.decode(split_ids(data, split)) for split in data.splits}


# Sources and splits


def test_python_source_is_the_library_split_by_file(tmp_path):
    texts = texts_of(TextDataModule(cache_dir=str(tmp_path), max_train_bytes=None))
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


SHAKESPEARE = Path("data/tinyshakespeare.txt")


@pytest.mark.skipif(
    not SHAKESPEARE.exists(), reason=f"needs the text of configs/lm/tinyshakespeare.yaml, {SHAKESPEARE}"
)
def test_tiny_shakespeare_has_the_ids_of_earlier_versions(tmp_path):
    settings = yaml.safe_load(Path("configs/lm/tinyshakespeare.yaml").read_text())["data"]
    data = TextDataModule(**settings | {"path": str(SHAKESPEARE), "cache_dir": str(tmp_path)})
    found = {split: (len(split_ids(data, split)), data._prepared().checksums[split]) for split in data.splits}
    assert found == {"train": (1_003_854, "a320d332"), "validation": (111_540, "271226fa")}  # as nanoGPT divides it


@pytest.mark.parametrize("fractions", [(0.1, 0.0), (0.2, 0.1)])  # the first is nanoGPT's: the last tenth
def test_fractions_cut_a_text_larger_than_a_block_at_characters(module, fractions):
    validation, test = fractions
    text = "".join(f"{i} \u6f22\u5b57 caf\u00e9\U0001f642 \u00a0 . \n" for i in range(20_000))
    data = module(text, tokenizer="characters", validation_fraction=validation, test_fraction=test)
    ends = int((1 - validation - test) * len(text)), int((1 - test) * len(text))
    parts = {"train": text[: ends[0]], "validation": text[ends[0] : ends[1]], "test": text[ends[1] :]}
    assert texts_of(data) == {split: part for split, part in parts.items() if part}
    assert all(data.split_statistics(split) == statistics_of(data, split) for split in data.splits)


def test_byte_caps_cut_each_split_at_a_character(module):
    data = module("\u00e9" * 300_000, max_train_bytes=200_001, max_eval_bytes=33)
    assert texts_of(data) == {"train": "\u00e9" * 100_000, "validation": "\u00e9" * 16, "test": "\u00e9" * 16}


def test_files_are_concatenated_in_order_of_names_and_not_joined_word_to_word(module, tmp_path):
    folder = tmp_path / "folder"
    (folder / "4").mkdir(parents=True)
    contents = {
        "1": b"\xef\xbb\xbfno line end",
        "2": b"",
        "3": b"windows\r\n",
        "4/wide.txt": "wide".encode("utf-16"),
        "5": b"mac\r",
    }
    for name, content in (contents | {"6": b"last", "Thumbs.db": b"\0\0", "6~": b"backup"}).items():
        (folder / name).write_bytes(content)
    data = module(path=[str(folder), str(tmp_path / "text.txt")], **ALL_FOR_TRAINING)
    assert texts_of(data) == {"train": "no line end\nwindows\r\nwide\nmac\rlast\n" + PROSE}
    (line,) = data.found()["left_out"]
    assert line.endswith("folder: 2 made by the system: 6~, Thumbs.db")
    assert data.found()["tokens"] == {"train": len(split_ids(data, "train"))}


def test_a_folder_of_splits_is_not_one_text(module, tmp_path):
    folder = tmp_path / "folder"
    for name in ("wiki.train.raw", "wiki.valid.raw", "train.py", "eval.py", "notes/test.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(PROSE)
    message = r"holds several splits \(wiki.train.raw, wiki.valid.raw\), .*: set path, validation_path and test_path"
    with refused(message):
        module(path=str(folder)).setup("fit")
    (folder / "wiki.valid.raw").rename(folder / "notes/train.txt")
    with refused(r"folder/notes holds several splits \(test.txt, train.txt\)"):
        module(path=str(folder)).setup("fit")
    (folder / "notes/train.txt").unlink()
    module(path=str(folder)).setup("fit")


def test_what_describes_tables_is_no_text(module, tmp_path):
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("license: mit")
    (folder / "data/a.jsonl").write_text('{"text": "one two three four"}')
    data = module(path=str(folder), **ALL_FOR_TRAINING)
    assert texts_of(data) == {"train": "one two three four\n"}
    assert data.found()["left_out"] == [f"{folder}: 1 description(s) of the tables: README.md"]
    with pyarrow.output_stream(str(folder / "data/a.jsonl.gz"), compression="gzip") as stream:
        stream.write((folder / "data/a.jsonl").read_bytes())
    (folder / "data/a.jsonl").unlink()
    assert texts_of(module(path=str(folder), **ALL_FOR_TRAINING)) == {"train": "one two three four\n"}
    (folder / "data/a.jsonl.gz").unlink()
    assert texts_of(module(path=str(folder), **ALL_FOR_TRAINING)) == {"train": "license: mit"}


def test_explicit_files_are_the_splits_whatever_the_fractions(module, tmp_path):
    for split in ("validation", "test"):
        (tmp_path / split).write_text(f"the {split} text")
    data = module(validation_path=str(tmp_path / "validation"), test_path=[str(tmp_path / "test")])
    assert texts_of(data) == {"train": PROSE, "validation": "the validation text", "test": "the test text"}
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
    assert texts_of(data) == {"train": "\n = Title = \n\n one two \n", "validation": "three\n", "test": "four\n"}


def test_a_hub_dataset_that_was_tokenized_needs_no_hub(module, monkeypatch):
    rows = {split: datasets.Dataset.from_dict({"text": ["once upon a time"]}) for split in ("train", "test")}
    monkeypatch.setattr(text_sources, "load_huggingface", lambda path, name, streaming: rows)
    first = module(source="huggingface", path="a/b", context_length=4)
    assert texts_of(first)["train"] == "once upon a time\n"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert module(source="huggingface", path="a/b", context_length=4).vocab_size == 256


@pytest.mark.parametrize(
    "name", ["a [1].jsonl.gz", "a.jsonl", "a.json.gz", "a.ndjson.bz2", "a.parquet", "a.txt.zst", "text.lz4"]
)
def test_tables_and_compressed_files_are_read(module, tmp_path, name):
    rows = ["", "one\n", "two \u00e9 words", None]
    table = datasets.Dataset.from_dict({"id": list(range(len(rows))), "text": rows})
    file = tmp_path / "folder" / name
    file.parent.mkdir()
    (file.parent / "0.txt").write_text("before")
    if name == "a.parquet":
        table.to_parquet(file)
    else:
        content = "".join(json.dumps(row) + "\n" for row in table) if "json" in name else "\none\ntwo \u00e9 words\n"
        compression = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}.get(file.suffix)
        with pyarrow.output_stream(str(file), compression=compression) as stream:
            stream.write(content.encode())
    data = module(path=str(file.parent), **ALL_FOR_TRAINING)
    assert texts_of(data) == {"train": "before\n\none\ntwo \u00e9 words\n"}
    is_table = "json" in name or name == "a.parquet"
    assert data.found()["left_out"] == ["1 row(s) of the file without text, such as row 3"] * is_table


def test_rows_of_json_need_nothing_in_common_but_the_text(module, tmp_path):
    rows = [
        '{"id": 1}',
        "",
        '{"id": "one", "text": "first\\nsecond"}',
        '{"text": "third \u00e9\u2028", "id": {"a": []}}\r',
    ]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding)
        data = module(path=str(tmp_path / "a.jsonl"), **ALL_FOR_TRAINING)
        assert texts_of(data) == {"train": "first\nsecond\nthird \u00e9\u2028\n"}
        assert data.found()["left_out"] == ["1 row(s) of the file without text, such as row 0"]
    for text in ('{"name": "text"}', '{\n  "text": "x"\n}'):
        (tmp_path / "package.json").write_text(text)
        assert texts_of(module(path=str(tmp_path / "package.json"), **ALL_FOR_TRAINING)) == {"train": text}


@pytest.mark.parametrize("source", ["files", "huggingface"])
def test_the_text_may_be_in_another_column(module, tmp_path, source):
    table = datasets.Dataset.from_dict({"content": ["one two", "three"], "text": [1, 2]})
    (tmp_path / "rows").mkdir()
    table.to_parquet(tmp_path / "rows" / "train.parquet")
    data = module(source=source, path=str(tmp_path / "rows"), text_column="content", **ALL_FOR_TRAINING)
    assert texts_of(data) == {"train": "one two\nthree\n"}


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
    settings = hub | limit | {"bpe_vocab_size": 300, "validation_fraction": 0.2}
    data = module(**settings)
    texts = texts_of(data)
    assert list(texts) == ["train", "validation", "test"]
    assert "".join(f"document {number} of many\n" for number in range(10**4)).startswith(texts["train"])
    assert data.split_statistics("train") == statistics_of(data, "train")
    if "max_train_tokens" in limit:
        assert len(split_ids(data, "train")) == 2000
    else:
        assert abs(len(texts["train"]) - 3000) < 10
    assert len(read) < 1500
    assert texts_of(module(**settings)) == texts


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
    assert isinstance(again._prepared().arrays["train"].array, np.memmap)
    assert again._prepared().arrays["train"].array.dtype == np.uint16
    assert again.tokenizer_state() == first.tokenizer_state()
    monkeypatch.undo()
    monkeypatch.setattr("revdeq_lightning.data.text.tokenizers.ByteTokenizer.vocab_size", 2**16 + 1)
    large = module()
    assert large._prepared().arrays["train"].array.dtype == np.uint32
    assert "".join(texts_of(large).values()) == PROSE


def test_other_content_or_settings_are_other_tokens(module, tmp_path):
    def tokenizer(size):
        (tmp_path / "tokenizer.json").write_text(BytePairTokenizer.train([PROSE], size).state()["definition"])
        return {"tokenizer": str(tmp_path / "tokenizer.json")}

    ids = split_ids(module(), "train")
    for change in ({"text": PROSE + "!"}, {"tokenizer": "characters"}, {"validation_fraction": 0.2}):
        assert split_ids(module(**change), "train") != ids, change
    assert split_ids(module(), "train") == ids
    assert [module(**tokenizer(size)).vocab_size for size in (260, 270)] == [260, 270]  # files of one name


def test_damaged_tokens_are_noticed_and_built_anew(module):
    expected = split_ids(module(), "train")
    damages = [
        ("train", lambda content: content[:-100]),
        ("train", lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
        ("index.json", lambda content: content[:3]),
        ("index.json", lambda content: b"\xff" * 500),
    ]
    for name, damage in damages:
        file = cached_folder(module()) / name
        file.write_bytes(damage(file.read_bytes()))
        with pytest.warns(UserWarning, match="is damaged and will be rebuilt"):
            assert split_ids(module(), "train") == expected
        assert split_ids(module(), "train") == expected


def test_an_interrupted_or_killed_preparation_leaves_nothing(module, monkeypatch):
    data = module()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    monkeypatch.undo()
    cache = Path(data.hparams["cache_dir"])
    assert [file.suffix for file in cache.iterdir()] in ([], [".lock"])
    expected = split_ids(data, "train")
    left = cached_folder(data).rename(cache / f".{cached_folder(data).name}.abc")
    other, busy = (cache / f".files-{name}.arrays.abc" for name in ("killed", "busy"))
    for folder in (other, busy):
        folder.mkdir()
    with FileLock(f"{cache}/files-busy.arrays.lock"):
        assert split_ids(module(), "train") == expected
    assert (left.exists(), other.exists(), busy.exists()) == (False, False, True)


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
    assert len(data._prepared().arrays["train"].array) > 0


def _prepare_at_the_same_time(folder):
    data_module(folder)
    context = multiprocessing.get_context("fork")
    start, builds = context.Barrier(4), context.Value("i", 0)
    processes = [context.Process(target=_prepare_and_count, args=(folder, start, builds)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert builds.value == 1


def test_processes_that_prepare_at_the_same_time_build_once(tmp_path):
    run_apart(_prepare_at_the_same_time, tmp_path)  # where no tokenizer has threads, which a fork would lose


def prepared(path, tokenizer="bpe"):
    """What a process of its own reports that prepares a text."""
    program, cache = path.with_name("program.py"), path.with_name("cache")
    program.write_text(text_benchmark.CHILD.replace('"files"', '"huggingface"' if path.is_dir() else '"files"'))
    return json.loads(run_python(program, path, tokenizer, cache).out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JSON lines", "one line"])
def test_preparing_takes_as_much_memory_for_a_text_three_times_as_large(tmp_path, kind):
    found = {}
    for size in (4, 12):
        path = tmp_path / f"{size}.{text_benchmark.KINDS[kind]}"
        text_benchmark.write(path, kind, size * 1e6)
        found[size] = prepared(path)
    assert found[12]["peak_bytes"] < 1.5e9
    assert found[12]["peak_bytes"] - found[4]["peak_bytes"] < 100e6  # mostly new words; it was 1.3 GB
    if kind == "one line":
        assert prepared(path)["kept_bytes"] < 20e6


@pytest.mark.slow
def test_a_group_of_rows_that_is_all_of_a_file_is_not_decoded_at_once(tmp_path):
    found = {}
    for size in (20, 80):
        folder = tmp_path / str(size)
        folder.mkdir()
        rows = [f"{number} " * 200 for number in range(size * 1000)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "a.parquet", row_group_size=len(rows))
        found[size] = prepared(folder, "bytes")
    assert found[80]["peak_bytes"] - found[20]["peak_bytes"] < 60e6  # it was 4 bytes a byte


# Bad input


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "the train text is empty"),
        (b"good\xe9bad", {}, r"text.txt is not UTF-8: byte 0xe9 at offset 4: convert it"),
        ("short", {"test_fraction": 0.0}, "the train text has 4 tokens, a window needs 9.*context_length than 8"),
        (" " * 400, {}, "the validation text has no words, only spaces"),
        (PROSE, {"validation_fraction": 0.0003}, "the validation text has 1 tokens, a window needs 2"),
        (PROSE, {"batch_size": 1000}, r"batch_size 1000 on 1 rank\(s\) needs 1000 items, the data has \d+: lower"),
        (
            "a" * 500 + "z" * 50,
            {"tokenizer": "characters", "test_fraction": 0.0},
            "validation text: character 'z' .position 5.*tokenizer=",
        ),
    ],
)
def test_texts_that_do_not_fit_are_told(module, text, arguments, message):
    data = module(text, **arguments)
    with refused(message):
        data.setup("fit")
        data.train_dataloader()


def test_missing_files_are_told(module, tmp_path, monkeypatch):
    with refused(f"no such text file or folder: {re.escape(str(tmp_path))}/none", FileNotFoundError):
        module(path=str(tmp_path / "none")).prepare_data()
    with refused(f"no such folder: {re.escape(str(tmp_path))}/none", FileNotFoundError):
        module(source="huggingface", path=str(tmp_path / "none")).prepare_data()
    (tmp_path / "folder").mkdir()
    with refused(r"no files under .*folder: use a text file", FileNotFoundError):
        module(path=str(tmp_path / "folder")).prepare_data()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "folder")})
    with refused(r"no source of its standard library .*use source=\"files\"", FileNotFoundError):
        module(source="python").prepare_data()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"words": ["a"]}}, r"has the columns \['words'\], \"text\" is not among them"),
        ({"test": {"text": ["a"]}}, r"has the splits \['test'\], \"train\" is not among them"),
        ({"train": {"text": [0] * 50}}, "row 0: must be a text, got 0: set text_column to a column of strings"),
        ({"train": {"text": [["a", "b"]] * 50}}, r"train, row 0: .* got \['a', 'b'\]"),
        ({"train": {"text": [None] * 50}}, "no row of train has a text"),
        ({"train": {"text": []}}, r"the training split of \S+ has no rows"),
    ],
)
def test_datasets_without_texts_are_told(module, tmp_path, splits, message):
    parts = {split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "rows")
    with refused(message):
        module(source="huggingface", path=str(tmp_path / "rows")).setup("fit")


@pytest.mark.parametrize(
    ("source", "name", "content", "message"),
    [
        ("huggingface", "table.parquet", b"PAR1", r"cannot read the dataset \S+ \(.*\): check its files"),
        ("huggingface", "text.txt", b"\xff", r"cannot read the dataset \S+ \(.*\): check its files"),
        ("files", "a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl, line 2: not JSON \(Expecting value"),
        ("files", "a.jsonl", b'{"text": "a"}\n[1]', r"a.jsonl, line 2: must be an object, got \[1\]"),
        ("files", "a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl, line 1: not JSON \(.*surrogates not allowed"),
        ("files", "a.json", b'[{"text": "a"},\n{"text": "b"}]', "a.json, line 1: not JSON"),
        ("files", "a.jsonl", b'{"text": 1}', "the file, row 0: must be a text, got 1"),
        ("files", "a.jsonl", b"", "the train text is empty"),
        (
            "huggingface",
            "../a.jsonl",
            b"",
            'must be a folder or a dataset of the Hub, got the file .*: set source="files"',
        ),
        ("files", "a.jsonl", b'{"words": "a"}', "has the columns .'words'."),
    ],
)
def test_tables_that_cannot_be_read_are_told(module, tmp_path, source, name, content, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(content)
    path = tmp_path / "folder" / name if name.startswith("..") else tmp_path / "folder"
    with refused(message):
        module(source=source, path=str(path)).setup("fit")


def test_missing_rows_and_unused_splits_are_left_out_and_told(module, tmp_path):
    rows = ["one two three"] * 3
    parts = {"Train": [*rows, None, *rows, None], "valid": rows, "testing": [], "extra": rows}
    parts = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "rows")
    data = module(source="huggingface", path=str(tmp_path / "rows"))
    left_out = ["2 row(s) of train without text, such as row 3", "the split extra (3 rows)", "the split test (0 rows)"]
    with pytest.warns(UserWarning, match=re.escape("left out: ")):
        data.setup("fit")
    assert texts_of(data) == {"train": "one two three\n" * 6, "validation": "one two three\n" * 3}
    again = module(source="huggingface", path=str(tmp_path / "rows"))
    assert sorted(data.found()["left_out"]) == sorted(again.found()["left_out"]) == left_out


def test_bytes_are_counted_although_a_tokenizer_strips_spaces(module, tmp_path):
    library = Tokenizer.from_str(BytePairTokenizer.train([PROSE], 300).state()["definition"])
    library.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    text = "To be, or not to be, that is the  <mask>  question.\n" * 40
    data = module(text, tokenizer=str(tmp_path / "tokenizer.json"), **ALL_FOR_TRAINING)
    assert texts_of(data) == {"train": text}
    assert data.split_statistics("train").num_bytes == len(text) - 1
