"""Distance from the fixed point of every solver after the same number of evaluations."""

from typing import Any

import torch
from torch import Tensor

from revdeq_lightning.equilibrium import (
    AbstractSolver,
    BackpropAdjoint,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
    solve_fixed_point,
)

NORM = 0.9
DIM, BATCH = 64, 8


def measure(quick: bool) -> list[dict[str, Any]]:
    """Relative L2 distance, geometric mean over the maps."""
    evaluations = (4, 8) if quick else (2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
    num_maps = 1 if quick else 5
    rows: list[dict[str, Any]] = []
    for kind in ("symmetric", "random"):
        maps = [_Map(kind, seed) for seed in range(num_maps)]
        for count in evaluations:
            for name, solver in solvers(count).items():
                distances = torch.stack([m.distance(solver) for m in maps])
                mean = float(distances.log().mean().exp())
                rows.append({"weights": kind, "solver": name, "evaluations": count, "distance": mean})
    return rows


def solvers(num_evaluations: int) -> dict[str, AbstractSolver]:
    """Every solver, with the same number of evaluations."""
    half = num_evaluations // 2
    return {
        "Picard": PicardSolver(max_steps=num_evaluations),
        "relaxed 0.8": RelaxedSolver(beta=0.8, max_steps=num_evaluations),
        "RevDEQ 0.5": ReversibleSolver(beta=0.5, max_steps=half),
        "RevDEQ 0.8": ReversibleSolver(beta=0.8, max_steps=half),
        "momentum 1/16": MomentumSolver(momentum=1 / 16, max_steps=num_evaluations),
        "momentum 1/8": MomentumSolver(momentum=1 / 8, max_steps=num_evaluations),
        "momentum 1/4": MomentumSolver(momentum=1 / 4, max_steps=num_evaluations),
    }


class _Map:
    """`f(z, x) = tanh(W z + x)` in float64, `norm(W) = 0.9`, and its fixed point by 2000 plain iterations."""

    def __init__(self, kind: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
        if kind == "symmetric":
            weight = weight + weight.T
        self.weight = NORM * weight / torch.linalg.matrix_norm(weight, 2)
        self.x = 0.4 * torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
        self.fixed_point = torch.zeros_like(self.x)
        for _ in range(2000):
            self.fixed_point = self(self.fixed_point, self.x)

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + x)

    def distance(self, solver: AbstractSolver) -> Tensor:
        with torch.no_grad():
            value = solve_fixed_point(
                self, torch.zeros_like(self.x), self.x, solver=solver, adjoint=BackpropAdjoint()
            ).value
        distance: Tensor = (value - self.fixed_point).norm() / self.fixed_point.norm()
        return distance
