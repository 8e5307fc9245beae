"""Puzzles: whether they are ones, and belong to one split; files."""

from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch

from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.puzzles.kinds import Sudoku
from revdeq_lightning.data.puzzles.module import PuzzleDataModule, build_kind, make_puzzle
from tests.helpers.data import refused

SUDOKU = ((4, 8, 2, 2), (6, 22, 2, 3), (9, 40, 3, 3))


def kind(puzzle="mazes", size=5, algorithm="mixed", loops=0.0, num_empty=8):
    return build_kind(puzzle, size=size, algorithm=algorithm, loops=loops, num_empty=num_empty)


def mazes(count=20, size=6, **settings):
    return [make_puzzle(kind(size=size, **settings), 0, "train", size, i) for i in range(count)]


def distances(pixels):
    """Steps from the start to each free pixel, by a queue."""
    (start,) = map(tuple, np.argwhere(pixels == 2))
    found, queue = {start: 0}, deque([start])
    while queue:
        r, c = queue.popleft()
        for place in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if pixels[place] and place not in found:
                found[place] = found[r, c] + 1
                queue.append(place)
    return found


def data(tmp_path, **settings):
    sizes = {"size": 3, "num_validation": 12, "num_test": 8, "batch_size": 4, "cache_dir": str(tmp_path)}
    return PuzzleDataModule(**sizes | settings)


@pytest.mark.parametrize("algorithm", ["depth_first", "spanning_tree", "mixed"])
def test_mazes_are_trees_of_all_cells(algorithm):
    for maze in mazes(algorithm=algorithm):
        free = maze.inputs > 0
        assert free[1::2, 1::2].all()
        assert free.sum() == 2 * 36 - 1  # cells, and one opening less
        assert len(distances(maze.inputs)) == free.sum()
        assert sorted(maze.inputs[maze.inputs > 1]) == [2, 3]


@pytest.mark.parametrize("loops", [0.0, 0.3])
def test_the_answer_is_a_shortest_path(loops):
    for maze in mazes(loops=loops):
        found = distances(maze.inputs)
        (goal,) = map(tuple, np.argwhere(maze.inputs == 3))
        assert maze.targets.sum() == found[goal] + 1
        steps = sorted(found[tuple(place)] for place in np.argwhere(maze.targets))
        assert steps == list(range(found[goal] + 1))


def test_any_shortest_path_is_a_solution_and_nothing_else():
    square = np.array([[0, 0, 0, 0, 0], [0, 2, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 3, 0], [0, 0, 0, 0, 0]])
    above, below = (np.zeros_like(square) for _ in range(2))
    above[1, 1:4], above[1:4, 3] = 1, 1
    below[1:4, 1], below[3, 1:4] = 1, 1
    is_solution = kind().is_solved
    assert is_solution(square, above)
    assert is_solution(square, below)
    assert not is_solution(square, above | below)
    through_wall = above.copy()
    through_wall[1, 2], through_wall[2, 2] = 0, 1
    assert not is_solution(square, through_wall)
    assert not is_solution(square, np.zeros_like(square))


def count_solutions(grid, rows, columns):
    """By trying every value in one empty cell after the other."""
    if grid.all():
        return 1
    row, column = np.argwhere(grid == 0)[0]
    r, c = row // rows * rows, column // columns * columns
    used = {*grid[row], *grid[:, column], *grid[r : r + rows, c : c + columns].ravel()}
    total = 0
    for value in {*range(1, len(grid) + 1)} - used:
        grid[row, column] = value
        total += count_solutions(grid, rows, columns)
    grid[row, column] = 0
    return total


