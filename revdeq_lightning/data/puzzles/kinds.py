"""The kinds of puzzles: how one is made, what its symbols are, what is wrong with it, what solves it."""

from abc import abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX

Array = NDArray[np.int64]


class Puzzle(NamedTuple):
    """Symbols of the cells, and the answer in each; int64 arrays of one shape, `(length,)` or `(height, width)`."""

    inputs: Array
    targets: Array


class AbstractKind:
    """A kind of puzzle. Symbols and answers are numbered from 0."""

    num_symbols: int
    num_answers: int
    solution: str
    """What the answers of a puzzle must be."""

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

    @abstractmethod
    def is_solved(self, inputs: Array, answers: Array) -> bool:
        """Whether the answers are a solution; a puzzle may have several."""


class PrefixSums(AbstractKind):
    """Strings of bits; the answer is the parity of each prefix. The size is the number of bits."""

    num_symbols, num_answers = 2, 2
    solution = "the parity of all bits up to each one"

    def make(self, draws: Draws, size: int) -> Puzzle:
        bits = draws.integers(2, size)
        return Puzzle(bits, np.cumsum(bits) % 2)

    def is_solved(self, inputs: Array, answers: Array) -> bool:
        return np.array_equal(answers, np.cumsum(inputs) % 2)

    def shape(self, size: int) -> tuple[int, ...]:
        return (size,)


def checked(
    kind: AbstractKind, arrays: tuple[Array, Array], path: str, *, use_targets: bool = True
) -> tuple[Array, Array]:
    """The puzzles of a file, if all are puzzles of this kind and their targets, where all cells count, solutions.

    Raises:
        ValueError: Names the first that is not.
    """
    inputs, targets = arrays
    ndim = 1 + len(kind.shape(1))
    if inputs.ndim != ndim:
        name = type(kind).__name__
        raise ValueError(f"{path}: inputs must have {ndim} dimensions for {name}, got shape {inputs.shape}")
    wrong_inputs = (inputs < 0) | (inputs >= kind.num_symbols)
    wrong_targets = ((targets < 0) | (targets >= kind.num_answers)) & (targets != IGNORE_INDEX)
    for name, array, wrong, number in (
        ("inputs", inputs, wrong_inputs, kind.num_symbols),
        ("targets", targets, wrong_targets, kind.num_answers),
    ):
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(f"{path}: {name} must be from 0 to {number - 1}, got {array[place]} at {list(place)}")
    for i, (puzzle, answers) in enumerate(zip(inputs, targets, strict=True)):
        if fault := kind.fault(puzzle):
            raise ValueError(f"{path}: puzzle {i} cannot be solved: {fault}")
        if use_targets and (answers != IGNORE_INDEX).all() and not kind.is_solved(puzzle, answers):
            raise ValueError(f"{path}: the targets of puzzle {i} are no solution, which is {kind.solution}")
    return arrays
