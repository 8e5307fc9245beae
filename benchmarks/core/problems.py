"""Problems of the benchmarks: blocks that do not contract, solvers by name, and a training step of each competitor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.core.reference import Map, checkpointed, momentum_loop, reversible_loop
from revdeq_lightning.equilibrium import (
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    SolverStats,
    solve_fixed_point,
)
from tests.helpers.equilibrium import AttentionBlock, ConvBlock


class Member(NamedTuple):
    """A member of the reversible family, by its parameter: `beta` of RevDEQ or `momentum`."""

    name: str
    beta: float | None = None
    momentum: float | None = None

    @property
    def evaluations_per_step(self) -> int:
        return 2 if self.momentum is None else 1

    @property
    def label(self) -> str:
        """Solver and parameter, for tables."""
        return f"{self.name} {self.beta if self.momentum is None else self.momentum}"

    def solver(self, num_steps: int, arithmetic: str) -> ReversibleSolver | MomentumSolver:
        if self.momentum is not None:
            return MomentumSolver(momentum=self.momentum, max_steps=num_steps, arithmetic=arithmetic)
        assert self.beta is not None
        return ReversibleSolver(beta=self.beta, max_steps=num_steps, arithmetic=arithmetic)

    def loop(self, f: Map, z0: Tensor, x: Tensor, num_steps: int, state_dtype: torch.dtype) -> Tensor:
        if self.momentum is not None:
            return momentum_loop(f, z0, x, momentum=self.momentum, num_steps=num_steps, state_dtype=state_dtype)
        assert self.beta is not None
        return reversible_loop(f, z0, x, beta=self.beta, num_steps=num_steps, state_dtype=state_dtype)


def revdeq(beta: float) -> Member:
    return Member("RevDEQ", beta=beta)


def momentum(momentum: float) -> Member:
    return Member("momentum", momentum=momentum)


class Problem(NamedTuple):
    """A block with its inputs; `weight` is the gradient that arrives at the solver's value."""

    f: nn.Module
    z0: Tensor
    x: Tensor
    weight: Tensor

    @property
    def sources(self) -> list[Tensor]:
        """All tensors that get a gradient: z0, x, and every parameter."""
        return [self.z0, self.x, *self.f.parameters()]

    def gradient(self, value: Tensor) -> Tensor:
        """The whole gradient as one float64 vector."""
        grads = torch.autograd.grad(value, self.sources, self.weight.to(value.dtype))
        return torch.cat([g.flatten().double() for g in grads])


def attention_problem(
    batch: int, tokens: int, dim: int, num_heads: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """Untrained pre-norm transformer block; z0 is small but not zero, so that its gradient is generic."""
    torch.manual_seed(seed)
    f = AttentionBlock(dim, num_heads)
    return problem_of(f, (batch, tokens, dim), dtype)


def conv_problem(batch: int, channels: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    f = ConvBlock(channels, channels // 4)
    return problem_of(f, (batch, channels, size, size), dtype)


def problem_of(f: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    x, z0, weight = torch.randn(shape), 0.1 * torch.randn(shape), torch.randn(shape)
    return Problem(f.to(dtype), z0.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(), weight.to(dtype))


def reversible_step(
    problem: Problem, member: Member, num_steps: int, arithmetic: str, **settings: Any
) -> Callable[[], SolverStats]:
    solver, adjoint = member.solver(num_steps, arithmetic), ReversibleAdjoint(**settings)

    def run() -> SolverStats:
        value, stats, _ = solve_fixed_point(problem.f, problem.z0, problem.x, solver=solver, adjoint=adjoint)
        torch.autograd.grad(value, problem.sources, problem.weight)
        return stats

    return run


def bptt_step(problem: Problem, member: Member, num_steps: int, checkpoint: bool = False) -> Callable[[], None]:
    """Forward and backward pass through a plain float32 loop, stored or with a checkpoint per evaluation."""
    f = checkpointed(problem.f) if checkpoint else problem.f

    def run() -> None:
        value = member.loop(f, problem.z0, problem.x, num_steps, torch.float32)
        torch.autograd.grad(value, problem.sources, problem.weight)

    return run
