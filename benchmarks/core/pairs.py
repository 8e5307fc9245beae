"""Every solver with every adjoint: error of the gradient, cost, and behavior without a fixed point.

    python -m benchmarks.core.pairs [--quick]

Two untrained blocks, float32: one that contracts, and a pre-norm transformer block, which has no fixed point.
"""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import part
from benchmarks.measure import peak_tensor_bytes, provenance
from benchmarks.report import table
from revdeq_lightning.equilibrium import (
    AbstractAdjoint,
    AbstractSolver,
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    ConvergenceWarning,
    DivergenceError,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    SolverStats,
    solve_fixed_point,
)
from tests.helpers.equilibrium import AttentionBlock

PAGE = Path(__file__).parents[2] / "docs" / "solvers-and-adjoints.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
EVALUATIONS = 16
MEASURED = ("residual", "largest", "error_bptt", "error_fixed_point", "forward", "backward", "products", "mib")
SOLVERS: dict[str, AbstractSolver] = {
    "Picard": PicardSolver(),
    "relaxed 0.8": RelaxedSolver(beta=0.8),
    "RevDEQ 0.8": ReversibleSolver(beta=0.8),
    "momentum 1/8": MomentumSolver(momentum=0.125),
    "Anderson": AndersonSolver(),
    "Broyden": BroydenSolver(),
    "Broyden, no line search": BroydenSolver(max_halvings=0),
}
ADJOINTS: dict[str, AbstractAdjoint] = {
    "reversible": ReversibleAdjoint(),
    "backprop": BackpropAdjoint(),
    "backprop, checkpointed": BackpropAdjoint(checkpoint=True),
    "backprop, last 4": BackpropAdjoint(num_evaluations=4),
    "implicit": ImplicitAdjoint(),
    "phantom, unrolled 4": PhantomAdjoint(num_steps=4, beta=1.0),
    "phantom, Neumann 4": PhantomAdjoint(num_steps=4, beta=1.0, kind="neumann"),
    "Jacobian-free": PhantomAdjoint(num_steps=1, beta=1.0),
}


class Contracting(nn.Module):
    """`0.5 * tanh(block(z, x)) + x`: bounded, and contracting enough for every solver."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.block(0.3 * z, x)) + x


def blocks(dim: int, tokens: int) -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(4, tokens, dim)
    transformer = AttentionBlock(dim, num_heads=4)
    return {"contracting": (Contracting(transformer), x), "without a fixed point": (transformer, x)}


class Found(NamedTuple):
    """Result of a pair: the gradient of a fixed random projection of z with respect to x and the parameters of f."""

    gradient: Tensor
    stats: SolverStats
    largest: float
    """Largest magnitude in the state."""


def solve(f: nn.Module, x: Tensor, solver: AbstractSolver, adjoint: AbstractAdjoint) -> Found:
    x = x.detach().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    value, stats, _ = solve_fixed_point(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint)
    grads = torch.autograd.grad(value, [x, *f.parameters()], weight)
    return Found(torch.cat([g.flatten().double() for g in grads]), stats, float(value.detach().abs().max()))


def measure(
    dim: int, tokens: int, solvers: Iterable[str] = SOLVERS, adjoints: Iterable[str] = ADJOINTS
) -> Iterator[dict[str, Any]]:
    for block, (f, x) in blocks(dim, tokens).items():
        truth = fixed_point_gradient(f, x)
        for solver_name in solvers:
            solver = SOLVERS[solver_name]
            solver = dataclasses.replace(solver, max_steps=EVALUATIONS // solver.evaluations_per_step)
            bptt = attempt(f, x, solver, BackpropAdjoint())
            for adjoint_name in adjoints:
                adjoint = ADJOINTS[adjoint_name]
                if adjoint_name == "reversible" and not isinstance(solver, ReversibleSolver | MomentumSolver):
                    continue
                row = {"block": block, "solver": solver_name, "adjoint": adjoint_name}
                yield row | measure_pair(f, x, solver, adjoint, bptt, truth)


def measure_pair(
    f: nn.Module,
    x: Tensor,
    solver: AbstractSolver,
    adjoint: AbstractAdjoint,
    bptt: "Found | None",
    truth: Tensor | None,
) -> dict[str, Any]:
    """Errors, counts, and memory of one pair; empty if it diverged."""
    found = attempt(f, x, solver, adjoint)
    if found is None:
        return dict.fromkeys(MEASURED, "")
    stats = found.stats
    peak = peak_tensor_bytes(lambda: attempt(f, x, solver, adjoint))
    return {
        "residual": f"{float(stats.relative_residual.max()):.1e}",
        "largest": f"{found.largest:.1e}",
        "error_bptt": "" if bptt is None else f"{relative_error(found.gradient, bptt.gradient):.1e}",
        "error_fixed_point": "" if truth is None else f"{relative_error(found.gradient, truth):.1e}",
        "forward": stats.forward_nfe,
        "backward": stats.backward_nfe or 0,
        "products": stats.backward_num_products or 0,
        "mib": f"{peak / 2**20:.2f}",
    }


def fixed_point_gradient(f: nn.Module, x: Tensor) -> Tensor | None:
    """Gradient by the implicit function theorem in float64, if a fixed point is found."""
    tight = AndersonSolver(max_steps=300, rtol=1e-12)
    f64 = f.double()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            return solve(f64, x.double(), tight, ImplicitAdjoint(solver=tight)).gradient
    except (ConvergenceWarning, DivergenceError):
        return None
    finally:
        f.float()


def attempt(f: nn.Module, x: Tensor, solver: AbstractSolver, adjoint: AbstractAdjoint) -> Found | None:
    """None if the iteration or the linear solve diverged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            return solve(f, x, solver, adjoint)
        except DivergenceError:
            return None


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def page(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    header = (
        *("solver", "adjoint", "residual", "largest in z", "error against BPTT"),
        *("error against the fixed point's gradient", "evaluations, forward", "backward", "J products", "peak MiB"),
    )
    sections = [
        f"{EVALUATIONS} evaluations of f by the solver, float32; errors: relative L2 of the whole gradient (x and"
        f" parameters). `{facts['command']}`, {facts['date']}, torch {facts['versions']['torch']}, commit"
        f" {facts['commit'][:7]}."
    ]
    for block in dict.fromkeys(row["block"] for row in rows):
        lines = [[str(cell) or "-" for cell in list(row.values())[1:]] for row in rows if row["block"] == block]
        sections += [f"### A block {block}" if block[0] == "w" else f"### A {block} block", table(header, lines)]
    return sections


def run(options: argparse.Namespace) -> part.Result:
    """Measure, and write the tables to the page of the documentation, too."""
    to_docs = options.output == part.RESULTS
    if options.quick and to_docs:
        raise part.Misused("--quick measures a different block than the page's: choose another folder with --output")
    rows = list(measure(dim=16, tokens=4) if options.quick else measure(dim=64, tokens=32))
    sections = page(rows, provenance("python -m benchmarks.core.pairs"))
    if to_docs:
        before, rest = PAGE.read_text().split(BEGIN)
        text = "\n\n".join(sections)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    return part.Result({"": rows}, [], sections)


main = part.command("core.pairs", "Solvers and adjoints, measured", __doc__, run)

if __name__ == "__main__":
    sys.exit(main())
