"""Puzzles whose solution takes many sequential steps: prefix sums, mazes, Sudoku."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.data.puzzles.kinds import (
        Mazes as Mazes,
        PrefixSums as PrefixSums,
        Sudoku as Sudoku,
    )
    from revdeq_lightning.data.puzzles.module import PuzzleBatch as PuzzleBatch, PuzzleDataModule as PuzzleDataModule

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
