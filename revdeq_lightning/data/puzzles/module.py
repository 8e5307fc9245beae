"""Puzzles for reasoners: generated from a seed, or from a file, in a resumable order."""

import csv
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from revdeq_lightning.data.loading.array_cache import ArrayWriter, load_or_build
from revdeq_lightning.data.loading.base import AbstractDataModule, check_fractions, digest
from revdeq_lightning.data.loading.draws import Draws, shuffled_keys
from revdeq_lightning.data.loading.files import SPLITS, hub_file, require_hub_name, split_of
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX, PADDING, ResumableLoader
from revdeq_lightning.data.puzzles.kinds import AbstractKind, Mazes, PrefixSums, Puzzle, Sudoku, checked
from revdeq_lightning.equilibrium.validation import require_choice, require_count

KIND_SETTINGS = ("puzzle", "size", "algorithm", "loops", "num_empty")
KINDS = ("prefix_sums", "mazes", "sudoku")
ENDLESS_EPOCH = 2**16
_CACHE_FORMAT = 2
_MOST_TRIES = 1000

Arrays = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Inputs and targets of several puzzles, of one shape: `(puzzles, length)` or `(puzzles, height, width)`."""


class PuzzleBatch(NamedTuple):
    """Symbols and answers of some puzzles of one shape, int64 `(batch, ...)`; targets of -100 do not count."""

    inputs: Tensor
    targets: Tensor


class Puzzles(Dataset[PuzzleBatch]):
    """Puzzles by their keys: `make(key)`; `PADDING` is a puzzle whose targets do not count."""

    def __init__(self, make: Callable[[int], Puzzle]) -> None:
        self.make = make

    def __getitem__(self, keys: list[int]) -> PuzzleBatch:
        inputs, targets = (np.stack(arrays) for arrays in zip(*(self.make(max(0, key)) for key in keys), strict=True))
        targets[np.array(keys) == PADDING] = IGNORE_INDEX
        return PuzzleBatch(torch.from_numpy(inputs), torch.from_numpy(targets))


class PuzzleDataModule(AbstractDataModule):
    """Puzzles whose solution takes many sequential steps, as `PuzzleBatch`.

    A generated puzzle is a pure function of seed, split, size and number. No puzzle of the training size is in two
    splits, nor are two Sudokus that differ by a symmetry. A run resumed from any checkpoint continues with the batch
    after the last trained one.

    Args:
        puzzle: "prefix_sums" (the parity of each prefix of a string of bits), "mazes" (the shortest path; symbols: 0
            wall, 1 free, 2 start, 3 goal) or "sudoku" (one solution; 0 is an empty cell).
        size: Bits, cells a side of a maze (2 * size + 1 pixels), or 4, 6 or 9 for Sudoku.
        test_sizes: Further sizes, each a test split of its own.
        num_train: Puzzles of the training split; null: each is used once, and an epoch has 65,536. Of a data set, at
            most as many are used; of an archive, all.
        num_validation: Puzzles of the validation split; of files, `validation_fraction` decides.
        num_test: Puzzles of the test split of each size; of a data set, at most as many; of an archive, all.
        symmetries: Sudoku: show a training puzzle in another of its symmetric forms in each epoch.
        algorithm: Mazes: "depth_first" (long corridors), "spanning_tree" (many short dead ends) or "mixed".
        loops: Mazes: fraction of the walls between cells that are opened in addition; 0: one path between two cells.
        num_empty: Sudoku: empty cells.
        path: An npz archive with the integer arrays `inputs` and `targets` of shape `(N, L)` or `(N, H, W)` instead of
            generated puzzles (targets of -100 do not count); for Sudoku of size 9 also a data set of the hub with the
            columns `question` and `answer` (`sapientinc/sudoku-extreme`), or a folder with its CSV files.
        validation_fraction: With `path`, the fraction held out for validation, chosen by the puzzles' content.
        test_fraction: Likewise for test, of an archive without `test_path`.
        test_path: An archive, all of which is the test split, instead of `test_sizes` and `num_test`.
        batch_size: Puzzles per rank and step.
        num_workers: Processes per rank that load batches.
        seed: Of puzzles and order, not negative.
        cache_dir: Folder of the generated puzzles.

    Raises:
        ValueError: If an argument is out of range, or a puzzle of a file is not one.
        FileNotFoundError, ConnectionError: If a file cannot be found.
    """

    _items = "puzzles"

    def __init__(
        self,
        puzzle: str = "mazes",
        size: int = 5,
        test_sizes: list[int] | None = None,
        num_train: int | None = None,
        num_validation: int = 200,
        num_test: int = 200,
        symmetries: bool = False,
        algorithm: str = "mixed",
        loops: float = 0.0,
        num_empty: int = 22,
        path: str | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        test_path: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = "data/cache",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        require_choice("puzzle", puzzle, KINDS)
        self._require_counts("num_validation", "num_test", optional=["num_train"])
        least, advice = (2, "a maze has a start and a goal") if puzzle == "mazes" else (1, "")
        for name, value in (("size", size), *(("test_sizes", test_size) for test_size in test_sizes or ())):
            require_count(name, value, at_least=least, advice=advice)
        check_fractions(validation_fraction, test_fraction)
        if puzzle == "sudoku" and test_sizes:
            raise ValueError(f"a Sudoku has one size, got test_sizes={test_sizes}: remove it")
        for needed, names in (("mazes", ("algorithm", "loops")), ("sudoku", ("num_empty", "symmetries"))):
            if puzzle != needed:
                self._refuse_unused(f"puzzle={needed!r}", *names)
        if path is None:
            self._refuse_unused("path", "validation_fraction", "test_fraction")
            if num_train is None:
                self._refuse_unused("num_train (each puzzle is used once)", "symmetries")
        self.kind = build_kind(**self.kind_settings())
        self._data: dict[str, list[Arrays]] | None = None
        self._checksum = ""

    @property
    def num_symbols(self) -> int:
        """Symbols that a cell may hold."""
        return self.kind.num_symbols

    @property
    def num_answers(self) -> int:
        """Answers that a cell may have."""
        return self.kind.num_answers

    @property
    def shape(self) -> list[int]:
        """Shape of a training puzzle. Reads the file if there is one."""
        if self.hparams["path"] is None:
            return list(self.kind.shape(self.hparams["size"]))
        ((inputs, _), *_) = next(iter(self._prepared().values()))
        return list(inputs.shape[1:])

    @property
    def test_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the puzzles of each test split. Prepares the data if necessary."""
        return [arrays[0].shape[1:] for arrays in self._prepared().get("test", [])]

    def found(self) -> dict[str, Any]:
        sizes = {split: sum(len(inputs) for inputs, _ in arrays) for split, arrays in self._by_split().items()}
        return {"puzzles": {split: sizes[split] or ENDLESS_EPOCH for split in self.splits}}

    def kind_settings(self) -> dict[str, Any]:
        """What `build_kind` needs; plain containers."""
        return {name: self.hparams[name] for name in KIND_SETTINGS}

    def train_dataloader(self) -> ResumableLoader:
        num_train, seed = ENDLESS_EPOCH, self.hparams["seed"]
        if self.hparams["path"] is None and self.hparams["num_train"] is None:
            make: Any = partial(make_puzzle, self.kind, seed, "train", self.hparams["size"])
        else:
            (arrays,) = self._of_split(self._prepared(), "train", "lower the fractions")
            num_train = len(arrays[0])
            make = partial(stored_puzzle, arrays, self.kind if self.hparams["symmetries"] else None, seed)
        return self._training_loader(Puzzles(make), num_train, partial(shuffled_keys, num_train, seed))

    def test_dataloader(self) -> Any:
        """One loader for each size."""
        return self._evaluation_loaders("test")

    def _evaluation_loader(self, split: str) -> ResumableLoader:
        return self._evaluation_loaders(split)[0]

    def _evaluation_loaders(self, split: str) -> list[ResumableLoader]:
        advice = f"raise {split}_fraction" + (", or set test_path to a file of puzzles" if split == "test" else "")
        found = self._of_split(self._prepared(), split, advice)
        return [
            self._loader(f"{split} {i}", Puzzles(partial(stored_puzzle, arrays, None, 0)), len(arrays[0]))
            for i, arrays in enumerate(found)
        ]

    def _by_split(self) -> Mapping[str, Any]:
        there = self._prepared()
        return there if self.hparams["path"] is not None else {"train": []} | there

    def _prepared(self) -> dict[str, list[Arrays]]:
        if self._data is None:
            hparams, path = self.hparams, self.hparams["path"]
            data = self._generated() if path is None else self._from_file(path)
            if hparams["test_path"] is not None:
                data["test"] = [checked(self.kind, read_npz(hparams["test_path"]), hparams["test_path"])]
            train = data.get("train", [])
            if "test" in data and (path or hparams["test_path"]):
                own, tested = (
                    [hash(puzzle.tobytes()) for inputs, _ in arrays for puzzle in inputs.astype(np.uint8)]
                    for arrays in (train, data["test"])
                )
                if shared := np.isin(tested, own).sum():
                    rank_zero_warn(f"{shared} of {len(tested)} test puzzles are also training puzzles")
            self._checksum = f"{zlib.crc32(b''.join(a.tobytes() for arrays in train for a in arrays)):08x}"
            self._data = data
        return self._data

    def _generated(self) -> dict[str, list[Arrays]]:
        hparams = self.hparams
        size = hparams["size"]
        wanted = {("validation", size): hparams["num_validation"]}
        if hparams["test_path"] is None:
            wanted |= {("test", s): hparams["num_test"] for s in (size, *(hparams["test_sizes"] or ()))}
        if hparams["num_train"] is not None:
            wanted["train", size] = hparams["num_train"]
        data: dict[str, list[Arrays]] = {}
        for (split, split_size), number in wanted.items():
            key = digest([_CACHE_FORMAT, self.kind_settings(), hparams["seed"], split, split_size, number])
            path = Path(hparams["cache_dir"], f"{hparams['puzzle']}-{split_size}-{split}-{key}.arrays")
            make = partial(make_puzzle, self.kind, hparams["seed"], split, split_size, train_size=size)
            arrays = load_or_build(path, partial(_make_all, make, number, path)).arrays
            data.setdefault(split, []).append((arrays["inputs"].array, arrays["targets"].array))
        return data

    def _from_file(self, path: str) -> dict[str, list[Arrays]]:
        if path.endswith(".npz"):
            splits = ("validation", "test") if self.hparams["test_path"] is None else ("validation",)
            fractions = {split: self.hparams[f"{split}_fraction"] for split in splits}
            return divide(self.kind, checked(self.kind, read_npz(path), path), fractions)
        if self.hparams["puzzle"] != "sudoku" or self.hparams["size"] != 9:
            raise ValueError(f"path must be an npz archive (or, for Sudoku of size 9, a data set), got {path!r}")
        held_out, num_train = self.hparams["validation_fraction"], self.hparams["num_train"]
        most = {"train": num_train and math.ceil(num_train / (1 - held_out)), "test": self.hparams["num_test"]}
        tables = read_sudoku_tables(path, most)
        data = divide(self.kind, checked(self.kind, tables["train"], path), {"validation": held_out})
        if "train" in data:  # the held out fraction is drawn, so that a few more may be left
            data["train"] = [(inputs[:num_train], targets[:num_train]) for inputs, targets in data["train"]]
        if "test" in tables:
            data["test"] = [checked(self.kind, tables["test"], path)]
        return data

    def _order_settings(self) -> dict[str, Any]:
        names = ("seed", *KIND_SETTINGS, "num_train", "symmetries")
        self._prepared()
        return {name: self.hparams[name] for name in names} | {"puzzles_checksum": self._checksum}


