"""How the residual falls along the iteration."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from revdeq_lightning.callbacks.abstract import AbstractWatching
from revdeq_lightning.equilibrium import SolverStats, recorded_residuals
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.loggers.plots import Table, by_step, residual_plots, save_png
from revdeq_lightning.loggers.step_rows import append_rows, read_table, rewind_rows
from revdeq_lightning.loggers.wandb_logger import log_curves, step_of
from revdeq_lightning.tasks.training_step import made_step, run_folder

NUM_DRAWN = 8
"""Steps in one chart."""


class ResidualCurve(AbstractWatching):
    """Records the relative residual at every evaluation of f, every few training steps.

    It comes from the solve's own evaluations: f is not called again, and the host waits only when the rows are written.

    Writes `residual_curve.csv` (`step`, `solve`: number of the solve within the step, `evaluation`,
    `relative_residual`: mean over the samples of the first process that made this evaluation, `num_samples`: how many)
    and at the end `residual_curve.png`. On W&B the newest curves are a chart, `equilibrium/residual_curve`.

    Args:
        every_n_steps: Optimizer steps from one curve to the next.
        folder: Where to write; None: the run's.
    """

    def __init__(self, every_n_steps: int = 100, folder: str | Path | None = None) -> None:
        require_count("every_n_steps", every_n_steps)
        self.every_n_steps, self.folder = every_n_steps, folder
        self._path = Path()
        self._recording = ExitStack()
        self._newest: list[tuple[str, Table]] = []
        self._survives = Survives("ResidualCurve")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._path = run_folder(trainer, self.folder) / "residual_curve.csv"
        if trainer.is_global_zero:
            with self._survives:
                rewind_rows(self._path, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and (trainer.global_step + 1) % self.every_n_steps == 0:
            self._recording.enter_context(recorded_residuals())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._recording.close()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._recording.close()
        stats = self.take(outputs)
        if not (trainer.is_global_zero and made_step(trainer)):
            return
        if rows := curve_rows(stats, step_of(trainer)):
            self._newest = [*self._newest, *by_step(rows)][-NUM_DRAWN:]
            plots = residual_plots(self._newest)
            log_curves(trainer, "equilibrium/residual_curve", "residual along the iteration", plots)
            with self._survives:
                append_rows(self._path, rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._recording.close()
        super().on_exception(trainer, pl_module)
        if trainer.is_global_zero:
            with self._survives:
                if steps := by_step(read_table(self._path)):  # none either if it ended before the first step
                    # A few, spread evenly from the first to the newest.
                    chosen = sorted({round(i * (len(steps) - 1) / (NUM_DRAWN - 1)) for i in range(NUM_DRAWN)})
                    save_png(residual_plots([steps[i] for i in chosen]), self._path.with_suffix(".png"))

    on_train_end = on_exception


def curve_rows(stats: Sequence[SolverStats], step: int) -> list[dict[str, float]]:
    """Rows of the solves whose residuals were kept; none for an evaluation that no sample made."""
    kept = [(solve, s.residual_curve) for solve, s in enumerate(stats, 1) if s.residual_curve is not None]
    if not kept:
        return []
    solves = [solve for solve, curve in kept for _ in curve]
    evaluations = [i for _, curve in kept for i, _ in enumerate(curve, 1)]
    figures = [torch.stack([curve.double().nanmean(1), (~curve.isnan()).sum(1)]) for _, curve in kept]
    means, counts = torch.cat(figures, 1).tolist()  # one wait for the device, for all solves
    return [
        {"step": step, "solve": solve, "evaluation": i, "relative_residual": mean, "num_samples": int(count)}
        for solve, i, mean, count in zip(solves, evaluations, means, counts, strict=True)
        if count
    ]
