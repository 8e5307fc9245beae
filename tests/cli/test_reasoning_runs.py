"""Reasoners from the command line: a run, its folder, resumption, the commands that need a checkpoint."""

import csv
import io
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from revdeq_lightning.cli.inference import load_reasoner
from revdeq_lightning.data.puzzles.kinds import Mazes
from revdeq_lightning.data.puzzles.module import PuzzleBatch, PuzzleDataModule, build_kind, make_puzzle
from revdeq_lightning.loggers.puzzle_pictures import COLORS, SolvedPuzzle, animate_maze, maze_pixels
from revdeq_lightning.models import ReasonerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.models.reasoner import ReasonerOutput
from revdeq_lightning.report.reasoning import ReasoningReport, solved_puzzles
from revdeq_lightning.report.run_folder import read_run
from revdeq_lightning.tasks.optimizers import OptimizerConfig
from revdeq_lightning.tasks.reasoning import ReasoningTask
from tests.callbacks.wandb_records import read_back
from tests.helpers.processes import run_python
from tests.helpers.runs import assert_equal


def config(folder):
    settings = {
        "seed_everything": 0,
        "model": {
            "network": {"channels": 8},
            "solver": {"max_steps": 4, "reversible_stored_evaluations": 2},
            "optimizer": {"lr": 3e-3, "ema_decay": 0.5},
            "random_start": 0.5,
        },
        "data": {
            "puzzle": "mazes", "size": 2, "test_sizes": [3], "batch_size": 4, "num_validation": 8, "num_test": 6,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1,
            "enable_progress_bar": False,
        },
        "run": {"folder": str(folder / "runs"), "name": "tiny"},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def call(*words):
    """`revdeq reasoning WORDS`: what it prints."""
    return run_python("-m", "revdeq_lightning", "reasoning", *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reasoning")
    said = call("fit", "--config", config(folder), "--run.version=v", "--run.wandb=offline").out
    return folder, folder / "runs/tiny/v", said


def archive(folder, size):
    kind = build_kind("mazes", size=2, algorithm="mixed", loops=0.0, num_empty=1)
    puzzles = [make_puzzle(kind, 5, "test", size, i, train_size=2) for i in range(5)]
    path = folder / f"mazes-{size}.npz"
    arrays = {name: np.stack([getattr(p, name) for p in puzzles]) for name in ("inputs", "targets")}
    np.savez(path, **arrays)
    return path, arrays


def test_a_run_certifies_its_gradients_and_tells_what_is_solved(trained):
    _, run, said = trained
    assert "4 of 4 gradients certified exact" in said
    assert "solved," in said
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {key for row in rows for key, value in row.items() if value}
    assert {"val/solved", "val/cell_accuracy", "val/evaluations", "train/loss"} <= logged


def test_a_test_draws_what_the_reasoner_does(trained):
    _, run, _ = trained
    rows = list(csv.DictReader(io.StringIO((run / "thinking.csv").read_text())))
    assert {row["size"] for row in rows} == {"5x5", "7x7"}
    assert max(int(row["evaluations"]) for row in rows if row["size"] == "5x5") == 8
    for name in ("puzzles.png", "solved.png", "thinking.png", "animation.gif"):
        with Image.open(run / name) as picture:
            picture.load()
    found = read_run(run, "tiny")
    assert (found.task, found.item, found.unit) == ("reasoner", "cell", "puzzle")
    assert "data:image/gif" in (run / "report.html").read_text()
    on_wandb = read_back(run)
    types = {"puzzles": "image-file", "solved": "image-file", "thinking": "table-file", "animation": "video-file"}
    assert {key: on_wandb.media(f"reasoning/{key}")[-1]["_type"] for key in types} == types


def test_a_resumed_run_ends_as_the_whole_one(trained, tmp_path):
    _, run, _ = trained
    path = config(tmp_path)
    call("fit", "--config", path, "--run.version=w", "--trainer.max_steps=2", "--run.test=false")
    half = tmp_path / "runs/tiny/w/checkpoints/last.ckpt"
    call("fit", "--config", path, "--ckpt_path", half, "--run.version=w", "--run.test=false")
    whole, resumed = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (run, half.parent.parent))
    for key in ("state_dict", "trained_weights", "optimizer_states"):
        assert_equal(whole[key], resumed[key])


def test_an_animation_has_a_frame_for_each_answer(tmp_path):
    inputs = np.array([[0, 0, 0, 0, 0], [0, 2, 1, 3, 0], [0, 0, 0, 0, 0]])
    answers = [np.zeros_like(inputs) for _ in range(3)]
    answers[1][1, 1], answers[2][1, 1:4] = 1, 1
    answers[1][1, 2] = 1
    animate_maze([SolvedPuzzle(inputs, (inputs > 0).astype(int), a) for a in answers], tmp_path / "a.gif", side=50)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames >= 2
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("RGB"))[15, 25]
    assert tuple(last) == COLORS["path"]


