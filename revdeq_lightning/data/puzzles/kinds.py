"""The kinds of puzzles: how one is made, what its symbols are, what is wrong with it, what solves it."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.data.puzzles import mazes, sudoku
from revdeq_lightning.data.puzzles.puzzle import Puzzle
from revdeq_lightning.equilibrium.validation import require_choice, require_count, require_in_range

Array = NDArray[np.int64]


class AbstractKind:
    """A kind of puzzle. Symbols and answers are numbered from 0."""

    num_symbols: int
    num_answers: int
    ndim: ClassVar[int]

    @abstractmethod
    def make(self, draws: Draws, size: int) -> Puzzle | None:
        """A puzzle of this size; None if these draws give none."""

    @abstractmethod
    def shape(self, size: int) -> tuple[int, ...]:
        """Shape of a puzzle of this size."""

    def key(self, inputs: Array) -> bytes:
        """What decides to which split a puzzle belongs: equal for symmetric forms of one puzzle."""
        return inputs.astype(np.uint8).tobytes()

    def vary(self, puzzle: Puzzle, draws: Draws) -> Puzzle:
        """The puzzle in another of its symmetric forms, for training."""
        return puzzle

    def fault(self, inputs: Array) -> str | None:
        """What is wrong with a puzzle whose symbols are in range."""
        return None

    def is_solved(self, inputs: Array, answers: Array) -> bool:
        """Whether answers that differ from the targets are a solution, too."""
        return False


class PrefixSums(AbstractKind):
    """Strings of bits; the answer is the parity of each prefix. The size is the number of bits."""

    num_symbols, num_answers, ndim = 2, 2, 1

    def make(self, draws: Draws, size: int) -> Puzzle:
        bits = draws.integers(2, size)
        return Puzzle(bits, np.cumsum(bits) % 2)

    def shape(self, size: int) -> tuple[int, ...]:
        return (size,)


@dataclass
class Mazes(AbstractKind):
    """Mazes, see `make_maze`. The size is the number of cells a side."""

    algorithm: str
    loops: float

    num_symbols, num_answers, ndim = 4, 2, 2

    def __post_init__(self) -> None:
        require_choice("algorithm", self.algorithm, mazes.ALGORITHMS)
        require_in_range("loops", self.loops, "[0, 1]")

    def make(self, draws: Draws, size: int) -> Puzzle:
        return mazes.make_maze(draws, size, self.algorithm, self.loops)

    def shape(self, size: int) -> tuple[int, ...]:
        return (2 * size + 1, 2 * size + 1)

    def fault(self, inputs: Array) -> str | None:
        for symbol, name in ((mazes.START, "start"), (mazes.GOAL, "goal")):
            if (count := np.count_nonzero(inputs == symbol)) != 1:
                return f"a maze must have one {name} (symbol {symbol}), got {count}"
        return "there is no path from start to goal" if mazes.shortest_path(inputs) is None else None

    def is_solved(self, inputs: Array, answers: Array) -> bool:
        return mazes.is_solution(inputs, answers)


@dataclass
class Sudoku(AbstractKind):
    """Sudoku with one solution; symbols and answers 1 to size, 0 is an empty cell. The size is 4, 6 or 9."""

    size: int
    num_empty: int

    ndim = 2

    def __post_init__(self) -> None:
        require_choice("size", self.size, sudoku.BOXES)
        require_count("num_empty", self.num_empty)
        require_in_range("num_empty", self.num_empty, f"[1, {self.size**2})")
        self.num_symbols = self.num_answers = self.size + 1

    def make(self, draws: Draws, size: int) -> Puzzle | None:
        return sudoku.make_sudoku(draws, size, self.num_empty)

    def shape(self, size: int) -> tuple[int, ...]:
        return (size, size)

    def key(self, inputs: Array) -> bytes:
        return sudoku.invariant(inputs)

    def vary(self, puzzle: Puzzle, draws: Draws) -> Puzzle:
        return sudoku.symmetric(puzzle, draws)

    def fault(self, inputs: Array) -> str | None:
        if inputs.shape != self.shape(self.size):
            return f"a Sudoku of size {self.size} has shape {self.shape(self.size)}, got {inputs.shape}"
        return sudoku.contradiction(inputs)


def checked(kind: AbstractKind, arrays: tuple[Array, Array], path: str) -> tuple[Array, Array]:
    """The puzzles of a file, if all are puzzles of this kind.

    Raises:
        ValueError: Names the first that is not.
    """
    inputs, targets = arrays
    if inputs.ndim != kind.ndim + 1:
        raise ValueError(
            f"{path}: inputs must have {kind.ndim + 1} dimensions for {type(kind).__name__}, got shape {inputs.shape}"
        )
    for name, array, number in (("inputs", inputs, kind.num_symbols), ("targets", targets, kind.num_answers)):
        wrong = (array < 0) | (array >= number)
        if name == "targets":
            wrong &= array != IGNORE_INDEX
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(f"{path}: {name} must be from 0 to {number - 1}, got {array[place]} at {list(place)}")
    for i, puzzle in enumerate(inputs):
        if fault := kind.fault(puzzle):
            raise ValueError(f"{path}: puzzle {i} cannot be solved: {fault}")
    return arrays
