"""Text of any size, read in blocks: the standard library's own source code, local files, or a Hugging Face dataset."""

import codecs
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from revdeq_lightning.data.loading.files import (
    SPLITS,
    dataset_errors,
    files_key,
    huggingface_key,
    list_files,
    load_huggingface,
    names_of_splits,
    read_blocks,
    read_text,
)

SOURCES = ("python", "files", "huggingface")
_CODE = re.compile(r".*\.(py|ipynb|sh|ya?ml|toml|cfg|c|cc|cpp|h|cu|rs|js)", re.IGNORECASE)
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_TABLES = (".parquet", ".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_BATCH_ROWS = 100
_BLOCK_BYTES = 1 << 17

Paths = Mapping[str, str | Sequence[str]]
Batch = dict[str, list[Any]]
Texts = dict[str, Iterator[str]]
"""The text of each split in parts, read as they are needed; then what was left out is in the list `left_out`."""


def source_key(source: str, paths: Paths, dataset_name: str | None) -> str:
    """Identify the content of a source, given the path of each split (of "train" if that has all)."""
    if source == "python":
        return files_key(*_library())
    if source == "huggingface":
        return huggingface_key(str(paths["train"]), dataset_name)
    return repr({split: [files_key(*found) for found in _find_files(path, [])] for split, path in paths.items()})


def read_files(paths: Paths, folder: Path, left_out: list[str]) -> Texts:
    """Files of each split, joined; `folder` is for temporary files."""
    found = {split: _find_files(path, left_out) for split, path in paths.items()}
    files = {split: [root / name for root, names in roots for name in names] for split, roots in found.items()}
    return {s: _joined(_read_file(file, folder, left_out) for file in files[s]) for s in files}


def _library() -> tuple[Path, list[str]]:
    """Folder of the library's source, and its files in the order of the hash of their names, identical everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _NOT_LIBRARY
        found += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    if not found:
        raise FileNotFoundError(
            f'this Python has no source of its standard library under {root}: use source="files" with path=YOUR_TEXT.'
        )
    return root, sorted(found, key=_hash)


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def read_python(validation_fraction: float, test_fraction: float) -> Texts:
    """Files of the library; the hash of a file's name decides its split: identical everywhere, similar across versions.

    In this order, a byte limit on the split selects files from the entire library.
    """
    root, names = _library()
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for name in names:
        place = int.from_bytes(_hash(name)[:8], "big") / 2**64
        is_validation = place < test_fraction + validation_fraction
        files["test" if place < test_fraction else "validation" if is_validation else "train"].append(root / name)
    return {split: map(_python_text, found) for split, found in files.items()}


def _python_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:  # the file declares another encoding
        return ""


def _find_files(path: str | Sequence[str], left_out: list[str]) -> list[tuple[Path, list[str]]]:
    """Folders, and names of files below them."""
    found: list[tuple[Path, list[str]]] = []
    for entry in [Path(path)] if isinstance(path, str) else map(Path, path):
        if not entry.exists():
            raise FileNotFoundError(f"no such text file or folder: {entry} (looked in {Path.cwd()}): correct the path.")
        if not entry.is_dir():
            found.append((entry.parent, [entry.name]))
            continue
        listing = list_files(entry)
        tops = {name.partition("/")[0] for name in listing.files if not _CODE.fullmatch(name)}
        if of_splits := names_of_splits(tops):
            raise ValueError(
                f"{entry} holds several splits ({', '.join(of_splits)}), which would be trained on as one text: set "
                "path, validation_path and test_path to the file or folder of each."
            )
        found.append((entry, listing.files))
        left_out += [f"{entry}: {line}" for line in listing.left_out]
    if not any(names for _, names in found):
        raise FileNotFoundError(f"no files under {path}: use a text file or a folder with text files.")
    return found


def _joined(texts: Iterable[Iterable[str]]) -> Iterator[str]:
    """One text, with a line end where a text without a final one is followed by another."""
    last = "\n"
    for text in texts:
        first = True
        for part in filter(None, text):
            if first and not last.endswith(("\n", "\r")):
                yield "\n"
            yield part
            first, last = False, part[-1]


def _read_file(path: Path, folder: Path, left_out: list[str]) -> Iterator[str]:
    """A text file, or the column "text" of a table; both may be compressed."""
    name = path.stem if path.suffix.lower() in _COMPRESSED else path.name
    if Path(name).suffix.lower() not in _TABLES:
        yield from read_text(path)
        return
    table = path
    if name != path.name:
        table = folder / name
        with table.open("wb") as file:
            file.writelines(read_blocks(path))
    yield from _read_rows(str(path), "the file", _read_table(table), left_out)


def _read_table(path: Path) -> Iterator[Batch]:
    import datasets
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":  # the other library decodes a group of rows at once, which may be all of them
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        columns = ["text"] if "text" in file.schema_arrow.names else None
        yield from (batch.to_pydict() for batch in file.iter_batches(_BATCH_ROWS, columns=columns))
    else:
        try:
            rows = datasets.load_dataset("json", data_files=glob.escape(str(path)), split="train", streaming=True)
            yield from _select(rows)
        except (StopIteration, RuntimeError) as error:  # within `datasets`, of a file without a row
            if not isinstance(error.__cause__ or error, StopIteration):
                raise


def read_huggingface(path: str, name: str | None, streaming: bool, left_out: list[str]) -> Texts:
    """Rows of a dataset; `streaming` fetches only those that are read."""
    loaded = load_huggingface(path, name, streaming=streaming or Path(path).is_dir())
    for split in loaded:
        if split not in SPLITS:
            rows = f" ({len(loaded[split])} rows)" if hasattr(loaded[split], "__len__") else ""
            left_out.append(f"the split {split}{rows}")
    return {s: _read_rows(path, s, _select(loaded[s]), left_out) for s in SPLITS if s in loaded}


def _select(rows: Any) -> Iterator[Batch]:
    rows = rows.select_columns("text") if "text" in (rows.column_names or ()) else rows
    yield from rows.iter(batch_size=_BATCH_ROWS)


def _read_rows(path: str, split: str, batches: Iterator[Batch], left_out: list[str]) -> Iterator[str]:
    """The column "text"; every row is a line or a document and gets a line end (WikiText's blank lines are empty)."""
    num_rows, missing = 0, []
    for batch in _reported(path, batches):
        if "text" not in batch:
            raise ValueError(
                f'{path} has the columns {list(batch)}, "text" is not among them: save a copy with a column of that '
                "name by save_to_disk, and use its folder as path."
            )
        for row, text in enumerate(batch["text"], num_rows):
            if isinstance(text, str):
                yield text if text.endswith("\n") else text + "\n"
            elif text is None:
                missing.append(row)
            else:
                raise ValueError(
                    f'{path}, {split}, row {row}: "text" must be a text, got {text!r:.60}: save a copy with a column '
                    '"text" of strings by save_to_disk, and use its folder as path.'
                )
        num_rows += len(batch["text"])
    if missing:
        left_out.append(f"{len(missing)} row(s) of {split} without text, such as row {missing[0]}")
    if split == "train" and not num_rows:
        raise ValueError(f"the training split of {path} has no rows: use a dataset with rows.")
    if not num_rows:
        left_out.append(f"the split {split} (0 rows)")
    elif len(missing) == num_rows:
        raise ValueError(f'{path}: no row of {split} has a text: use a dataset with a column "text" of strings.')


def _reported(path: str, batches: Iterator[Batch]) -> Iterator[Batch]:
    with dataset_errors(path):
        yield from batches


class Passage(NamedTuple):
    """The bytes from `start` to `end` of a UTF-8 file."""

    path: Path
    start: int
    end: int

    @classmethod
    def write(cls, path: Path, texts: Iterable[str], min_bytes: int | None = None) -> "Passage":
        """Write the parts of a text: all of them, or as many as make `min_bytes`."""
        end = 0
        with path.open("wb") as file:
            for text in texts:
                end += file.write(text.encode("utf-8"))
                if min_bytes is not None and end >= min_bytes:
                    break
        return cls(path, 0, end)

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    def blocks(self) -> Iterator[str]:
        """The text in parts of at most 128 KiB; an incomplete character at an end is U+FFFD."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            sizes = iter(lambda: min(_BLOCK_BYTES, self.end - file.tell()), 0)
            yield from codecs.iterdecode(map(file.read, sizes), "utf-8", errors="replace")

    def divide(self, *fractions: float) -> list["Passage"]:
        """The parts between these fractions of the characters."""
        total = sum(map(len, self.blocks()))
        cuts = [self.start, *(self._position(int(fraction * total)) for fraction in fractions), self.end]
        return [self._replace(start=start, end=end) for start, end in pairwise(cuts)]

    def _position(self, num_characters: int) -> int:
        position = self.start
        for block in self.blocks():
            position += len(block[:num_characters].encode("utf-8"))
            num_characters -= min(num_characters, len(block))
        return position

    def first_bytes(self, limit: int | None) -> "Passage":
        """At most the first `limit` bytes, without an incomplete character."""
        end = self.end if limit is None else min(self.end, self.start + limit)
        with self.path.open("rb") as file:
            while file.seek(end) < self.end and file.read(1)[0] & 0xC0 == 0x80:
                end -= 1
        return self._replace(end=end)

    def count_words(self) -> int:
        """Words as WikiText counts them: separated by white space, and one for each line end."""
        count, in_word = 0, False
        for block in self.blocks():
            count += len(block.split()) + block.count("\n") - (in_word and not block[0].isspace())
            in_word = not block[-1].isspace()
        return count
