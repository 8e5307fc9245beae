"""Relative error of the whole gradient against BPTT of the same iteration, over solvers, depth and arithmetic."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.problems import Member, Problem, attention_problem, conv_problem, momentum, revdeq
from revdeq_lightning.equilibrium import ReversibleAdjoint, solve_fixed_point

MEMBERS = (revdeq(0.5), revdeq(0.8), revdeq(0.9), revdeq(1.2), momentum(1 / 16), momentum(1 / 8), momentum(1 / 4))
BLOCKS = ("attention", "conv")


def measure(quick: bool) -> list[dict[str, Any]]:
    """All rows of the table.

    `error`: relative L2 distance from BPTT (states in float64, f in `compute_dtype`); under bfloat16 autocast the
    distance from float32 BPTT, root mean square over four problems. `bptt_error` is the error of BPTT under the
    same autocast.
    """
    steps = (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64, 128)
    members = MEMBERS[1:6:4] if quick else MEMBERS
    rows: list[dict[str, Any]] = []
    for block in BLOCKS:
        for member in members:
            for num_steps in steps:
                rows += _float_rows(block, member, num_steps)
                if num_steps <= 32:
                    rows.append(_autocast_row(block, member, num_steps, 1 if quick else 4))
    return rows


def _float_rows(block: str, member: Member, num_steps: int) -> Iterator[dict[str, Any]]:
    for dtype, arithmetics in ((torch.float32, ("exact", "float64", "float32")), (torch.float64, ("exact",))):
        problem = make_problem(block, dtype)
        reference = bptt(problem, member, num_steps)
        for arithmetic in arithmetics:
            gradient, mismatch = reversible(problem, member, num_steps, arithmetic)
            yield _row(block, member, num_steps, arithmetic, dtype, error(gradient, reference), mismatch)


def _autocast_row(block: str, member: Member, num_steps: int, num_seeds: int) -> dict[str, Any]:
    """Root mean square over several problems, because one different bfloat16 rounding changes the trajectory."""
    errors, bptt_errors, mismatch = [], [], 0
    for seed in range(num_seeds):
        problem = make_problem(block, torch.float32, seed)
        reference = bptt(problem, member, num_steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same_autocast = bptt(problem, member, num_steps)
            gradient, count = reversible(problem, member, num_steps, "exact")
        errors.append(error(gradient, reference))
        bptt_errors.append(error(same_autocast, reference))
        mismatch += count
    row = _row(block, member, num_steps, "exact", torch.bfloat16, _root_mean_square(errors), mismatch)
    return row | {"bptt_error": _root_mean_square(bptt_errors)}


def make_problem(block: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    if block == "attention":
        return attention_problem(1, 32, 64, 4, dtype, seed)
    return conv_problem(2, 16, 8, dtype, seed)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def bptt(problem: Problem, member: Member, num_steps: int) -> Tensor:
    return problem.gradient(member.loop(problem.f, problem.z0, problem.x, num_steps, torch.float64))


def reversible(problem: Problem, member: Member, num_steps: int, arithmetic: str) -> tuple[Tensor, int]:
    value, stats, _ = solve_fixed_point(
        problem.f,
        problem.z0,
        problem.x,
        solver=member.solver(num_steps, arithmetic),
        adjoint=ReversibleAdjoint(mismatch="ignore"),
    )
    gradient = problem.gradient(value)
    assert stats.reconstruction_mismatch is not None
    return gradient, int(stats.reconstruction_mismatch)


def error(gradient: Tensor, reference: Tensor) -> float:
    found = float((gradient - reference).norm() / reference.norm())
    return found if math.isfinite(found) else math.nan


def _row(
    block: str, member: Member, num_steps: int, arithmetic: str, dtype: torch.dtype, error: float, mismatch: int
) -> dict[str, Any]:
    return {
        "block": block,
        "solver": member.label,
        "steps": num_steps,
        "evaluations": num_steps * member.evaluations_per_step,
        "arithmetic": arithmetic,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "reconstruction_mismatch": mismatch,
        "bptt_error": "",
    }