def test_predictions_are_those_of_the_model(trained, tmp_path):
    _, run, _ = trained
    checkpoint, out = run / "checkpoints/best.ckpt", tmp_path / "out.npz"
    model, _ = load_reasoner(checkpoint)
    path, arrays = archive(tmp_path, 4)  # larger than in training: more steps
    said = call("predict", "--ckpt_path", checkpoint, f"--data.path={path}", f"--output={out}").out
    assert f"5 puzzles, {-(-4 * 81 // 25):.1f} evaluations" in said
    with torch.no_grad(), np.load(out) as found:
        expected = model(torch.from_numpy(arrays["inputs"])).logits.argmax(1).numpy()
        assert (found["predictions"] == expected).all()
        assert (found["evaluations"] == -(-4 * 81 // 25)).all()
    _, arrays = archive(tmp_path, 2)
    np.savez(tmp_path / "bare.npz", inputs=arrays["inputs"])  # without targets
    options = (f"--data.path={tmp_path / 'bare.npz'}", "--model.solver.max_steps=11", f"--output={out}")
    call("predict", "--ckpt_path", checkpoint, *options)
    with torch.no_grad(), np.load(out) as found:
        expected = model(torch.from_numpy(arrays["inputs"]), max_steps=11).logits.argmax(1).numpy()
        assert (found["predictions"] == expected).all()
        assert (found["evaluations"] == 11).all()


def test_a_test_takes_puzzles_of_a_file_and_more_steps(trained, tmp_path):
    _, run, _ = trained
    path, _ = archive(tmp_path, 4)
    options = (f"--data.test_path={path}", "--model.solver.max_steps=7")
    said = call("test", "--ckpt_path", run / "checkpoints/best.ckpt", *options).out
    assert f"{-(-7 * 81 // 25):.1f} evaluations of f per puzzle" in said


def test_evaluations_grow_from_the_puzzles_of_training_whatever_is_tested(trained):
    _, run, _ = trained
    kept = (run / "thinking.csv").read_text()
    options = ("--data.size=4", "--data.test_sizes=[2]")
    said = call("test", "--ckpt_path", run / "checkpoints/best.ckpt", *options).out
    assert re.search(r"5x5: \S+ solved, .*, 4.0 evaluations of f per puzzle, \S+ from random states", said)
    assert re.search(rf"9x9: .*, {-(-4 * 81 // 25):.1f} evaluations of f per puzzle", said)
    table = (Path(said.split("tables in ")[1].strip()) / "test.csv").read_text()
    figures = dict(csv.reader(table.splitlines()))
    assert (float(figures["test/evaluations_5x5"]), float(figures["test/evaluations_9x9"])) == (4, 13)
    assert 0 <= float(figures["test/solved_from_random_9x9"]) <= 1
    assert (run / "thinking.csv").read_text() == kept  # what the training found


class Growing(torch.nn.Module):
    def forward(self, z, x):
        return 4 * z + x


def test_a_depth_at_which_the_solve_diverges_has_no_figures(tmp_path):
    """3 ** 6 is within the range of the state, 3 ** 12 is not."""
    task = ReasoningTask(ReasonerConfig(4, 2, [5, 5], 8), SolverConfig(max_steps=5), OptimizerConfig())
    task.model.equilibrium.f = Growing()
    inputs = torch.from_numpy(archive(tmp_path, 2)[1]["inputs"])
    report = ReasoningReport(tmp_path)
    report._are_mazes = False
    task = SimpleNamespace(model=task.model.eval(), solved=lambda batch, _: torch.ones(len(batch.inputs)))
    report._look(task, PuzzleBatch(inputs, (inputs > 1).long()), "5x5")
    *found, last = [row["cell_accuracy"] for row in report._rows]
    assert all(0 <= accuracy <= 1 for accuracy in found)
    assert math.isnan(last)


def test_a_test_of_solves_that_stop_by_themselves_draws_too(trained):
    _, run, _ = trained
    options = ("--model.solver.rtol=0.9", "--model.solver.max_steps=40")
    said = call("test", "--ckpt_path", run / "checkpoints/best.ckpt", *options).out
    evaluations = float(re.search(r"([\d.]+) evaluations of f per puzzle", said)[1])
    assert evaluations < 40
    (folder,) = {path.parent for path in run.glob("test-*/thinking.csv")} & {Path(said.split("tables in ")[1].strip())}
    rows = list(csv.DictReader(io.StringIO((folder / "thinking.csv").read_text())))
    assert max(int(row["evaluations"]) for row in rows if row["size"] == "5x5") == 80


def test_solved_puzzles_are_counted_by_what_is_a_solution():
    """Of a maze with two shortest paths, the one that is not the target counts too; against `Mazes.is_solved`."""
    square = np.array([[0, 0, 0, 0, 0], [0, 2, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 3, 0], [0, 0, 0, 0, 0]])
    paths = [np.zeros_like(square) for _ in range(2)]
    paths[0][1, 1:4], paths[0][1:4, 3] = 1, 1
    paths[1][1:4, 1], paths[1][3, 1:4] = 1, 1
    task = ReasoningTask(ReasonerConfig(4, 2, [5, 5], 8), SolverConfig(), OptimizerConfig())
    task._trainer = SimpleNamespace(datamodule=PuzzleDataModule(size=2))
    inputs, targets = (torch.from_numpy(np.stack(arrays)) for arrays in ([square] * 3, [paths[0]] * 3))
    answers = torch.from_numpy(np.stack([paths[0], paths[1], paths[0] | paths[1]]))
    logits = torch.nn.functional.one_hot(answers, 2).movedim(-1, 1).float()
    batch = PuzzleBatch(inputs, targets)
    sums = task._sums(batch, ReasonerOutput(logits, None, torch.ones(3)))
    assert int(sums["solved"]) == sum(Mazes("mixed", 0.0).is_solved(square, a) for a in answers.numpy()) == 2
    assert int(sums["puzzles"]) == 3
    pictures = [maze_pixels(puzzle) for puzzle in solved_puzzles(task, batch, answers)]
    assert [(pixels == COLORS["wrong"]).all(-1).any() for pixels in pictures] == [False, False, True]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("predict", "--data.path=nothing.npz"), "no file nothing.npz"),
        (("predict", "--data.path={readable}", "--output={readable}"), "readable.npz: it is the input; choose another"),
        (("predict", "--data={symbols}"), "a file of settings must be text in UTF-8"),
        (("fit", "--model.network.block=attention", "--model.network.num_heads=2"), "attention has learned positions"),
        (("predict", "--data.path={symbols}"), "inputs must be from 0 to 3, got 7"),
        (("fit", "--data.puzzle=chess"), "puzzle must be one of"),
        (("fit", "--model.solver.rtol=0.1"), "stored_evaluations=2 needs a solver without a tolerance"),
        (("fit", "--model.random_start=2"), "random_start must be in"),
        (("fit", "--model.late_steps=8"), "late_steps has no effect without late_start, got 8: remove it"),
    ],
)
def test_what_is_wrong_is_one_line(trained, tmp_path, words, says):
    folder, run, _ = trained
    np.savez(tmp_path / "symbols.npz", inputs=np.full((1, 5, 5), 7))
    np.savez(tmp_path / "readable.npz", inputs=archive(tmp_path, 2)[1]["inputs"])
    command, *options = words
    given = ("--config", config(folder)) if command == "fit" else ("--ckpt_path", run / "checkpoints/best.ckpt")
    line = ("-m", "revdeq_lightning", "reasoning")
    files = {name: tmp_path / f"{name}.npz" for name in ("symbols", "readable")}
    said = run_python(*line, command, *given, *(option.format(**files) for option in options), code=2)
    assert says in said.err
    assert len([line for line in said.err.splitlines() if not line.startswith("Data: ")]) == 1
