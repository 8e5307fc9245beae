"""Small equilibria, and the comparison of a gradient with that of BPTT under the same conditions."""

import pytest
import torch
from blocks import AttentionBlock, relative_error

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)

SOLVERS = {
    "reversible": ReversibleSolver(beta=0.8, max_steps=4),
    "momentum": MomentumSolver(beta=0.8, momentum=0.125, max_steps=7),
    "tolerance": ReversibleSolver(beta=0.5, max_steps=6, rtol=0.2),
}
REVERSIBLE, BPTT = ReversibleAdjoint(mismatch="raise"), BackpropAdjoint()
"""`mismatch="raise"`: a test also fails if the backward pass does not come back to the initial state bit for bit."""
TOLERANCE = 1e-5  # float32: rounding of f, some 1e-7, summed over the evaluations

with_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def attention_layer(solver, adjoint, dim=16, **settings):
    """The same layer for every adjoint."""
    torch.manual_seed(0)
    return EquilibriumLayer(AttentionBlock(dim=dim, num_heads=2, **settings), solver=solver, adjoint=adjoint)


def sequence(seed=1, batch=4, time=5, dim=16, **settings):
    return torch.randn(batch, time, dim, generator=torch.Generator().manual_seed(seed), **settings).requires_grad_()


def project(value):
    """A loss whose gradient differs from element to element."""
    return (value * torch.sin(torch.arange(value.numel()).to(value).view(value.shape))).sum()


def gradients_of(module, *inputs):
    return [tensor.grad for tensor in (*module.parameters(), *inputs)]


def assert_equal_gradients(ours, reference, tolerance=TOLERANCE):
    assert len(ours) == len(reference) > 0
    assert any(gradient is not None for gradient in reference)
    for i, (gradient, expected) in enumerate(zip(ours, reference, strict=True)):
        assert (gradient is None) == (expected is None), i
        if gradient is not None:
            assert gradient.dtype == expected.dtype
            assert gradient.shape == expected.shape
            assert relative_error(gradient, expected) <= tolerance, i


def assert_matches_bptt(run, tolerance=TOLERANCE):
    """`run(adjoint)` returns gradients; it must do the same for both adjoints."""
    assert_equal_gradients(run(REVERSIBLE), run(BPTT), tolerance)


def assert_layer_matches_bptt(make, tolerance=TOLERANCE):
    """`make(adjoint)` returns a layer and its inputs."""

    def run(adjoint):
        layer, *inputs = make(adjoint)
        project(layer(*inputs).value).backward()
        return gradients_of(layer, *inputs)

    assert_matches_bptt(run, tolerance)
