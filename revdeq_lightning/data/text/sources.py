"""Text of any size, read in blocks: the standard library's own source code, local files, or a Hugging Face dataset."""

import codecs
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from revdeq_lightning.data.loading.files import (
    SPLITS,
    ParquetRows,
    count_names,
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
_NOT_SPLITS = re.compile(r".*\.(py|ipynb|sh|ya?ml|toml|cfg|c|cc|cpp|h|cu|rs|js)", re.IGNORECASE)
"""Names of code, which may be called test and train for other reasons."""
_CARD = re.compile(r"(readme|licen[cs]e|dataset_infos)(\.\w+)?", re.IGNORECASE)
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_TABLES = (".parquet", ".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_BATCH_ROWS = 100
_BLOCK_BYTES = 1 << 17

Paths = Mapping[str, str | Sequence[str]]
Texts = dict[str, Iterator[str]]
"""The text of each split in parts, read as they are needed; then what was left out is in the list `left_out`."""


def source_key(source: str, paths: Paths, dataset_name: str | None) -> str:
    """Identify the content of a source, given the path of each split (of "train" if that has all)."""
    if source == "python":
        return files_key(*_library())
    if source == "huggingface":
        return huggingface_key(str(paths["train"]), dataset_name)
    return repr({split: [files_key(*found) for found in _find_files(path, [])] for split, path in paths.items()})


def read_files(paths: Paths, column: str, folder: Path, left_out: list[str]) -> Texts:
    """Files of each split, joined; `folder` is for temporary files."""
    found = {split: _find_files(path, left_out) for split, path in paths.items()}
    files = {split: [root / name for root, names in roots for name in names] for split, roots in found.items()}
    return {s: _joined(_read_file(file, column, folder, left_out) for file in files[s]) for s in files}


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
        cards = [name for name in listing.files if _CARD.fullmatch(Path(name).name)]
        if not any(_unpacked(Path(name)).suffix.lower() in _TABLES for name in listing.files):
            cards = []
        names = [name for name in listing.files if name not in cards]
        _refuse_splits(entry, names)
        found.append((entry, names))
        left_out += [f"{entry}: {line}" for line in listing.left_out]
        if cards:
            left_out.append(f"{entry}: {count_names('description(s) of the tables', cards)}")
    if not any(names for _, names in found):
        raise FileNotFoundError(f"no files under {path}: use a text file or a folder with text files.")
    return found


def _refuse_splits(root: Path, names: Iterable[str]) -> None:
    """Raise ValueError if the files or folders of one folder are several splits."""
    below: dict[str, set[str]] = {}
    for name in names:
        if not _NOT_SPLITS.fullmatch(name):
            parts = name.split("/")
            for depth, part in enumerate(parts):
                below.setdefault("/".join(parts[:depth]), set()).add(part)
    for folder, inside in below.items():
        if of_splits := names_of_splits(inside):
            raise ValueError(
                f"{root / folder} holds several splits ({', '.join(of_splits)}), which would be trained on as one "
                "text: set path, validation_path and test_path to the file or folder of each."
            )


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


def _read_file(path: Path, column: str, folder: Path, left_out: list[str]) -> Iterator[str]:
    """A text file, or a column of a table; both may be compressed."""
    name = _unpacked(path)
    table = path if name == path else folder / name.name
    match name.suffix.lower():
        case ".parquet":
            if table != path:
                with table.open("wb") as file:
                    file.writelines(read_blocks(path))
            rows = _select(str(path), ParquetRows([str(table)]), column)
        case ".jsonl" | ".ndjson":
            rows = _read_objects(path, column)
        case ".json" if _has_rows(path, column):
            rows = _read_objects(path, column)
        case _:
            yield from read_text(path)
            return
    yield from _read_rows(str(path), "the file", rows, left_out)
    if table != path:
        table.unlink(missing_ok=True)


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path


def _has_rows(path: Path, column: str) -> bool:
    """Whether a file that may be any JSON has an object with this key on its first line, or a list of such objects."""
    start = next(read_text(path), "").lstrip()
    return bool(re.match(rf'\[?\s*\{{.*"{re.escape(column)}"\s*:', start))


def _read_objects(path: Path, column: str) -> Iterator[Any]:
    """A value of each JSON object; there is one on each line."""
    names: list[str] = []
    for number, line in enumerate(_lines(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get(column), str):
                row[column].encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): write one object on each line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be an object, got {row!r:.60}: write one on each line.")
        if column not in names:
            names = list(row)
        yield row.get(column)
    if names and column not in names:
        raise _no_column(str(path), names, column)


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Lines of a text, which end at line feeds only."""
    rest: list[str] = []
    for part in parts:
        *ended, last = part.split("\n")
        for line in ended:
            yield "".join([*rest, line])
            rest.clear()
        rest.append(last)
    yield "".join(rest)


def read_huggingface(path: str, name: str | None, column: str, streaming: bool, left_out: list[str]) -> Texts:
    """Rows of a dataset; `streaming` fetches only those that are read."""
    loaded = load_huggingface(path, name, streaming=streaming or Path(path).is_dir())
    for split in loaded:
        if split not in SPLITS:
            rows = f" ({len(loaded[split])} rows)" if hasattr(loaded[split], "__len__") else ""
            left_out.append(f"the split {split}{rows}")
    return {s: _read_rows(path, s, _select(path, loaded[s], column), left_out) for s in SPLITS if s in loaded}


def _select(path: str, rows: Any, column: str) -> Iterator[Any]:
    with dataset_errors(path):
        rows = rows.select_columns(column) if column in (rows.column_names or ()) else rows
        for batch in rows.iter(batch_size=_BATCH_ROWS):
            if column not in batch:
                break
            yield from batch[column]
        else:
            return
    raise _no_column(path, batch, column)


def _no_column(path: str, names: Iterable[str], column: str) -> ValueError:
    return ValueError(
        f'{path} has the columns {list(names)}, "{column}" is not among them: set text_column to that of the texts.'
    )


def _read_rows(path: str, split: str, rows: Iterator[Any], left_out: list[str]) -> Iterator[str]:
    """Every row is a line or a document and gets a line end (WikiText's blank lines are empty)."""
    num_rows, num_missing, first_missing = 0, 0, 0
    for text in rows:
        if isinstance(text, str):
            yield text if text.endswith("\n") else text + "\n"
        elif text is None:
            first_missing = first_missing if num_missing else num_rows
            num_missing += 1
        else:
            raise ValueError(
                f"{path}, {split}, row {num_rows}: must be a text, got {text!r:.60}: set text_column to a column of "
                "strings."
            )
        num_rows += 1
    if num_missing:
        left_out.append(f"{num_missing} row(s) of {split} without text, such as row {first_missing}")
    if split == "train" and not num_rows:
        raise ValueError(f"the training split of {path} has no rows: use a dataset with rows.")
    if not num_rows:
        left_out.append(f"the split {split} (0 rows)")
    elif num_missing == num_rows:
        raise ValueError(f"{path}: no row of {split} has a text: set text_column to a column of strings.")


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
