"""Files in folders, names of splits, and datasets of the Hugging Face Hub or a local copy."""

import codecs
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "validation", "test")
_SYSTEM_NAME = re.compile(
    r"\..*|.+~|~\$.*|@eadir|@tmp|@recycle|@recently-snapshot|[#~]snapshot|#recycle|\$recycle\.bin|lost\+found|"
    r"system volume information|found\.\d{3}|__macosx|paxheaders?(\.\d+)?|__pycache__|(eh)?thumbs(_vista)?\.db(:.*)?|"
    r"desktop\.ini|icon\r|network trash folder|temporary items",
    re.IGNORECASE,
)
"""Hidden files, backups, and what operating systems and network storage put beside the user's files."""

_SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


class Listing(NamedTuple):
    """Names of the files and folders below a folder, relative and sorted, and lines on what is not data."""

    files: list[str]
    folders: list[str]
    left_out: list[str]


def list_files(root: Path) -> Listing:
    """List a folder and its subfolders, through links; leaves out what the system made and links in circles."""
    files, folders = [], []
    left_out: dict[str, list[str]] = {}

    def walk(folder: str | Path, prefix: str, above: list[str]) -> None:
        with os.scandir(folder) as scan:
            entries = list(scan)
        for entry in entries:
            name = prefix + entry.name
            linked = entry.is_symlink()
            if made_by_system(entry.name):
                left_out.setdefault("made by the system", []).append(name)
            elif os.path.isdir(entry.path) if linked else entry.is_dir():
                real = os.path.realpath(entry.path) if linked else os.path.join(above[-1], entry.name)
                if any(os.path.join(other, "").startswith(os.path.join(real, "")) for other in above):
                    left_out.setdefault("link to a folder that contains it", []).append(name)
                else:
                    folders.append(name)
                    walk(entry.path, f"{name}/", [*above, real])
            elif os.path.isfile(entry.path) if linked else entry.is_file():
                files.append(name)
            else:
                left_out.setdefault("neither file nor folder", []).append(name)

    walk(root, "", [os.path.realpath(root)])
    lines = sorted(count_names(reason, names) for reason, names in left_out.items())
    return Listing(sorted(files), sorted(folders), lines)


def made_by_system(path: str) -> bool:
    """Whether a part of this path is hidden, a backup, or made by the operating system or a network storage."""
    return any(map(_SYSTEM_NAME.fullmatch, path.split("/")))


def count_names(reason: str, names: Iterable[str]) -> str:
    """One line: how many, why, and the first names."""
    found = sorted(names)
    return f"{len(found)} {reason}: {', '.join(map(text_of, found[:5]))}{', ...' * (len(found) > 5)}"


def text_of(name: str) -> str:
    r"""The name of a file, with bytes that are not UTF-8 shown as `\xe9`."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def split_of(name: str) -> str | None:
    """The split that a usual name stands for, in any case: "Training", "VAL", "dev", "test_set", ..."""
    word = re.sub(r"^[\W_]+|[\W_]*(set|data|split|images?|imgs?)?[\W_]*$", "", name.casefold())
    return _SPLIT_OF.get(word)


def names_of_splits(names: Iterable[str]) -> list[str]:
    """Those of the names that differ only in the split: "wiki.train.raw" and "wiki.test.raw"."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        pattern = _WORD.sub(lambda word: "*" if word[0].lower() in _SPLIT_OF else word[0], name)
        groups.setdefault(pattern, {}).update(dict.fromkeys(splits_within(name), name))
    return next((sorted(group.values()) for group in groups.values() if len(group) > 1 and "train" in group), [])


def splits_within(name: str) -> set[str]:
    """The splits whose names are words of a longer name: "seg_train", "trainA", "test2", "wiki.valid.raw"."""
    return {_SPLIT_OF[word.lower()] for word in _WORD.findall(name) if word.lower() in _SPLIT_OF}


