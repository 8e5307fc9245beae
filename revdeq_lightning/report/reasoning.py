"""How a reasoner solves puzzles, evaluation by evaluation: tables, sheets, and an animation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from revdeq_lightning.equilibrium import DivergenceError, deferred_divergence, equilibria
from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.loggers.puzzle_pictures import SolvedPuzzle, animate_maze, draw_heat_map, draw_puzzles
from revdeq_lightning.loggers.step_rows import write_rows
from revdeq_lightning.loggers.wandb_logger import log_media, log_picture, log_table

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""Fractions of the evaluations that a size gets by the rule."""
FRAMES, ANIMATION = 60, "animation.gif"


class ReasoningReport(Callback):
    """After a test, reports on the first batch of each size, of the first process.

    Writes `puzzles.png` (a sheet of puzzles, wrong cells in orange), `thinking.csv` (`size`, `evaluations` of f so far,
    `solved` and `cell_accuracy` of the answers read out then; up to twice the evaluations of the rule) and `solved.png`
    (its heat map); for mazes `thinking.png` and `animation.gif`, the path of a large maze as it appears. On W&B all
    of it, `reasoning/...`. Logs no numbers.

    Assumes a `ReasoningTask`, whose `test_step` returns the logits of a batch.

    Args:
        folder: Where to write.
        num_puzzles: Puzzles of each size on the sheet.
    """

    def __init__(self, folder: str | Path, num_puzzles: int = 4) -> None:
        self.folder, self.num_puzzles = Path(folder), num_puzzles
        self._survives = Survives("drawing the puzzles")
        self._forget()

    def _forget(self) -> None:
        self._sheet: list[tuple[str, SolvedPuzzle]] = []
        self._rows: list[dict[str, Any]] = []
        self._table: dict[str, list[float]] = {}
        self._largest: list[tuple[int, SolvedPuzzle]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._are_mazes = getattr(data, "hparams", {}).get("puzzle") == "mazes"

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx:
            return
        answers: Tensor = outputs.argmax(1)
        size = "x".join(map(str, batch.inputs.shape[1:]))
        few = type(batch)(*(tensor[: self.num_puzzles] for tensor in batch))
        self._sheet += [(size, puzzle) for puzzle in solved_puzzles(pl_module, few, answers[: self.num_puzzles])]
        if equilibria(pl_module):  # on all processes, as the weights may be sharded
            self._look(pl_module, batch, size)

    def _look(self, task: Any, batch: Any, size: str) -> None:
        model = task.model
        per_step = model.equilibrium.solver.evaluations_per_step
        steps = model.steps_for(batch.inputs.shape[1:])
        marks = [max(1, round(steps * per_step * fraction)) for fraction in FRACTIONS[:-1]]
        counted, real = batch.targets >= 0, (batch.targets >= 0).flatten(1).any(1)
        most, errors = round(steps * FRACTIONS[-1]), list[DivergenceError]()
        with deferred_divergence(errors):
            found = model.answers_along(batch.inputs, sorted(set(marks)), max_steps=most)
        solved: dict[int, float] = {}
        for evaluations, answers in zip([*sorted(set(marks)), most * per_step], found, strict=True):
            has_diverged = errors and evaluations == most * per_step
            right = (answers == batch.targets)[counted].double(), task.solved(batch, answers)[real].double()
            accuracy, solved[evaluations] = (math.nan if has_diverged else float(part.mean()) for part in right)
            row = {"size": size, "evaluations": evaluations, "solved": solved[evaluations], "cell_accuracy": accuracy}
            self._rows.append(row)
        self._table[size] = [solved[mark] for mark in [*marks, most * per_step]]
        if self._are_mazes and batch.inputs[0].numel() >= max((p.inputs.size for _, p in self._largest), default=0):
            one = type(batch)(batch.inputs[:1], batch.targets[:1])
            moments = sorted({round(m) for m in np.geomspace(1, steps * per_step, FRAMES)})
            answers = model.answers_along(one.inputs, moments[:-1], max_steps=steps)
            self._largest = [(m, *solved_puzzles(task, one, a)) for m, a in zip(moments, answers, strict=True)]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.is_global_zero and self._sheet):
            return
        with self._survives:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._draw()
        for path in (self.folder / name for name in ("puzzles.png", "solved.png", "thinking.png")):
            if path.is_file():
                log_picture(trainer, f"reasoning/{path.stem}", path, path.stem.replace("_", " "))
        if (self.folder / ANIMATION).is_file():
            log_media(trainer, "reasoning/animation", lambda wandb: wandb.Video(str(self.folder / ANIMATION)))
        if self._rows:
            log_table(trainer, "reasoning/thinking", self._rows)

    def _draw(self) -> None:
        names, puzzles = zip(*self._sheet, strict=True)
        draw_puzzles(
            puzzles, self.folder / "puzzles.png", "answers; wrong cells in orange", names, are_mazes=self._are_mazes
        )
        if self._rows:
            write_rows(self.folder / "thinking.csv", self._rows)
            labels = [f"{fraction:g}" for fraction in FRACTIONS]
            table = np.array(list(self._table.values()))
            draw_heat_map(table, list(self._table), labels, self.folder / "solved.png")
        if self._largest:
            chosen = [self._largest[i] for i in np.linspace(0, len(self._largest) - 1, 4).round().astype(int)]
            titles = [f"{evaluations} evaluations" for evaluations, _ in chosen]
            draw_puzzles(
                [puzzle for _, puzzle in chosen], self.folder / "thinking.png", "a path appears", titles, are_mazes=True
            )
            animate_maze([puzzle for _, puzzle in self._largest], self.folder / ANIMATION)


def solved_puzzles(task: Any, batch: Any, answers: Tensor) -> list[SolvedPuzzle]:
    """The puzzles of a batch, on the CPU; where the answers are another solution, it takes the place of the targets."""
    solved = task.solved(batch, answers).view(-1, *[1] * (answers.ndim - 1))
    targets = torch.where(solved & (batch.targets >= 0), answers, batch.targets)
    arrays = (tensor.cpu().numpy() for tensor in (batch.inputs, targets, answers))
    return [SolvedPuzzle(*puzzle) for puzzle in zip(*arrays, strict=True)]
