"""Sudoku of 4 x 4, 6 x 6 and 9 x 9 cells with one solution: 0 is an empty cell.

No library was found that takes a seed, a size, and a number of empty cells.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.puzzles.kinds import AbstractKind, Array, Puzzle
from revdeq_lightning.equilibrium.validation import require_choice, require_count, require_in_range

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box, by the size of the grid."""


@dataclass
class Sudoku(AbstractKind):
    """Sudoku with one solution; symbols and answers 1 to size, 0 is an empty cell. The size is 4, 6 or 9."""

    size: int
    num_empty: int

    solution = "each value once in each row, column and box, with the given cells"

    def __post_init__(self) -> None:
        require_choice("size", self.size, BOXES)
        require_count("num_empty", self.num_empty)
        require_in_range("num_empty", self.num_empty, f"[1, {self.size**2})")
        self.num_symbols = self.num_answers = self.size + 1

    def make(self, draws: Draws, size: int) -> Puzzle | None:
        """Empty the cells of a random solution in random order, each if the solution stays the only one."""
        solution = next(solutions(np.zeros((size, size), np.int64), draws))
        puzzle = solution.copy()
        for cell in draws.permutation(size * size):
            row, column = divmod(int(cell), size)
            puzzle[row, column] = 0
            if len(list(islice(solutions(puzzle), 2))) > 1:
                puzzle[row, column] = solution[row, column]
            elif np.count_nonzero(puzzle == 0) == self.num_empty:
                return Puzzle(puzzle, solution)
        return None

    def shape(self, size: int) -> tuple[int, ...]:
        return (size, size)

    def key(self, inputs: Array) -> bytes:
        """How many given cells there are where, and of which values: the same for all symmetric forms."""
        size = len(inputs)
        given, (rows, columns) = inputs > 0, BOXES[size]
        boxes = given.reshape(size // rows, rows, size // columns, columns)
        lines = [
            sorted(sorted(band) for band in given.sum(1).reshape(-1, rows).tolist()),
            sorted(sorted(stack) for stack in given.sum(0).reshape(-1, columns).tolist()),
        ]
        values = sorted(np.bincount(inputs.ravel(), minlength=size + 1)[1:].tolist())
        counts = [*(sorted(lines) if rows == columns else lines), sorted(boxes.sum((1, 3)).ravel().tolist()), values]
        return repr(counts).encode()

    def vary(self, puzzle: Puzzle, draws: Draws) -> Puzzle:
        """Rename the values, permute rows and columns within and among boxes, or transpose."""
        size = len(puzzle.inputs)
        rows, columns = BOXES[size]
        values = np.r_[0, draws.permutation(size) + 1]
        order = [_lines(draws, size, rows), _lines(draws, size, columns)]
        arrays = [values[array[order[0]][:, order[1]]] for array in puzzle]
        if rows == columns and draws.integers(2, 1)[0]:
            arrays = [array.T for array in arrays]
        return Puzzle(*arrays)

    def fault(self, inputs: Array) -> str | None:
        if inputs.shape != self.shape(self.size):
            return f"a Sudoku of size {self.size} has shape {self.shape(self.size)}, got {inputs.shape}"
        seen: set[tuple[int, int]] = set()
        cells = [*zip(np.ndindex(inputs.shape), inputs.ravel().tolist(), units_of(self.size), strict=True)]
        for (row, column), value, units in cells:
            for unit, name in zip(units, ("row", "column", "box"), strict=True):
                if value and (unit, value) in seen:
                    return f"{value} stands twice in the {name} of row {row + 1}, column {column + 1}"
                seen.add((unit, value))
        for (row, column), value, units in cells:
            if not value and all(any((unit, v) in seen for unit in units) for v in range(1, self.size + 1)):
                return f"no value is possible in row {row + 1}, column {column + 1}"
        return None

    def is_solved(self, inputs: Array, answers: Array) -> bool:
        size, (rows, columns) = self.size, BOXES[self.size]
        boxes = answers.reshape(size // rows, rows, size // columns, columns).swapaxes(1, 2).reshape(size, size)
        units = np.sort([answers, answers.T, boxes])
        return bool((units == np.arange(1, size + 1)).all() and (answers == inputs)[inputs > 0].all())


@functools.cache
def units_of(size: int) -> list[tuple[int, int, int]]:
    """Row, column and box of each cell, as indices into one list of 3 * size units."""
    rows, columns = BOXES[size]
    return [
        (r, size + c, 2 * size + r // rows * (size // columns) + c // columns) for r in range(size) for c in range(size)
    ]


def solutions(puzzle: Array, draws: Draws | None = None) -> Iterator[Any]:
    """Yield all solutions, in random order with `draws`; none if the puzzle contradicts itself."""
    size = len(puzzle)
    units, grid = units_of(size), puzzle.ravel().tolist()
    free = [(1 << size) - 1] * (3 * size)  # values that each unit still lacks, as bits
    for cell, value in enumerate(grid):
        if value:
            bit = 1 << (value - 1)
            if any(not free[unit] & bit for unit in units[cell]):
                return
            for unit in units[cell]:
                free[unit] -= bit
    empty = [cell for cell, value in enumerate(grid) if not value]

    def search() -> Iterator[None]:
        if not empty:
            yield
            return
        best, fewest, choices = 0, size + 1, 0
        for place, cell in enumerate(empty):
            a, b, c = units[cell]
            mask = free[a] & free[b] & free[c]
            if (count := mask.bit_count()) < fewest:
                best, fewest, choices = place, count, mask
                if count < 2:
                    break
        cell = empty.pop(best)
        values = [v for v in range(size) if choices >> v & 1]
        if draws is not None and len(values) > 1:
            values = [values[i] for i in draws.permutation(len(values))]
        for value in values:
            grid[cell] = value + 1
            for unit in units[cell]:
                free[unit] -= 1 << value
            yield from search()
            for unit in units[cell]:
                free[unit] += 1 << value
        grid[cell] = 0
        empty.insert(best, cell)

    for _ in search():
        yield np.array(grid).reshape(size, size)


def _lines(draws: Draws, size: int, per_box: int) -> Array:
    bands = draws.permutation(size // per_box)
    return np.concatenate([band * per_box + draws.permutation(per_box) for band in bands])