def build_kind(puzzle: str, *, size: int, algorithm: str, loops: float, num_empty: int) -> AbstractKind:
    """The kind that the settings describe."""
    if puzzle == "mazes":
        return Mazes(algorithm, loops)
    return Sudoku(size, num_empty) if puzzle == "sudoku" else PrefixSums()


def make_puzzle(
    kind: AbstractKind, seed: int, split: str, size: int, number: int, train_size: int | None = None
) -> Puzzle:
    """Make puzzle `number` (from 0) of a split: the first one drawn whose content belongs to the split.

    If the training puzzles have another size, `train_size`, all puzzles of this size belong to the split.
    """
    may_be_shared = train_size in (None, size)
    for attempt in range(_MOST_TRIES):
        puzzle = kind.make(Draws(seed, SPLITS.index(split), size, number, attempt), size)
        if puzzle and (not may_be_shared or _split_of_puzzle(kind, puzzle.inputs) == split):
            return puzzle
    tried = f"{_MOST_TRIES} attempts gave no puzzle of size {size} for the {split} split"
    raise ValueError(f"{tried}: use a larger size, or fewer empty cells")


def _split_of_puzzle(kind: AbstractKind, inputs: NDArray[np.int64]) -> str:
    """The split of a generated puzzle, by its content: 80 % are for training."""
    bucket = zlib.crc32(kind.key(inputs)) % 10
    return SPLITS[0] if bucket < 8 else SPLITS[bucket - 7]