@pytest.mark.parametrize(("size", "empty", "rows", "columns"), SUDOKU)
def test_sudokus_have_one_solution_and_symmetric_forms(size, empty, rows, columns):
    sudoku = Sudoku(size, empty)
    puzzle = sudoku.make(Draws(7), size)
    assert np.count_nonzero(puzzle.inputs == 0) == empty
    if size < 9:
        assert count_solutions(puzzle.inputs.copy(), rows, columns) == 1
    forms = [sudoku.vary(puzzle, Draws(i)) for i in range(20)]
    assert len({form.inputs.tobytes() for form in forms}) == 20
    for form in (puzzle, *forms):
        assert sudoku.key(form.inputs) == sudoku.key(puzzle.inputs)
        assert (form.targets == form.inputs)[form.inputs > 0].all()
        boxes = form.targets.reshape(size // rows, rows, size // columns, columns).swapaxes(1, 2).reshape(size, size)
        for units in (form.targets, form.targets.T, boxes):
            assert (np.sort(units, 1) == np.arange(1, size + 1)).all()


def test_targets_that_do_not_count_do_not_count_in_a_symmetric_form():
    sudoku, puzzle = Sudoku(4, 6), Sudoku(4, 6).make(Draws(7), 4)
    hidden = puzzle._replace(targets=np.where(puzzle.inputs > 0, -100, puzzle.targets))
    whole, varied = sudoku.vary(puzzle, Draws(3)), sudoku.vary(hidden, Draws(3))
    assert (varied.inputs == whole.inputs).all()
    assert (varied.targets == np.where(varied.inputs > 0, -100, whole.targets)).all()


def test_prefix_sums_are_parities():
    puzzle = make_puzzle(kind("prefix_sums"), 0, "train", 32, 0)
    assert all(puzzle.targets[i] == puzzle.inputs[: i + 1].sum() % 2 for i in range(32))


@pytest.mark.parametrize("settings", [{}, {"puzzle": "sudoku", "size": 4, "num_empty": 6, "num_train": 40}])
def test_no_puzzle_is_in_two_splits(tmp_path, settings):
    module = data(tmp_path, **settings)

    def keys(loader):
        return {module.kind.key(p) for batch in islice(loader, 10) for p in batch.inputs.numpy()}

    parts = [keys(loader) for loader in (module.train_dataloader(), module.val_dataloader(), *module.test_dataloader())]
    assert len(parts) == 3
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_what_was_found_tells_the_training_puzzles(tmp_path):
    assert data(tmp_path, num_train=40).found() == {"puzzles": {"train": 40, "validation": 12, "test": 8}}
    assert data(tmp_path).found() == {"puzzles": {"train": 65536, "validation": 12, "test": 8}}


def test_puzzles_are_a_function_of_the_seed(tmp_path):
    def batches(seed, epoch=0):
        loader = data(tmp_path, seed=seed).train_dataloader()
        loader.load_state_dict({"epoch": epoch, "batch": 5})
        return next(iter(loader)).inputs

    assert torch.equal(batches(0), batches(0))
    assert not torch.equal(batches(0), batches(1))
    assert not torch.equal(batches(0), batches(0, epoch=1))


def test_each_size_is_a_test_split_of_its_own(tmp_path):
    module = data(tmp_path, test_sizes=[4, 6])
    shapes = [{tuple(batch.inputs.shape[1:]) for batch in loader} for loader in module.test_dataloader()]
    assert shapes == [{(7, 7)}, {(9, 9)}, {(13, 13)}]
    assert module.test_shapes == [(7, 7), (9, 9), (13, 13)]
    assert module.shape == [7, 7]


def test_an_archive_is_divided_into_splits(tmp_path):
    found = mazes(60)
    arrays = {name: np.stack([getattr(p, name) for p in found]) for name in ("inputs", "targets")}
    np.savez(tmp_path / "m.npz", **arrays)
    module = data(tmp_path, path=str(tmp_path / "m.npz"), validation_fraction=0.2, test_fraction=0.2)
    parts = [module._prepared()[split][0][0] for split in ("train", "validation", "test")]
    assert all(map(len, parts))
    assert sorted(p.tobytes() for part in parts for p in part) == sorted(p.inputs.tobytes() for p in found)
    assert len({p.inputs.tobytes() for p in found}) == 60


def test_nothing_is_held_out_for_a_test_split_that_has_a_file(tmp_path):
    for name, puzzles in {"m": mazes(60), "t": mazes(9, size=4)}.items():
        arrays = {field: np.stack([getattr(p, field) for p in puzzles]) for field in ("inputs", "targets")}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    paths = {"path": str(tmp_path / "m.npz"), "test_path": str(tmp_path / "t.npz")}
    sizes = data(tmp_path, **paths, test_fraction=0.5).found()["puzzles"]
    assert sizes["train"] + sizes["validation"] == 60
    assert sizes["test"] == 9


ONE = np.array([[[0, 0, 0, 0], [0, 2, 3, 0], [0, 0, 0, 0]]])
PATH = (ONE > 1).astype(int)
TWICE = np.zeros((1, 4, 4), int)
TWICE[0, 0, 0] = TWICE[0, 1, 1] = 3
STUCK = np.zeros((1, 4, 4), int)
STUCK[0, 0, 1:] = 1, 2, 3
STUCK[0, 2, 0] = 4
FILLED = np.array([[[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]])
OTHER_GIVEN = np.where(np.arange(16).reshape(1, 4, 4) == 0, 2, 0)
SMALL_SUDOKU = {"puzzle": "sudoku", "size": 4, "num_empty": 6}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"puzzles": ONE}, "has no array 'inputs'"),
        ({"inputs": ONE}, "has no array 'targets'"),
        ({"inputs": ONE * 1.0, "targets": PATH}, "inputs must be integers, got float64"),
        ({"inputs": ONE[0, 0], "targets": PATH}, "inputs must have shape"),
        ({"inputs": ONE, "targets": PATH[:, :2]}, "targets must have the shape of inputs"),
        ({"inputs": ONE + 1, "targets": PATH}, r"inputs must be from 0 to 3, got 4 at \[0, 1, 2\]"),
        ({"inputs": ONE, "targets": PATH * 2}, "targets must be from 0 to 1, got 2"),
        ({"inputs": ONE[0], "targets": PATH[0]}, "inputs must have 3 dimensions for Mazes"),
        ({"inputs": np.where(ONE == 3, 1, ONE), "targets": PATH}, r"one goal \(symbol 3\), got 0"),
        ({"inputs": np.array([[[2, 0, 3]]]), "targets": np.zeros((1, 1, 3), int)}, "no path from start to goal"),
        ({"inputs": TWICE[..., :3], "targets": TWICE[..., :3]}, r"a Sudoku of size 4 has shape \(4, 4\), got \(4, 3\)"),
        ({"inputs": TWICE, "targets": TWICE}, "3 stands twice in the box of row 2, column 2"),
        ({"inputs": STUCK, "targets": STUCK}, "puzzle 0 cannot be solved: no value is possible in row 1, column 1"),
        ({"inputs": ONE, "targets": PATH * 0}, "targets of puzzle 0 are no solution, which is 1 on a shortest path"),
        ({"inputs": ONE, "targets": PATH * 0 - 100}, "no target of puzzle 0 counts, all are -100: remove the puzzle"),
        ({"inputs": OTHER_GIVEN, "targets": FILLED}, "targets of puzzle 0 are no solution, which is each value once"),
    ],
)
def test_what_is_wrong_with_an_archive_is_said(tmp_path, arrays, says):
    kind = SMALL_SUDOKU if any(word in says for word in ("Sudoku", "twice", "value")) else {}
    np.savez(tmp_path / "m.npz", **arrays)
    with refused(says):
        data(tmp_path, path=str(tmp_path / "m.npz"), **kind).setup("fit")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_empty": 3}, "num_empty has no effect without puzzle='sudoku', got 3"),
        ({"puzzle": "prefix_sums", "loops": 0.5}, "loops has no effect without puzzle='mazes', got 0.5"),
        ({"symmetries": True}, "symmetries has no effect without puzzle='sudoku', got True"),
        ({"puzzle": "sudoku", "size": 4, "symmetries": True}, "symmetries has no effect without num_train"),
        ({"test_fraction": 0.3}, "test_fraction has no effect without path, got 0.3"),
    ],
)
def test_a_setting_of_other_puzzles_is_refused(tmp_path, settings, says):
    with refused(says):
        data(tmp_path, **settings)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut off", b"no archive"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "m.npz").write_bytes(content)
    with refused(r"m\.npz is not an npz archive"):
        data(tmp_path, path=str(tmp_path / "m.npz")).setup("fit")


