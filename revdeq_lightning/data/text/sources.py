"""Where text comes from: the standard library's own source, local files, or a Hugging Face dataset."""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from revdeq_lightning.data.text.tokenizers import hub_is_reachable

SOURCES = ("python", "files", "huggingface")
SPLITS = ("train", "validation", "test")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class TextSource(NamedTuple):
    """Text in splits that do not overlap.

    Attributes:
        key: Identifies the content.
        read: Gives the text of each split; a split without text is missing.
    """

    key: str
    read: Callable[[], dict[str, str]]


def open_source(
    source: str,
    path: str | Sequence[str] | None,
    *,
    dataset_name: str | None,
    validation_path: str | Sequence[str] | None,
    test_path: str | Sequence[str] | None,
    validation_fraction: float,
    test_fraction: float,
) -> TextSource:
    """Open one of the `SOURCES`; the arguments are those of `TextDataModule`."""
    if source == "python":
        return _open_python(validation_fraction, test_fraction)
    if source == "huggingface":
        return _open_huggingface(str(path), dataset_name, validation_fraction, test_fraction)
    return _open_files(
        {"train": path, "validation": validation_path, "test": test_path}, validation_fraction, test_fraction
    )


def cut_by_fractions(text: str, validation_fraction: float, test_fraction: float) -> dict[str, str]:
    """Contiguous parts: first the training text, then validation, then test, with bounds in characters."""
    train_end = int((1 - validation_fraction - test_fraction) * len(text))
    validation_end = int((1 - test_fraction) * len(text))
    parts = text[:train_end], text[train_end:validation_end], text[validation_end:]
    return {split: part for split, part in zip(SPLITS, parts, strict=True) if part}


def _open_python(validation_fraction: float, test_fraction: float) -> TextSource:
    """A file's split and place follow from the hash of its name: the same everywhere, similar over versions.

    In the order of hashes a byte cap on the split takes files from all over the library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _NOT_LIBRARY
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            files.append((hashlib.sha256(file.relative_to(root).as_posix().encode()).digest(), file))
    if not files:
        raise FileNotFoundError(
            f'this Python has no source of its standard library under {root}: use source="files" with path=YOUR_TEXT.'
        )
    content: dict[str, list[str]] = {split: [] for split in SPLITS}
    digest = hashlib.sha256()
    for name_hash, file in sorted(files):
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a file that declares another encoding
            continue
        place = int.from_bytes(name_hash[:8], "big") / 2**64
        is_test = place < test_fraction
        is_validation = not is_test and place < test_fraction + validation_fraction
        content["test" if is_test else "validation" if is_validation else "train"].append(text)
        digest.update(name_hash + text.encode())
    texts = {split: "".join(parts) for split, parts in content.items() if parts}
    return TextSource(digest.hexdigest(), lambda: texts)


def _open_files(
    paths: dict[str, str | Sequence[str] | None], validation_fraction: float, test_fraction: float
) -> TextSource:
    texts = {split: "".join(map(_read_utf8, _list_files(path))) for split, path in paths.items() if path is not None}
    for split, text in texts.items():
        if not text:
            raise ValueError(f"the {split} text is empty ({paths[split]}): give a file with text.")
    if list(texts) == ["train"]:
        texts = cut_by_fractions(texts["train"], validation_fraction, test_fraction)
    digest = hashlib.sha256()
    for split, text in texts.items():
        digest.update(f"{split}:{len(text)}:".encode())
        digest.update(text.encode())
    return TextSource(digest.hexdigest(), lambda: texts)


def _list_files(path: str | Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for entry in [Path(path)] if isinstance(path, str) else map(Path, path):
        if entry.is_dir():
            names = sorted(f.relative_to(entry).as_posix() for f in entry.rglob("*") if f.is_file())
            files.extend(entry / name for name in names if not f"/{name}".count("/."))
        elif entry.is_file():
            files.append(entry)
        else:
            raise FileNotFoundError(f"no such text file or folder: {entry} (looked in {Path.cwd()}): correct the path.")
    if not files:
        raise FileNotFoundError(f"no files under {path}: give a text file or a folder that holds some.")
    return files


def _read_utf8(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}: "
            f"convert it, for example with `iconv -f ISO-8859-1 -t UTF-8 {file.name}`."
        ) from None


def _open_huggingface(path: str, name: str | None, validation_fraction: float, test_fraction: float) -> TextSource:
    folder = Path(path)

    def read() -> dict[str, str]:
        dataset = load_huggingface(folder, path, name)
        texts = {}
        for split in SPLITS:
            if split not in dataset:
                continue
            if "text" not in dataset[split].column_names:
                raise ValueError(f'{path} has the columns {dataset[split].column_names}, "text" is not among them.')
            # Every row is a line or a document and ends its line. WikiText's blank lines come as empty rows.
            texts[split] = "".join(row if row.endswith("\n") else row + "\n" for row in dataset[split]["text"])
        if "train" not in texts:
            raise ValueError(f'{path} has the splits {sorted(dataset)}, "train" is not among them.')
        return texts if len(texts) > 1 else cut_by_fractions(texts["train"], validation_fraction, test_fraction)

    return TextSource(huggingface_key(path, name), read)


def huggingface_key(path: str, name: str | None) -> str:
    """Identifies a local copy by its content, a dataset of the hub by its name: once prepared it needs no hub."""
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}:{name}"
    digest = hashlib.sha256(str(name).encode())
    for file in _list_files(path):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_huggingface(folder: Path, path: str, name: str | None) -> dict[str, Any]:
    """The splits of a Hugging Face dataset: of `folder` if it exists, else of the hub's `path`."""
    import datasets
    from huggingface_hub import constants

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded: Any = datasets.load_from_disk(path)
        return loaded if isinstance(loaded, dict) else {"train": loaded}
    if not folder.is_dir() and not constants.HF_HUB_OFFLINE and not hub_is_reachable():
        raise ConnectionError(_UNREACHABLE.format(path=path, why="no answer"))
    try:
        loaded = datasets.load_dataset(path, name)
    except ConnectionError as error:
        raise ConnectionError(_UNREACHABLE.format(path=path, why=error)) from None
    return loaded  # type: ignore[no-any-return]


_UNREACHABLE = (
    "cannot fetch the dataset {path} from the hub ({why}): give path=FOLDER with its parquet files or its save_to_disk "
    "copy, set HF_HUB_OFFLINE=1 if it was downloaded before, or use the embedded data, which needs no network."
)
