"""How the residual falls along the iteration."""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.equilibrium import SolverStats, recorded_residuals
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.loggers.media import log_curves, step_of
from revdeq_lightning.loggers.step_rows import append_rows, read_rows, rewind_rows
from revdeq_lightning.tasks.training_step import StepStatistics, made_step, run_folder

KEY = "equilibrium/residual_curve"
NUM_DRAWN = 8
"""Curves in one chart."""


class ResidualCurve(Callback):
    """Keeps the relative residual at every evaluation of f, of a training step now and then.

    It comes from the solve's own evaluations: f is not called once more, the host waits only when the rows are written,
    and in the other steps nothing is computed.

    Writes `residual_curve.csv` (`step`, `solve`: number of the solve within the step, `evaluation`,
    `relative_residual`: mean over the samples of the first process that made this evaluation, `num_samples`: how many)
    and at the end `residual_curve.png`. On W&B the newest curves are a chart, `equilibrium/residual_curve`.

    Assumes what `FunctionEvaluations` does of the training step.

    Args:
        every_n_steps: Optimizer steps from one curve to the next.
        folder: Where to write; None: the run's.

    Raises:
        ValueError: If `every_n_steps` is below 1.

    Example:
        `Trainer(callbacks=[ResidualCurve(every_n_steps=50)])`
    """

    def __init__(self, every_n_steps: int = 100, folder: str | Path | None = None) -> None:
        require_count("every_n_steps", every_n_steps)
        self.every_n_steps, self.folder = every_n_steps, folder
        self._path = Path()
        self._statistics = StepStatistics()
        self._recording = ExitStack()
        self._newest: deque[list[dict[str, float]]] = deque(maxlen=NUM_DRAWN)
        self._survives = Survives("ResidualCurve")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._path = run_folder(trainer, self.folder) / "residual_curve.csv"
        if trainer.is_global_zero:
            self._statistics.attach(pl_module)
            with self._survives:
                rewind_rows(self._path, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and (trainer.global_step + 1) % self.every_n_steps == 0:
            self._recording.enter_context(recorded_residuals())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._recording.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._recording.close()
        stats = self._statistics.take(outputs)
        if not (trainer.is_global_zero and made_step(trainer)):
            return
        rows = curve_rows(stats, step_of(trainer))
        if rows:
            self._newest.append(rows)
            log_curves(trainer, KEY, "residual along the iteration", "evaluation of f", named_curves(self._newest))
            with self._survives:
                append_rows(self._path, rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recording.close()
        self._statistics.detach()
        if trainer.is_global_zero:
            with self._survives:
                if rows := read_rows(self._path):
                    draw_residual_curves(rows, self._path.with_suffix(".png"))


def curve_rows(stats: Sequence[SolverStats], step: int) -> list[dict[str, float]]:
    """Rows of the solves whose residuals were kept; none for an evaluation that no sample made."""
    rows: list[dict[str, float]] = []
    for solve, s in enumerate(stats, 1):
        if s.residual_curve is None:
            continue
        curve = s.residual_curve.double().cpu()
        made = (~curve.isnan()).sum(1)
        for evaluation, (mean, num_samples) in enumerate(zip(curve.nanmean(1).tolist(), made.tolist(), strict=True), 1):
            if num_samples:
                figures = {"relative_residual": mean, "num_samples": num_samples}
                rows.append({"step": step, "solve": solve, "evaluation": evaluation, **figures})
    return rows


def named_curves(steps: Iterable[Sequence[dict[str, float]]]) -> dict[str, tuple[list[float], list[float]]]:
    """The curves of some steps, by step and solve."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for rows in steps:
        several = rows[-1]["solve"] > 1
        for row in rows:
            name = f"step {row['step'] + 1}" + (f", solve {row['solve']}" if several else "")
            xs, ys = curves.setdefault(name, ([], []))
            xs.append(row["evaluation"])
            ys.append(row["relative_residual"])
    return curves


def draw_residual_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each solve of a step; as many steps as can be told apart, from the first to the newest."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    steps = sorted({int(row["step"]) for row in rows})
    solves = sorted({int(row["solve"]) for row in rows})
    last = len(steps) - 1
    chosen = sorted({steps[round(i * last / (NUM_DRAWN - 1))] for i in range(NUM_DRAWN)})
    canvas = Figure(figsize=(5 * len(solves), 3.6), layout="constrained")
    for axis, solve in zip(canvas.subplots(1, len(solves), squeeze=False).flat, solves, strict=True):
        for i, step in enumerate(chosen):
            points = [row for row in rows if (int(row["step"]), int(row["solve"])) == (step, solve)]
            color = colormaps["viridis"](0.9 * i / max(1, len(chosen) - 1))
            values = [float(row["relative_residual"]) or float("nan") for row in points]  # 0 has no logarithm
            numbers = [int(row["evaluation"]) for row in points]
            axis.plot(numbers, values, marker="o", markersize=3, color=color, label=f"step {step + 1}")
        axis.set(xlabel="evaluation of f", ylabel="relative residual", yscale="log")
        axis.set_title(f"solve {solve}" if len(solves) > 1 else "residual along the iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    canvas.savefig(path, dpi=120)