def test_tables_of_sudokus_are_read(tmp_path):
    puzzle = Sudoku(9, 40).make(Draws(7), 9)
    question, answer = ("".join(map(str, array.ravel())) for array in puzzle)
    row = f"a,{question.replace('0', '.')},{answer},1\n"
    for name in ("Training.csv", "TEST.CSV"):
        (tmp_path / name).write_text(f"source,question,answer,rating\n{row * 3}", encoding="utf-8-sig")
    settings = {"puzzle": "sudoku", "size": 9, "path": str(tmp_path), "validation_fraction": 0.0}
    module = data(tmp_path / "cache", **settings, num_train=2)
    with pytest.warns(UserWarning, match="3 of 3 test puzzles are also training puzzles"):
        assert module.found() == {"puzzles": {"train": 2, "test": 3}}
    ((inputs, targets),) = module._prepared()["test"]
    assert (inputs == puzzle.inputs).all()
    assert (targets == puzzle.targets).all()
    for content, message in (
        (row.encode("utf-16"), r"TEST.CSV is not a table in UTF-8 \(.*\): save it as CSV in UTF-8"),
        (f"question,answer\n{question}\n".encode(), "a Sudoku must have 81 characters, got ''"),
    ):
        (tmp_path / "TEST.CSV").write_bytes(content)
        with refused(message):
            data(tmp_path / "cache", **settings).setup("fit")
