"""Puzzles whose solution takes many sequential steps: prefix sums, mazes, Sudoku."""
