"""Pictures of puzzles, and of an answer as it appears."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


def maze_pixels(puzzle: SolvedPuzzle) -> NDArray[np.uint8]:
    """Colors of a maze with its answer, shape `(height, width, 3)`; wrong cells are orange."""
    symbols = np.array([COLORS[name] for name in ("wall", "free", "start", "goal")], np.uint8)
    pixels = symbols[puzzle.inputs]
    pixels[(puzzle.answers == 1) & (puzzle.inputs < 2)] = COLORS["path"]
    pixels[(puzzle.answers != puzzle.targets) & (puzzle.targets >= 0)] = COLORS["wrong"]
    return pixels


def draw_puzzles(
    puzzles: Sequence[SolvedPuzzle], path: Path, title: str, names: Sequence[str], *, are_mazes: bool
) -> None:
    """A sheet of puzzles, at least one: mazes, or grids or strings of digits, with a name above each.

    Wrong cells are orange, and wrong digits and bits bold.
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
    inputs, answers, targets = puzzle
    if inputs.ndim == 1:  # a string, in lines; -1 fills the last one
        width = min(16, len(inputs))
        padded = [np.pad(array, (0, -len(array) % width), constant_values=-1) for array in puzzle]
        inputs, answers, targets = (array.reshape(-1, width) for array in padded)
    wrong = (answers != targets) & (targets >= 0)
    background = np.full((*inputs.shape, 3), 255, np.uint8)
    background[wrong] = COLORS["wrong"]
    axis.imshow(background, interpolation="nearest")
    for row, column in np.argwhere(answers >= 0):
        given = puzzle.inputs.ndim == 2 and inputs[row, column] > 0
        color = "black" if given else "tab:blue"
        text = str(answers[row, column])
        weight = "bold" if wrong[row, column] else "normal"
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
