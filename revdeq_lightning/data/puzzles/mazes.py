"""Mazes on a grid of pixels: 0 wall, 1 free, 2 start, 3 goal; the answer is 1 on a shortest path, its ends included.

A maze of c x c cells has 2c + 1 pixels a side: cells at odd rows and columns, walls or openings between them.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, depth_first_order, minimum_spanning_tree

from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.puzzles.kinds import AbstractKind, Array, Puzzle
from revdeq_lightning.equilibrium.validation import require_choice, require_in_range

ALGORITHMS = ("depth_first", "spanning_tree", "mixed")
WALL, FREE, START, GOAL = range(4)

Edges = tuple[Array, Array]


@dataclass
class Mazes(AbstractKind):
    """Mazes with a start and a goal. The size is the number of cells a side.

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