def _make_all(make: Callable[[int], Puzzle], number: int, path: Path, writer: ArrayWriter) -> dict[str, Any]:
    rank_zero_info(f"Making {number:,} puzzles for {path} (once) ...")
    puzzles = [make(i) for i in range(number)]
    for name in ("inputs", "targets"):
        writer.append(name, np.stack([getattr(puzzle, name) for puzzle in puzzles]).astype(np.uint8))
    return {}


def stored_puzzle(arrays: Arrays, kind: AbstractKind | None, seed: int, key: int) -> Puzzle:
    """A puzzle of an array; with a kind, in the symmetric form of this epoch."""
    inputs, targets = (array[key % len(array)].astype(np.int64) for array in arrays)
    puzzle = Puzzle(inputs, targets)
    return puzzle if kind is None else kind.vary(puzzle, Draws(seed, len(SPLITS), key))


def divide(kind: AbstractKind, arrays: Arrays, fractions: Mapping[str, float]) -> dict[str, list[Arrays]]:
    """Hold out fractions of the puzzles, chosen by their content."""
    inputs, targets = arrays
    places = np.array([zlib.crc32(kind.key(puzzle)) / 2**32 for puzzle in inputs])
    parts = np.searchsorted(np.cumsum(list(fractions.values())), places, side="right")
    chosen = {split: parts == i for i, split in enumerate((*fractions, "train"))}
    return {split: [(inputs[mask], targets[mask])] for split, mask in chosen.items() if mask.any()}


