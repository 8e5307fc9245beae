"""Mazes on a grid of pixels: 0 wall, 1 free, 2 start, 3 goal; the answer is 1 on a shortest path, its ends included.

A maze of c x c cells has 2c + 1 pixels a side: cells at odd rows and columns, walls or openings between them.
"""

import functools

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, depth_first_order, minimum_spanning_tree

from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.puzzles.puzzle import Puzzle

ALGORITHMS = ("depth_first", "spanning_tree", "mixed")
WALL, FREE, START, GOAL = range(4)

Edges = tuple[NDArray[np.int64], NDArray[np.int64]]


def make_maze(draws: Draws, size: int, algorithm: str, loops: float) -> Puzzle:
    """A maze of `size` x `size` cells with a start and a goal, see `PuzzleDataModule` for `algorithm` and `loops`.

    "depth_first" is randomized depth-first search, "spanning_tree" the minimum spanning tree of random weights, as by
    Kruskal or Prim; "mixed" makes each in half of the mazes.
    """
    if algorithm == "mixed":
        algorithm = ALGORITHMS[int(draws.integers(2, 1)[0])]
    edges = _depth_first(draws, size) if algorithm == "depth_first" else _spanning_tree(draws, size)
    if loops:
        a, b = grid_edges(size)
        more = draws.uniform(len(a)) < loops
        edges = np.r_[edges[0], a[more]], np.r_[edges[1], b[more]]
    start, goal = draws.permutation(size * size)[:2]
    a, b = edges
    pixels = np.full((2 * size + 1, 2 * size + 1), WALL)
    pixels[1::2, 1::2] = FREE
    pixels[a // size + b // size + 1, a % size + b % size + 1] = FREE
    for cell, symbol in ((start, START), (goal, GOAL)):
        pixels[2 * (cell // size) + 1, 2 * (cell % size) + 1] = symbol
    path = shortest_path(pixels)
    assert path is not None
    return Puzzle(pixels, path)


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


def shortest_path(pixels: NDArray[np.int64]) -> NDArray[np.int64] | None:
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


def is_solution(pixels: NDArray[np.int64], path: NDArray[np.int64]) -> bool:
    """Whether what is marked is a shortest path from start to goal: any of them, where there are several."""
    marked = np.where(path == 1, pixels, WALL)
    if (
        np.count_nonzero(marked == START) != 1
        or np.count_nonzero(marked == GOAL) != 1
        or (path == 1)[pixels == WALL].any()
    ):
        return False
    shortest, through = shortest_path(pixels), shortest_path(marked)
    if through is None or shortest is None:
        return False
    return bool(shortest.sum() == through.sum() == np.count_nonzero(path == 1))
