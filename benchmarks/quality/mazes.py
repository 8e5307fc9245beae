"""The competitors of the mazes: the configuration `reasoning/mazes.yaml` with each gradient, and stacks of layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule

from benchmarks.quality.__main__ import Part, Variant
from benchmarks.quality.budget import Budget, settings_of
from revdeq_lightning.data.puzzles.module import PuzzleDataModule
from revdeq_lightning.models import ReasonerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.tasks.optimizers import OptimizerConfig
from revdeq_lightning.tasks.reasoning import ReasoningTask

CONFIG = "configs/reasoning/mazes.yaml"
SETTINGS = settings_of([CONFIG])
CHANNELS = SETTINGS["model"]["network"]["channels"]
THIN = 12
"""Channels with which 32 explicit layers have about as many parameters as the equilibrium model."""
EXACT, PAPER, FLOAT64, STORED = "exact, momentum", "exact, paper's solver", "float64, paper's solver", "stored BPTT"
LAST = {number: f"truncated BPTT, last {number}" for number in (10, 5, 1)}
ONE_STEP, PHANTOM, IMPLICIT = "one step", "phantom, 10 steps", "implicit, Anderson"
STACK, THIN_STACK = "explicit stack", "explicit stack, equal parameters"
STARTS = ("random_start", "late_start", "late_steps")
FROM_ZERO = {name: f"{name}, from zero" for name in (EXACT, LAST[5], ONE_STEP)}
"""Gradients that are also trained without the configuration's random and late starts."""
TEST_SIZES = [9, 13, 19]
TINY = {"model.network.channels": 4, "data.size": 3, "data.test_sizes": [4], "data.batch_size": 4}
TINY |= {"data.num_test": 4, "data.num_validation": 4}


def solvers(evaluations: int) -> dict[str, dict[str, Any]]:
    """Settings of solver and adjoint by gradient, each with so many evaluations of f.

    Where a gradient does not ask for a solver of its own, the iteration is that of the configuration. If nothing is
    inverted, its state is float32, which needs the least memory.
    """
    base = {"solver": "momentum", "momentum": SETTINGS["model"]["solver"]["momentum"], "max_steps": evaluations}
    paper = {"solver": "reversible", "beta": 0.8, "max_steps": evaluations // 2}
    plain = {**base, "arithmetic": "float32"}
    anderson = {"rtol": 1e-2, "unconverged": "ignore", "backward_max_steps": evaluations, "backward_rtol": 1e-2}
    return {
        EXACT: base,
        PAPER: paper,
        FLOAT64: {**paper, "arithmetic": "float64"},
        STORED: {**plain, "adjoint": "backprop"},
        **{name: {**plain, "adjoint": "backprop", "backprop_evaluations": n} for n, name in LAST.items()},
        ONE_STEP: {**plain, "adjoint": "phantom", "phantom_steps": 1, "phantom_beta": 1.0},
        PHANTOM: {**plain, "adjoint": "phantom"},
        IMPLICIT: {"solver": "anderson", "max_steps": evaluations, "adjoint": "implicit", **anderson},
    }


def variants(evaluations: int, changes: Mapping[str, Any] | None = None) -> dict[str, Variant]:
    """Every competitor; a stack has as many layers as the others make evaluations."""
    found = {name: {"model.solver": solver} for name, solver in solvers(evaluations).items()}
    for name, channels in ((STACK, CHANNELS), (THIN_STACK, THIN)):
        network = SETTINGS["model"]["network"] | {"channels": channels, "num_layers": evaluations}
        found[name] = {"model.solver": {"solver": "none"}, "model.network": network}
    return {name: Variant((CONFIG,), own | dict(changes or {})) for name, own in found.items()}


def make(settings: dict[str, Any], path: None, seed: int, cache: Path) -> tuple[ReasoningTask, PuzzleDataModule]:
    data = PuzzleDataModule(**settings["data"] | {"seed": seed, "cache_dir": str(cache)})
    model = settings["model"]
    network = ReasonerConfig(
        num_symbols=data.num_symbols, num_answers=data.num_answers, shape=data.shape, **model["network"]
    )
    from_zero = model["solver"]["solver"] == "none" or not model["late_start"]
    starts = {} if from_zero else {name: model[name] for name in STARTS}
    solver, optimizer = SolverConfig(**model["solver"]), OptimizerConfig(**model["optimizer"])
    return ReasoningTask(network, solver, optimizer, **starts), data


def cell_accuracy(task: Any, batch: Any) -> tuple[float, float]:
    sums = task.evaluation_sums(batch)
    return float(100 * sums["cell_accuracy"]), float(sums["count"])


def sizes(quick: bool) -> list[int]:
    """Cells a side of the test mazes, the first as in training."""
    return [3, 4] if quick else [SETTINGS["data"]["size"], *TEST_SIZES]


def solved(task: LightningModule, data: Any, whole: bool) -> dict[int, float]:
    """Percent of the test mazes with every cell right, by size; the evaluations follow from the size alone."""
    sizes = [data.hparams["size"], *data.hparams["test_sizes"]]
    found = {}
    for size, loader in zip(sizes, data.test_dataloader(), strict=True):
        sums = [task.evaluation_sums(data.on_after_batch_transfer(batch, 0)) for batch in loader]
        found[size] = 100 * float(sum(s["solved"] for s in sums) / sum(s["count"] for s in sums))
    return found


def part(evaluations: int, quick: bool) -> Part:
    """The comparison with so many evaluations of f in training."""
    chosen = TINY if quick else {"data.test_sizes": TEST_SIZES, "data.num_test": 100}
    found = variants(evaluations, chosen)
    zero: dict[str, Any] = {"model.random_start": 0.0, "model.late_start": 0.0}
    found |= {new: found[name]._replace(changes=found[name].changes | zero) for name, new in FROM_ZERO.items()}
    return Part(
        name="mazes",
        title="Mazes",
        variants=found,
        optimizer=SETTINGS["model"]["optimizer"],
        make=make,
        figure=cell_accuracy,
        unit="solved mazes, %",
        smaller_is_better=False,
        budget=Budget(0.1, float("inf"), 60, 0, 2) if quick else Budget(360, float("inf"), 3000, 0, 600),
        search_seconds=0.05 if quick else 120,
        rates=(1.0,) if quick else (0.25, 0.5, 1.0),
        every=(1, 1),
        clip=SETTINGS["trainer"]["gradient_clip_val"],
    )
