"""Pictures of puzzles, and of an answer as it appears."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from revdeq_lightning.data.puzzles.kinds import BOXES
from revdeq_lightning.loggers.plots import saved_figure

COLORS = {
    "wall": (34, 40, 49),
    "free": (255, 255, 255),
    "start": (46, 160, 67),
    "goal": (215, 58, 73),
    "path": (88, 166, 255),
    "wrong": (255, 166, 0),
}


class SolvedPuzzle(NamedTuple):
    """A puzzle with a model's answers; targets of -100 do not count."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    answers: NDArray[np.int64]

    def is_wrong(self) -> NDArray[np.bool_]:
        """Whether each answer counts and is wrong."""
        wrong: NDArray[np.bool_] = (self.answers != self.targets) & (self.targets >= 0)
        return wrong


def maze_pixels(puzzle: SolvedPuzzle) -> NDArray[np.uint8]:
    """Colors of a maze with its answer, shape `(height, width, 3)`; wrong cells are orange."""
    symbols = np.array([COLORS[name] for name in ("wall", "free", "start", "goal")], np.uint8)
    pixels = symbols[puzzle.inputs]
    pixels[(puzzle.answers == 1) & (puzzle.inputs < 2)] = COLORS["path"]
    pixels[puzzle.is_wrong()] = COLORS["wrong"]
    return pixels


def draw_puzzles(
    puzzles: Sequence[SolvedPuzzle], path: Path, title: str, names: Sequence[str], *, are_mazes: bool
) -> None:
    """A sheet of puzzles, at least one: mazes, Sudokus, or strings of bits, with a name above each.

    Given digits and bits are black, answers blue; wrong cells are orange, and wrong digits and bits bold.
    """
    columns = min(4, len(puzzles))
    rows = -(-len(puzzles) // columns)
    with saved_figure(path, 3.2 * columns, 3.4 * rows, rows, columns) as axes:
        for axis, puzzle, name in zip(axes, puzzles, names, strict=False):
            draw_puzzle(axis, puzzle, are_mazes)
            axis.set_title(name, fontsize="small")
        for axis in axes:
            axis.set_axis_off()
        axes[0].figure.suptitle(title, fontsize="small")


def draw_puzzle(axis: Any, puzzle: SolvedPuzzle, is_maze: bool) -> None:
    """One puzzle into a Matplotlib axis."""
    if is_maze:
        axis.imshow(maze_pixels(puzzle), interpolation="nearest")
        return
    cells, given, wrong = puzzle.answers, puzzle.inputs > 0, puzzle.is_wrong()
    if cells.ndim == 1:  # a string, in lines: below each line of bits that of the answers; -1 fills the last ones
        width = min(16, len(cells))
        lines = (puzzle.inputs, cells, wrong)
        inputs, answers, wrong = (
            np.pad(line.astype(int), (0, -len(line) % width), constant_values=-1).reshape(-1, width) for line in lines
        )
        cells = np.stack([inputs, answers], 1).reshape(-1, width)
        given = np.arange(len(cells))[:, None] % 2 == np.zeros(width)
        wrong = np.stack([inputs * 0, wrong], 1).reshape(-1, width) > 0
    else:
        height, width = BOXES.get(len(cells), cells.shape)
        for draw, count, per_box in ((axis.axhline, len(cells), height), (axis.axvline, cells.shape[1], width)):
            for line in range(count + 1):
                draw(line - 0.5, color="black", linewidth=0.4 if line % per_box else 1.5)
    background = np.full((*cells.shape, 3), 255, np.uint8)
    background[wrong] = COLORS["wrong"]
    axis.imshow(background, interpolation="nearest")
    for row, column in np.argwhere(cells >= 0):
        color = "black" if given[row, column] else "tab:blue"
        weight = "bold" if wrong[row, column] else "normal"
        text = str(cells[row, column])
        axis.text(column, row, text, ha="center", va="center", color=color, fontweight=weight, fontsize="small")


def animate_maze(steps: Sequence[SolvedPuzzle], path: Path, *, side: int = 480) -> None:
    """A GIF animation of a maze's answer after more and more evaluations, about `side` pixels wide.

    The last frame is shown longer.
    """
    factor = max(1, side // max(steps[0].inputs.shape))
    pixels = [np.repeat(np.repeat(maze_pixels(step), factor, 0), factor, 1) for step in steps]
    frames = [Image.fromarray(frame).quantize() for frame in pixels]  # of a few colors: exact
    durations = [120] * (len(frames) - 1) + [2500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def draw_heat_map(values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], path: Path) -> None:
    """Fractions of solved puzzles, by size (rows) and evaluations relative to the rule's (columns)."""
    xlabel, title = "evaluations of f, as a fraction of the rule's", "fraction of puzzles solved"
    with saved_figure(path, 1.6 + 0.75 * len(columns), 1.4 + 0.5 * len(rows)) as (axis,):
        axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(xlabel=xlabel, ylabel="size", title=title)
        for i, j in np.argwhere(np.isfinite(values)):
            color = "black" if values[i, j] > 0.6 else "white"
            axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=color, fontsize="small")