_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh[1-9]": "bz2", rb"\(\xb5/\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
"""By a pattern of the first bytes."""
_PACKED = {
    b"\xfd7zXZ": "xz: unpack it with `unxz",
    b"7z\xbc\xaf": "7-Zip: unpack it with `7z x",
    b"PK": "zip: unpack it with `unzip",
    b"%PDF": "PDF: extract its text with `pdftotext",
    b"PAR1": "parquet: give it a name that ends in .parquet, see `ls",
}


def read_blocks(path: Path) -> Iterator[bytes]:
    """Content of a file in blocks of a megabyte, unpacked if it is gzip, bzip2, zstd, or lz4."""
    import pyarrow

    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        compression = next((name for magic, name in _COMPRESSIONS.items() if re.match(magic, start)), None)
        try:
            stream = pyarrow.input_stream(file, compression=compression)
            while block := stream.read(1 << 20):
                yield block
        except OSError as error:
            if compression is None:
                raise
            raise ValueError(f"{path} cannot be unpacked ({error}): it may be cut short, copy it again.") from None


def read_text(path: Path) -> Iterator[str]:
    """Text of a file in parts: UTF-8, or UTF-16 or UTF-32 with a byte order mark, without the mark.

    For anything else, ValueError says what it seems to be.
    """
    blocks = read_blocks(path)
    start = block = next(blocks, b"")
    end = 0
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "UTF-8-sig")
    decoder = codecs.getincrementaldecoder(encoding)()
    second, is_tar = None, start[257:262] == b"ustar"
    try:
        if is_tar:
            raise UnicodeError("it has the mark of a tar archive")
        if encoding == "UTF-8-sig" and start.count(0) * 100 > len(start):
            if not start.startswith(("\xff\xfe".encode(), "\xfe\xff".encode())):
                raise UnicodeError(f"{start.count(0)} of its first {len(start)} bytes are zero")
            second = codecs.getincrementaldecoder("UTF-16")()  # it was converted as if it were Latin-1
        for block in chain([start], blocks, [b""]):
            end += len(block)
            text = decoder.decode(block, not block)
            yield second.decode(text.encode("latin-1"), not block) if second else text
    except UnicodeError as error:
        fault = str(error)
        if isinstance(error, UnicodeDecodeError):
            fault = f"byte 0x{error.object[error.start]:02x} at offset {end - len(error.object) + error.start}"
        is_cut = not block and "unexpected end" in str(error)
    else:
        return
    file = shlex.quote(str(path))
    packed = next((advice for magic, advice in _PACKED.items() if start.startswith(magic)), None)
    if is_tar:
        packed = "tar: unpack it with `tar -xf"
    zeros = tuple(block[i::4].count(0) * 10 > len(block) for i in range(4))
    wide = {(0, 1, 0, 1): "UTF-16LE", (1, 0, 1, 0): "UTF-16BE", (0, 1, 1, 1): "UTF-32LE", (1, 1, 1, 0): "UTF-32BE"}
    if packed:
        advice = f"it seems to be {packed} {file}`"
    elif zeros in wide:
        advice = f"it seems to be {wide[zeros]}: convert it with `iconv -f {wide[zeros]} -t UTF-8 {file} > NEW_FILE`"
    elif is_cut:
        advice = "it ends in the middle of a character, so its end is missing: copy it once more"
    elif 0 in block:
        advice = "it seems to be binary data: use text files only"
    else:
        convert = f"iconv -f WINDOWS-1252 -t UTF-8 {file} > NEW_FILE"
        advice = f"convert it from its encoding, for example with `{convert}` if it is Western European"
    raise ValueError(f"{path} is not {encoding.removesuffix('-sig')}: {fault}: {advice}.")


def files_key(root: Path, names: Iterable[str]) -> str:
    """Identify files by their names, sizes, and times of change, however large they are."""
    stats = ((os.fsencode(name), (root / name).stat()) for name in names)
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()).hexdigest()


def content_key(root: Path, names: Iterable[str]) -> str:
    """SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for name in names:
        with (root / name).open("rb") as file:
            digest.update(os.fsencode(name) + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def require_hub_name(path: str) -> None:
    """Raise FileNotFoundError for a path that is not there and cannot be a name on the Hub."""
    if not Path(path).exists() and (Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1):
        raise FileNotFoundError(f"no such folder: {path} (looked in {Path.cwd()}): correct the path.")


def hub_is_reachable() -> bool:
    """Check with one quick request: the client of the Hub retries for 23 s if there is no network."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library raises, there was no response
        return False
    return True


