"""Puzzles whose solution takes many sequential steps: prefix sums, mazes, Sudoku."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.data.puzzles.kinds import PrefixSums as PrefixSums
    from revdeq_lightning.data.puzzles.mazes import Mazes as Mazes
    from revdeq_lightning.data.puzzles.module import PuzzleBatch as PuzzleBatch, PuzzleDataModule as PuzzleDataModule
    from revdeq_lightning.data.puzzles.sudoku import Sudoku as Sudoku

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
