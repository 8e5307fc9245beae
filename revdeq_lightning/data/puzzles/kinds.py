"""The kinds of puzzles: how one is made, what its symbols are, what is wrong with it, what solves it."""

import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, depth_first_order, minimum_spanning_tree

from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.equilibrium.validation import require_choice, require_count, require_in_range

Array = NDArray[np.int64]
Edges = tuple[Array, Array]

ALGORITHMS = ("depth_first", "spanning_tree", "mixed")
WALL, FREE, START, GOAL = range(4)
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box, by the size of the grid."""


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


@dataclass
class Mazes(AbstractKind):
    """Mazes of pixels: 0 wall, 1 free, 2 start, 3 goal; the answer is 1 on a shortest path, its ends included.

    A maze of c x c cells, its size, has 2c + 1 pixels a side: cells at odd rows and columns, walls or openings between.

    Attributes:
        algorithm: "depth_first" (randomized depth-first search: long corridors), "spanning_tree" (minimum spanning tree
            of random weights, as by Kruskal or Prim: many short dead ends), or "mixed": each in half of the mazes.
        loops: Fraction of the walls between cells that are opened in addition; 0: one path between any two cells.
    """

    algorithm: str
    loops: float

    num_symbols, num_answers = 4, 2
    solution = "1 on a shortest path from start to goal, both included, and 0 elsewhere"

    def __post_init__(self) -> None:
        require_choice("algorithm", self.algorithm, ALGORITHMS)
        require_in_range("loops", self.loops, "[0, 1]")

    def make(self, draws: Draws, size: int) -> Puzzle:
        algorithm = self.algorithm
        if algorithm == "mixed":
            algorithm = ALGORITHMS[int(draws.integers(2, 1)[0])]
        a, b = _depth_first(draws, size) if algorithm == "depth_first" else _spanning_tree(draws, size)
        if self.loops:
            others = grid_edges(size)
            more = draws.uniform(len(others[0])) < self.loops
            a, b = np.r_[a, others[0][more]], np.r_[b, others[1][more]]
        start, goal = draws.permutation(size * size)[:2]
        pixels = np.full((2 * size + 1, 2 * size + 1), WALL)
        pixels[1::2, 1::2] = FREE
        pixels[a // size + b // size + 1, a % size + b % size + 1] = FREE
        for cell, symbol in ((start, START), (goal, GOAL)):
            pixels[2 * (cell // size) + 1, 2 * (cell % size) + 1] = symbol
        path = shortest_path(pixels)
        assert path is not None
        return Puzzle(pixels, path)

    def shape(self, size: int) -> tuple[int, ...]:
        return (2 * size + 1, 2 * size + 1)

    def fault(self, inputs: Array) -> str | None:
        for symbol, name in ((START, "start"), (GOAL, "goal")):
            if (count := np.count_nonzero(inputs == symbol)) != 1:
                return f"a maze must have one {name} (symbol {symbol}), got {count}"
        return "there is no path from start to goal" if shortest_path(inputs) is None else None

    def is_solved(self, inputs: Array, answers: Array) -> bool:
        path = answers == 1
        marked = np.where(path, inputs, WALL)
        if path[inputs == WALL].any() or any(np.count_nonzero(marked == symbol) != 1 for symbol in (START, GOAL)):
            return False
        shortest, through = shortest_path(inputs), shortest_path(marked)
        if through is None or shortest is None:
            return False
        return bool(shortest.sum() == through.sum() == np.count_nonzero(path))


@functools.cache
def grid_edges(size: int) -> Edges:
    """Pairs of neighbors among the cells `0 ... size * size - 1`."""
    cells = np.arange(size * size).reshape(size, size)
    pairs = (cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])
    return np.r_[pairs[0][0].ravel(), pairs[1][0].ravel()], np.r_[pairs[0][1].ravel(), pairs[1][1].ravel()]


def _graph(edges: Edges, num_nodes: int) -> csr_array:
    (a, b), ones = edges, np.ones(2 * len(edges[0]), np.int8)
    graph = csr_array((ones, (np.r_[a, b], np.r_[b, a])), shape=(num_nodes, num_nodes))
    graph.sort_indices()
    return graph


def _depth_first(draws: Draws, size: int) -> Edges:
    # The search takes the neighbor with the lowest number first, so the cells get random numbers.
    number = draws.permutation(size * size)
    cell = np.argsort(number)
    a, b = grid_edges(size)
    order, before = depth_first_order(_graph((number[a], number[b]), size * size), 0)
    return cell[order[1:]], cell[before[order[1:]]]


def _spanning_tree(draws: Draws, size: int) -> Edges:
    a, b = grid_edges(size)
    tree = minimum_spanning_tree(csr_array((draws.uniform(len(a)), (a, b)), shape=(size * size, size * size))).tocoo()
    return tree.row.astype(np.int64), tree.col.astype(np.int64)


def shortest_path(pixels: Array) -> Array | None:
    """1 on a shortest path from start to goal through what is no wall, 0 elsewhere; None if there is no path."""
    height, width = pixels.shape
    nodes = np.arange(height * width).reshape(height, width)
    is_open = pixels != WALL
    across, down = is_open[:, :-1] & is_open[:, 1:], is_open[:-1] & is_open[1:]
    a, b = np.r_[nodes[:, :-1][across], nodes[:-1][down]], np.r_[nodes[:, 1:][across], nodes[1:][down]]
    (start,), (goal,) = np.flatnonzero(pixels == START), np.flatnonzero(pixels == GOAL)
    _, before = breadth_first_order(_graph((a, b), height * width), start)
    path = np.zeros(height * width, np.int64)
    path[start] = 1
    node = goal
    while node != start:
        if node < 0:
            return None
        path[node] = 1
        node = before[node]
    return path.reshape(height, width)


@dataclass
class Sudoku(AbstractKind):
    """Sudoku with one solution; symbols and answers 1 to size, 0 is an empty cell. The size is 4, 6 or 9.

    No library was found that takes a seed, a size, and a number of empty cells.
    """

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
        arrays = [array[order[0]][:, order[1]] for array in puzzle]
        arrays = [np.where(array < 0, array, values[array.clip(0)]) for array in arrays]  # -100 does not count
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


def checked(
    kind: AbstractKind, arrays: tuple[Array, Array], path: str, *, use_targets: bool = True
) -> tuple[Array, Array]:
    """The puzzles of a file, if all are puzzles of this kind and their targets, where all cells count, solutions.

    Otherwise, ValueError names the first that is not.
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
        if use_targets and (answers == IGNORE_INDEX).all():
            raise ValueError(f"{path}: no target of puzzle {i} counts, all are {IGNORE_INDEX}: remove the puzzle")
        if use_targets and (answers != IGNORE_INDEX).all() and not kind.is_solved(puzzle, answers):
            raise ValueError(f"{path}: the targets of puzzle {i} are no solution, which is {kind.solution}")
    return arrays