def read_npz(path: str | Path, *, need_targets: bool = True) -> Arrays:
    """Read the integer arrays `inputs` and `targets` of an archive; without targets, some that do not count."""
    wanted = ("inputs", "targets")[: 1 + need_targets]
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: use an npz archive with the integer arrays inputs and targets")
    try:
        with zipfile.ZipFile(path), np.load(path) as archive:
            there = sorted(archive.files)
            arrays = {name: archive[name] for name in wanted if name in there}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an npz archive: {' '.join(str(error).split())}") from None
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(
            f"{path} has no array {missing[0]!r} (it has {', '.join(there) or 'none'}): save it by numpy.savez(FILE, "
            f"{', '.join(f'{name}=...' for name in wanted)})"
        )
    inputs = arrays["inputs"]
    targets = arrays.get("targets", np.full(inputs.shape, IGNORE_INDEX))
    for name, array in (("inputs", inputs), ("targets", targets)):
        if array.dtype.kind not in "iub":
            raise ValueError(f"{path}: {name} must be integers, got {array.dtype}")
    if inputs.ndim not in (2, 3) or 0 in inputs.shape:
        raise ValueError(f"{path}: inputs must have shape (N, L) or (N, H, W), no size 0, got {inputs.shape}")
    if targets.shape != inputs.shape:
        raise ValueError(f"{path}: targets must have the shape of inputs, {inputs.shape}, got {targets.shape}")
    return inputs.astype(np.int64), targets.astype(np.int64)


def read_sudoku_tables(path: str, most: Mapping[str, int | None]) -> dict[str, Arrays]:
    """Read the splits of a data set with columns `question` and `answer` of 81 characters, digits or empty cells.

    `path` is one of the hub, such as `sapientinc/sudoku-extreme`, or a folder with its `train.csv` and `test.csv`;
    `most` is the number of rows to read of each split, None: all.
    """
    require_hub_name(path)
    files = {split: _table(path, split) for split in ("train", "test")}
    if files["train"] is None:
        raise FileNotFoundError(f"{path} has no train.csv with the columns question and answer")
    return {split: _read_table(file, most[split]) for split, file in files.items() if file is not None}


def _table(path: str, split: str) -> Path | None:
    name, folder = f"{split}.csv", Path(path)
    if folder.is_dir():
        tables = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".csv")
        return next((file for file in tables if split_of(file.stem) == split), None)
    return hub_file(path, name, "set path=FOLDER with its train.csv and test.csv", "dataset")


def _read_table(path: Path, most: int | None) -> Arrays:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Not by `datasets`, which takes the answers for integers.
            reader = csv.DictReader(file)
            missing = [column for column in ("question", "answer") if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}, it has {', '.join(reader.fieldnames or ())}")
            rows = [(row["question"] or "", row["answer"] or "") for row in islice(reader, most)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table in UTF-8 ({error}): save it as CSV in UTF-8") from None
    if not rows:
        raise ValueError(f"{path} has no puzzles")
    questions, answers = zip(*rows, strict=True)
    return _digits(path, questions), _digits(path, answers)


def _digits(path: Path, texts: Sequence[str]) -> NDArray[np.int64]:
    wrong = next((text for text in texts if len(text) != 81), None)
    if wrong is not None:
        raise ValueError(f"{path}: a Sudoku must have 81 characters, got {wrong!r}")
    codes = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8).reshape(-1, 9, 9)
    return np.where((codes > ord("0")) & (codes <= ord("9")), codes - ord("0"), 0).astype(np.int64)
