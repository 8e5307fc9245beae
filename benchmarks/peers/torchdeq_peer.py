"""Compare with torchdeq: same f, same number of evaluations; gradient error, time, and memory.

    python -m benchmarks.peers.torchdeq_peer [--quick] [--output DIR]

torchdeq: `pip install -e '.[peers]'`. Every method calls f K times in the forward and K times in the backward pass
(JFB: once). Two blocks: `contracting` is half of a pre-norm attention block and has a fixed point, `as published` is
the block itself, which has none and never converges. Errors are relative L2 errors of the gradient of x and all
parameters:

* of the fixed point: compared with backpropagation through 200 plain iterations in float64, if there is a fixed point;
* of the iteration: compared with backpropagation in float64 through the same iteration that computed the value. This is
  the gradient of the computed loss. Available for solvers that are a plain loop.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import part
from benchmarks.core.problems import Problem, attention_problem, momentum, revdeq
from benchmarks.core.reference import bare_evaluations
from benchmarks.measure import paired_ratio, peak_tensor_bytes, time_interleaved
from benchmarks.requirements import Requirement, Rows, at_most, largest
from revdeq_lightning.equilibrium import (
    AbstractAdjoint,
    AbstractSolver,
    AndersonSolver,
    BackpropAdjoint,
    ImplicitAdjoint,
    PicardSolver,
    ReversibleAdjoint,
    solve_fixed_point,
)

EVALUATIONS = (8, 16, 32)
MANY = 200
MAX_ERROR = 1e-5
Loop = Callable[[Any, Tensor, Tensor], Tensor]


class Half(nn.Module):
    """`block / 2`, which contracts although the block does not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        value: Tensor = 0.5 * self.block(z, x)
        return value


class Method(NamedTuple):
    """Solver and gradient; `loop` is the iteration as a plain function, or None."""

    name: str
    solve: Callable[[Problem], Tensor]
    loop: Loop | None


def picard(num: int) -> Loop:

    def run(f: Any, z: Tensor, x: Tensor) -> Tensor:
        for _ in range(num):
            z = f(z, x)
        return z

    return run


def ours(name: str, solver: AbstractSolver, adjoint: AbstractAdjoint, loop: Loop | None) -> Method:

    def solve(problem: Problem) -> Tensor:
        value: Tensor = solve_fixed_point(problem.f, problem.z0, problem.x, solver=solver, adjoint=adjoint).value
        return value

    return Method(name, solve, loop)


def theirs(name: str, loop: Loop | None, **settings: Any) -> Method:
    """torchdeq, without early stops."""
    import torchdeq

    never = {"f_tol": 0.0, "b_tol": 0.0, "f_stop_mode": "rel", "b_stop_mode": "rel"}
    deq = torchdeq.get_deq(**never, **settings)

    def solve(problem: Problem) -> Tensor:
        value: Tensor = deq(lambda z: problem.f(z, problem.x), problem.z0)[0][-1]
        return value

    return Method(name, solve, loop)


