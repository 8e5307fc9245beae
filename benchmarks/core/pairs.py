"""Every solver with every adjoint: error of the gradient, cost, and behavior without a fixed point.

    python -m benchmarks.core.pairs [--quick]

Two untrained blocks, float32: one that contracts, and a pre-norm transformer block, which has no fixed point.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_tensor_bytes, provenance, write_csv
from benchmarks.part import RESULTS
from benchmarks.quality.training import read
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
        """Evaluate f."""
        return 0.5 * torch.tanh(self.block(0.3 * z, x)) + x


def blocks(dim: int, tokens: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """The maps and their x."""
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
    """One forward and backward pass."""
    x = x.detach().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    value, stats, _ = solve_fixed_point(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint)
    grads = torch.autograd.grad(value, [x, *f.parameters()], weight)
    return Found(torch.cat([g.flatten().double() for g in grads]), stats, float(value.detach().abs().max()))


def measure(
    dim: int, tokens: int, solvers: Iterable[str] = SOLVERS, adjoints: Iterable[str] = ADJOINTS
) -> Iterator[dict[str, Any]]:
    """A row for every pair on every block."""
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
    """Relative L2 distance."""
    return float((value - reference).norm() / reference.norm())


def markdown(rows: Iterable[Mapping[str, str]], facts: Mapping[str, Any]) -> str:
    """One table per block."""
    header = (
        *(
            "solver",
            "adjoint",
            "residual",
            "largest in z",
            "error against BPTT",
            "error against the fixed point's gradient",
        ),
        *("evaluations, forward", "backward", "J products", "peak MiB"),
    )
    sections = [
        f"{EVALUATIONS} evaluations of f by the solver, float32; errors: relative L2 of the whole gradient (x and"
        f" parameters). `{facts['command']}`, {facts['date']}, torch {facts['versions']['torch']}, commit"
        f" {facts['commit'][:7]}."
    ]
    rows = list(rows)
    for block in dict.fromkeys(row["block"] for row in rows):
        own = [row for row in rows if row["block"] == block]
        lines = [
            [*(row[key] for key in ("solver", "adjoint")), *(row[key] or "-" for key in list(row)[3:])] for row in own
        ]
        sections += [f"### A block {block}" if block[0] == "w" else f"### A {block} block", table(header, lines)]
    return "\n\n".join(sections)


def main() -> None:
    """Measure and write the tables to the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a small block, different from the page's")
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder")
    options = parser.parse_args()
    if options.quick and options.output == parser.get_default("output"):
        parser.error("--quick measures a different block than the page's: choose another folder with --output")
    torch.set_num_threads(1)
    rows = list(measure(dim=16, tokens=4) if options.quick else measure(dim=64, tokens=32))
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "pairs.csv", rows)
    text = markdown(read(options.output / "pairs.csv"), provenance("python -m benchmarks.core.pairs"))
    (options.output / "pairs.md").write_text(f"# Solvers and adjoints, measured\n\n{text}\n")
    print(text)
    if options.output == RESULTS:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
