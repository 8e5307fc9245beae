"""How good a trained model is with fewer and with more evaluations of f than it was trained with."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from revdeq_lightning.callbacks.abstract import AbstractAtValidations
from revdeq_lightning.equilibrium import EquilibriumLayer, deferred_divergence, equilibria
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.loggers.plots import Table, by_step, save_png, sweep_plots
from revdeq_lightning.loggers.step_rows import append_rows, rewind_rows, write_rows
from revdeq_lightning.loggers.wandb_logger import log_curves, log_table, step_of
from revdeq_lightning.program import say
from revdeq_lightning.runs.probe import Choice, chosen_solvers
from revdeq_lightning.runs.random_state import untouched_random_state

Sums = Callable[[LightningModule, Any], dict[str, Tensor]]
Rows = list[dict[str, Any]]
TEST, VALIDATION = "depth_sweep.csv", "depth_sweep_validation.csv"
NUM_SHOWN = 8
"""Newest sweeps in one table and one chart; the file has all."""


class DepthSweep(AbstractAtValidations):
    """Also evaluates with 1, 2, 4, ... solver steps, up to four times as many as the model makes.

    * A test, and a validation outside training (`trainer.validate`): every batch. Writes `depth_sweep.csv` (`steps`,
      `forward_nfe`: evaluations of f, and the means of what is summed) and `depth_sweep.png`, and prints the table.
    * Every n-th validation within training: the first batches, so that its cost is bounded. Appends to
      `depth_sweep_validation.csv` (`step`, then as above).

    Both go to W&B as a table, `depth_sweep/val` or `depth_sweep/test`, and each figure in it as curves,
    `depth_sweep/val_loss` ... It logs no numbers.

    A model with several equilibria makes the same fraction of its steps in each, at least one. Weights, solvers and
    random numbers are left unchanged. A model without a solver is ignored.

    Assumes that the module has `evaluation_sums(batch) -> dict`, sums over the batch with their divisor as "count".

    Args:
        folder: Where to write; None: the run's.
        every_n_validations: Within training, validations from one sweep to the next; 0 for none.
        num_batches: Batches of each of these sweeps, of every process.
        at_test: Whether to sweep in tests and in validations outside training.
        sums: `(module, batch) -> dict`; None: the module's own.

    Example:
        `Trainer(callbacks=[DepthSweep("runs/mine")]).test(task, data)`
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every_n_validations: int = 0,
        num_batches: int = 1,
        at_test: bool = True,
        sums: Sums | None = None,
    ) -> None:
        super().__init__(folder, every_n_validations, at_least=0)
        require_count("num_batches", num_batches)
        self.num_batches, self.at_test, self.sums = num_batches, at_test, sums
        self._totals: dict[int, dict[str, Tensor]] = {}
        self._sweeps: list[tuple[str, Table]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.sums is None and equilibria(pl_module) and not hasattr(pl_module, "evaluation_sums"):
            raise ValueError(
                f"DepthSweep has nothing to evaluate: {type(pl_module).__name__} has no evaluation_sums(batch); pass"
                " sums=function(module, batch)"
            )

    def rewind(self, step: int) -> None:
        rewind_rows(self.where / VALIDATION, step)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, self.at_test)

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._evaluate(trainer, pl_module, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if rows := self._rows(trainer, pl_module):
            trained = most_steps(pl_module)
            _print(rows, trained)
            with self._survives:
                write_rows(self.where / TEST, rows)
                at = next(row["forward_nfe"] for row in rows if row["steps"] == trained)
                save_png(list(sweep_plots([("", rows)], at).values()), (self.where / TEST).with_suffix(".png"))
            self._log(trainer, "test", by_step([{"step": step_of(trainer)} | row for row in rows]))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._begin(pl_module, self.at_test if trainer.state.fn == "validate" else self._is_due)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "validate" or (batch_idx < self.num_batches and dataloader_idx == 0):
            self._evaluate(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)
        elif rows := self._rows(trainer, pl_module):
            rows = [{"step": step_of(trainer)} | row for row in rows]
            self._sweeps = [*self._sweeps, *by_step(rows)][-NUM_SHOWN:]
            with self._survives:
                append_rows(self.where / VALIDATION, rows)
            self._log(trainer, "val", self._sweeps)

    def _begin(self, pl_module: LightningModule, is_asked: bool) -> None:
        self._totals = {steps: {} for steps in depths(most_steps(pl_module))} if is_asked else {}

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, pl_module: Any, batch: Any) -> None:
        with untouched_random_state():
            for steps, totals in self._totals.items():
                # At a depth where the state diverges, the figures are NaN.
                with (
                    deferred_divergence([]),
                    solver_steps(pl_module, steps),
                    trainer.precision_plugin.val_step_context(),
                ):
                    found = self.sums(pl_module, batch) if self.sums else pl_module.evaluation_sums(batch)
                for key, value in found.items():
                    totals[key] = totals.get(key, 0) + value.double()

    def _rows(self, trainer: Trainer, pl_module: LightningModule) -> Rows:
        """The means over all processes, which must all ask; none on the others."""
        rows = []
        for steps, sums in self._totals.items():
            totals = {key: trainer.strategy.reduce(value, reduce_op="sum") for key, value in sums.items()}
            count = totals.pop("count")
            with solver_steps(pl_module, steps):
                nfe = sum(layer.solver.num_evaluations for layer in equilibria(pl_module))  # at most
            row: dict[str, Any] = {"steps": steps, "forward_nfe": nfe}
            rows.append(row | {key: float(value / count) for key, value in totals.items()})
        self._totals = {}
        return rows if trainer.is_global_zero else []

    def _log(self, trainer: Trainer, split: str, sweeps: Sequence[tuple[str, Table]]) -> None:
        """A table of the sweeps, and a chart of each figure with a curve for each sweep."""
        log_table(trainer, f"depth_sweep/{split}", [row for _, rows in sweeps for row in rows])
        for figure, plot in sweep_plots(sweeps).items():
            title = f"{split}: {figure} by evaluations of f"
            log_curves(trainer, f"depth_sweep/{split}_{figure}", title, [plot])


def most_steps(module: nn.Module) -> int:
    """Steps of the deepest solver; 0 without a solver."""
    return max((layer.solver.max_steps for layer in equilibria(module)), default=0)


def depths(steps: int) -> list[int]:
    """1, 2, 4, ... below `steps`, then `steps`, twice and four times as many; none for 0."""
    below = [2**k for k in range(steps.bit_length()) if 2**k < steps]
    return [*below, steps, 2 * steps, 4 * steps] if steps else []


def solver_steps(module: nn.Module, steps: int) -> AbstractContextManager[None]:
    """Let the deepest solver make so many steps, and the others the same fraction of theirs, at least one."""
    most = most_steps(module)

    def choose(layer: EquilibriumLayer) -> Choice:
        scaled = max(1, round(layer.solver.max_steps * steps / most))
        return dataclasses.replace(layer.solver, max_steps=scaled), layer.adjoint

    return chosen_solvers(module, choose)


def _print(rows: Rows, trained: int) -> None:
    say("\nWith other numbers of solver steps than in training:")
    for row in rows:
        figures = "  ".join(f"{key} {row[key]:.4f}" for key in list(row)[2:])
        mark = "  (as trained)" if row["steps"] == trained else ""
        say(f"  {row['steps']:>4} steps, {row['forward_nfe']:>4} evaluations: {figures}{mark}")