def methods(k: int) -> list[Method]:
    implicit = {"ift": True, "f_max_iter": k - 1, "b_max_iter": k - 1}
    heavy_ball, paper = momentum(1 / 8), revdeq(0.8)
    never = AndersonSolver(max_steps=k - 1, rtol=1e-15)
    anderson = ImplicitAdjoint(solver=never, unconverged="ignore")

    def family_loop(member: Any, steps: int) -> Loop:
        return lambda f, z, x: member.loop(f, z, x, steps, torch.float64)

    return [
        ours(
            "momentum 1/8, reversible",
            heavy_ball.solver(k, "exact"),
            ReversibleAdjoint(),
            family_loop(heavy_ball, k),
        ),
        ours(
            "RevDEQ 0.8, reversible",
            paper.solver(k // 2, "exact"),
            ReversibleAdjoint(),
            family_loop(paper, k // 2),
        ),
        ours("Picard, stored", PicardSolver(max_steps=k), BackpropAdjoint(), picard(k)),
        ours("Anderson, implicit", AndersonSolver(max_steps=k - 1), anderson, None),
        theirs("torchdeq: Picard, implicit", picard(k), f_solver="fixed_point_iter", **implicit),
        theirs("torchdeq: Anderson, implicit", None, f_solver="anderson", b_solver="anderson", **implicit),
        theirs("torchdeq: Broyden, implicit", None, f_solver="broyden", b_solver="broyden", **implicit),
        theirs("torchdeq: Picard, one step (JFB)", picard(k), f_solver="fixed_point_iter", f_max_iter=k - 1, grad=1),
        theirs("torchdeq: Picard, unrolled", picard(k), f_solver="fixed_point_iter", f_max_iter=1, grad=k - 1),
    ]


def problems(quick: bool) -> dict[str, Callable[[torch.dtype], Problem]]:
    """The two blocks, in a precision."""
    tokens, dim = (16, 32) if quick else (512, 192)

    def published(dtype: torch.dtype) -> Problem:
        return attention_problem(1, tokens, dim, dim // 32, dtype)

    def contracting(dtype: torch.dtype) -> Problem:
        problem = published(dtype)
        return problem._replace(f=Half(problem.f))

    return {"contracting": contracting, "as published": published}


def measure(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for block, make in problems(quick).items():
        problem, wide = make(torch.float32), make(torch.float64)
        fixed_point = through(picard(MANY), wide) if block == "contracting" else None
        for k in EVALUATIONS[:1] if quick else EVALUATIONS:
            rows += [{"block": block, "evaluations": k} | row for row in _compare(problem, wide, fixed_point, k, quick)]
    return rows


def _compare(problem: Problem, wide: Problem, fixed_point: Tensor | None, k: int, quick: bool) -> list[dict[str, Any]]:
    rounds = 1 if quick else 5
    competitors = methods(k)
    runs: dict[str, Callable[[], Any]] = {m.name: lambda m=m: gradient(problem, m) for m in competitors}  # type: ignore[misc]
    state, parameters = torch.randn_like(problem.z0), list(problem.f.parameters())
    runs["bare"] = lambda: bare_evaluations(problem.f, state, problem.x, parameters, k)
    timings = time_interleaved(runs, rounds)
    rows = []
    for method in competitors:
        own = gradient(problem, method)
        reference = None if method.loop is None else through(method.loop, wide)
        seconds = timings[method.name].process_seconds
        rows.append(
            {
                "method": method.name,
                "of the fixed point": _error(own, fixed_point),
                "of the iteration": _error(own, reference),
                "CPU seconds": sorted(seconds)[rounds // 2],
                "time over bare evaluations": paired_ratio(seconds, timings["bare"].process_seconds).median,
                "peak MiB": peak_tensor_bytes(runs[method.name]) / 2**20,
            }
        )
    return rows


def gradient(problem: Problem, method: Method) -> Tensor:
    """Gradient of x and every parameter, as one float64 vector."""
    value = method.solve(problem)
    grads = torch.autograd.grad(value, problem.sources[1:], problem.weight)
    return torch.cat([g.flatten().double() for g in grads])


def through(loop: Loop, wide: Problem) -> Tensor:
    """The same by backpropagation through a plain loop."""
    return wide.gradient(loop(wide.f, wide.z0, wide.x))[wide.z0.numel() :]


def _error(own: Tensor, reference: Tensor | None) -> float | None:
    return None if reference is None else float((own - reference).norm() / reference.norm())


def judge(rows: Rows) -> list[Requirement]:
    """Require that our gradients are those of the computed value."""
    exact = [row["of the iteration"] for row in rows if row["method"].endswith(("reversible", "stored"))]
    return [at_most("gradient error of the iteration, ours, largest", largest(exact), MAX_ERROR, "{:.1e}")]


def page(rows: Rows) -> list[str]:
    paragraphs = []
    for block in dict.fromkeys(row["block"] for row in rows):
        lines = [
            {
                "K": row["evaluations"],
                "method": row["method"],
                "error: of the fixed point": _short(row["of the fixed point"]),
                "error: of the iteration": _short(row["of the iteration"]),
                "CPU seconds": f"{row['CPU seconds']:.3f}",
                "over bare evaluations": f"{row['time over bare evaluations']:.2f}",
                "peak MiB": f"{row['peak MiB']:.1f}",
            }
            for row in rows
            if row["block"] == block
        ]
        paragraphs += [f"Block: {block}", part.markdown_table(lines)]
    return paragraphs


def _short(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"


def run(options: argparse.Namespace) -> part.Result:
    if importlib.util.find_spec("torchdeq") is None:
        raise part.Skipped("torchdeq not installed: pip install -e '.[peers]'")
    rows = measure(options.quick)
    return part.Result({"methods": rows}, judge(rows), page(rows), packages=("torchdeq",))


main = part.command("peers.torchdeq_peer", "Against torchdeq", __doc__, run)

if __name__ == "__main__":
    sys.exit(main())
