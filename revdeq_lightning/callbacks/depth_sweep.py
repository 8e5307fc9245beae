"""How good a trained model is with fewer and with more evaluations of f than it was trained with."""

import csv
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from revdeq_lightning.callbacks.training_step import equilibria


class DepthSweep(Callback):
    """Evaluates each batch of a test with 1, 2, 4, ... solver steps too, up to four times as many as the model makes.

    A validation outside training (`trainer.validate`) counts as a test.

    A model with several equilibria makes the same fraction of its steps in each, at least one. Writes `depth_sweep.csv`
    (evaluations of f and the means of what the task sums) and `depth_sweep.png`, and prints the table. Logs no keys.

    Assumes that the task has `evaluation_sums(batch) -> dict`, sums over the batch with their divisor as "count", and
    leaves the random state, the weights and the solvers as they were. A model without solver is left alone.

    Args:
        folder: Where to write.

    Example:
        `Trainer(callbacks=[DepthSweep("runs/mine")]).test(task, data)`
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.sums: dict[int, dict[str, Tensor]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty sums."""
        self.sums = {steps: {} for steps in depths(most_steps(pl_module))}

    @torch.no_grad()
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate the batch at each depth."""
        for steps, sums in self.sums.items():
            with solver_steps(pl_module, steps), trainer.precision_plugin.test_step_context():
                for key, value in pl_module.evaluation_sums(batch).items():
                    sums[key] = sums.get(key, 0) + value.double()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, outside training."""
        self.sums = {}
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate, outside training."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, outside training."""
        self.on_test_end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write table and figure."""
        if not self.sums:
            return
        rows = []
        for steps, sums in self.sums.items():
            totals = {key: trainer.strategy.reduce(value, reduce_op="sum") for key, value in sums.items()}
            count = totals.pop("count")
            with solver_steps(pl_module, steps):
                nfe = evaluations(pl_module)
            rows.append(
                {"steps": steps, "forward_nfe": nfe} | {key: float(value / count) for key, value in totals.items()}
            )
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "depth_sweep.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            trained = most_steps(pl_module)
            draw(rows, trained, self.folder / "depth_sweep.png")
            print("\nWith other numbers of solver steps than in training:")
            for row in rows:
                figures = "  ".join(f"{key} {row[key]:.4f}" for key in list(row)[2:])
                mark = "  (as trained)" if row["steps"] == trained else ""
                print(f"  {row['steps']:>4} steps, {row['forward_nfe']:>4} evaluations: {figures}{mark}")


def most_steps(module: nn.Module) -> int:
    """Steps of the deepest solver; 0 without a solver."""
    return max((layer.solver.max_steps for layer in equilibria(module)), default=0)


def evaluations(module: nn.Module) -> int:
    """Evaluations of f in one forward pass, at most."""
    return sum(layer.solver.max_steps * layer.solver.evaluations_per_step for layer in equilibria(module))


def depths(steps: int) -> list[int]:
    """1, 2, 4, ... below `steps`, then `steps`, twice and four times as many; none for 0."""
    below = [2**k for k in range(steps.bit_length()) if 2**k < steps]
    return [*below, steps, 2 * steps, 4 * steps] if steps else []


@contextmanager
def solver_steps(module: nn.Module, steps: int) -> Iterator[None]:
    """Let the deepest solver make so many steps, and the others the same fraction of theirs, at least one."""
    layers = equilibria(module)
    solvers = [layer.solver for layer in layers]
    most = most_steps(module)
    try:
        for layer, solver in zip(layers, solvers, strict=True):
            scaled = max(1, round(solver.max_steps * steps / most))
            layer.solver = dataclasses.replace(solver, max_steps=scaled)
        yield
    finally:
        for layer, solver in zip(layers, solvers, strict=True):
            layer.solver = solver


def draw(rows: list[dict[str, Any]], trained: int, path: Path) -> None:
    """One panel for each figure over the evaluations of f."""
    from matplotlib.figure import Figure

    keys = list(rows[0])[2:]
    canvas = Figure(figsize=(5 * len(keys), 3.4), layout="constrained")
    nfe = [row["forward_nfe"] for row in rows]
    for axis, key in zip(canvas.subplots(1, len(keys), squeeze=False).flat, keys, strict=True):
        axis.plot(nfe, [row[key] for row in rows], marker="o", markersize=4)
        axis.axvline(next(n for n, row in zip(nfe, rows, strict=True) if row["steps"] == trained), color="0.7", ls="--")
        axis.set(title=key, xlabel="evaluations of f (dashed: as trained)")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    canvas.savefig(path, dpi=120)
