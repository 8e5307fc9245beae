"""The HTML page of a run, the pictures of a classifier's mistakes, and of puzzles as they are solved."""