def hub_file(repository: str, name: str, advice: str, repo_type: str = "model") -> Path | None:
    """A file of a repository of the Hub, from the local cache if it is there; None if the repository lacks it.

    If it cannot be fetched, ConnectionError ends with the advice.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason = "the Hub is not reachable"
    for local in (True, False):
        try:
            if local or hub_is_reachable():
                return Path(hf_hub_download(repository, name, repo_type=repo_type, local_files_only=local))
        except LocalEntryNotFoundError:  # also an EntryNotFoundError
            pass
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
    raise ConnectionError(
        f"{name} of {repository} is not in the local cache and cannot be fetched ({reason}): {advice}"
    )


def huggingface_key(path: str, name: str | None) -> str:
    """Identify a local copy by its files and a dataset of the Hub by its name, which needs no network later."""
    folder = Path(path)
    return f"{files_key(folder, list_files(folder).files) if folder.is_dir() else f'hub:{path}'}:{name}:2"


class ParquetRows:
    """Rows of local parquet files with the methods of a streamed dataset, which decodes a group of rows at once.

    Such a group may be all of a file.
    """

    def __init__(self, files: Sequence[str], columns: list[str] | None = None) -> None:
        self.files, self.columns = files, columns

    @property
    def column_names(self) -> list[str]:
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(self.files[0]).names)

    def select_columns(self, name: str) -> "ParquetRows":
        return ParquetRows(self.files, [name])

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        import pyarrow.parquet

        for name in self.files:
            file = pyarrow.parquet.ParquetFile(name, buffer_size=1 << 20, pre_buffer=False)
            columns = [name for name in self.columns or () if name in file.schema_arrow.names]
            yield from (batch.to_pydict() for batch in file.iter_batches(batch_size, columns=columns or None))


def load_huggingface(path: str, name: str | None, *, streaming: bool = False) -> dict[str, Any]:
    """Load the splits ("train" at least) of a Hugging Face dataset from the folder `path` if it exists, else the Hub.

    With `streaming`, rows are read as they are needed (those of a `save_to_disk` copy are, anyway). A split with
    another usual name ("dev") is returned as the one it stands for ("validation").

    Raises:
        ConnectionError: If the Hub cannot be reached.
        ValueError: If there is no training split, it is empty, or two names stand for one split.
    """
    import datasets
    from huggingface_hub import constants

    folder = Path(path)
    require_hub_name(path)
    if folder.is_file():
        raise ValueError(f'path must be a folder or a dataset of the Hub, got the file {path}: set source="files".')
    loaded: Any
    if (folder / "dataset_dict.json").is_file():
        saved = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        loaded = {split: _load_saved(folder / split) for split in saved}
    elif (folder / "state.json").is_file():
        loaded = {"train": _load_saved(folder)}
    else:
        try:
            if not folder.is_dir() and not constants.HF_HUB_OFFLINE and not hub_is_reachable():
                raise ConnectionError("no answer")
            with dataset_errors(path):
                if folder.is_dir() and datasets.get_dataset_config_names(path) == ["default"]:
                    name = None  # files of one configuration, without the card that names it
                files = local_parquet(path, name) if streaming and folder.is_dir() else {}
                loaded = files or datasets.load_dataset(path, name, streaming=streaming)
        except ConnectionError as error:
            raise ConnectionError(
                f"cannot fetch the dataset {path} from the Hub ({error}): set path=FOLDER with its parquet files or "
                "its save_to_disk copy, set HF_HUB_OFFLINE=1 if it was downloaded before, or use the embedded data, "
                "which needs no network."
            ) from None
    splits = dict(loaded)
    for split in SPLITS:
        if split not in splits and (names := [name for name in loaded if split_of(name) == split]):
            if len(names) > 1:
                raise ValueError(
                    f"{path} has several splits for {split} ({', '.join(names)}): save a copy with one of them by "
                    "save_to_disk, and use its folder as path."
                )
            splits[split] = splits.pop(names[0])
    if "train" not in splits:
        raise ValueError(
            f'{path} has the splits {sorted(loaded)}, "train" is not among them: save a copy with that name by '
            "save_to_disk, and use its folder as path."
        )
    if hasattr(splits["train"], "__len__") and not len(splits["train"]):
        raise ValueError(f"the training split of {path} has no rows: use a dataset with rows.")
    return splits


def local_parquet(path: str, name: str | None) -> dict[str, ParquetRows]:
    """The splits of a folder whose files are all parquet, else nothing."""
    import datasets

    files = datasets.load_dataset_builder(path, name).config.data_files or {}
    is_parquet = all(str(file).endswith(".parquet") for names in files.values() for file in names)
    return {str(split): ParquetRows(list(names)) for split, names in files.items()} if is_parquet else {}


@contextmanager
def dataset_errors(path: str) -> Iterator[None]:
    """Report errors of reading a dataset in one line."""
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"cannot read the dataset {path} ({reason}): check its files and dataset_name.") from None


def _load_saved(folder: Path) -> Any:
    import datasets

    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if not state["_data_files"]:  # without rows, which the library saves but cannot load
        return datasets.Dataset.from_dict({})
    return datasets.Dataset.load_from_disk(str(folder))
