"""f works in place on what it gets, and the caller on what a solve returns: every solver, adjoint and mode."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    ReconstructionError,
    ReversibleAdjoint,
    ReversibleSolver,
)
from tests.helpers.equilibrium import (
    BPTT,
    EVERY_SOLVER,
    REVERSIBLE,
    assert_equal_gradients,
    project,
    solve,
    with_every_pair,
    with_every_solver,
)

MODES = {
    "training": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def modes_of(adjoint):
    """Without gradients every adjoint runs the same loop, the reversible one after a check of f."""
    return MODES if isinstance(adjoint, BackpropAdjoint | ReversibleAdjoint) else ["training"]


class PreActivation(nn.Module):
    """A block that begins with an activation of the state, as those of residual networks do."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.act, self.linear = nn.ReLU(inplace), nn.Linear(4, 4)
        nn.init.normal_(self.linear.weight, std=0.15)

    def forward(self, z, x):
        return self.linear(self.act(z)) + x


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)


@with_every_pair
def test_f_that_works_in_place_on_the_state(solver, adjoint):
    """The twin that does not is the oracle, to the bit."""
    for mode in modes_of(adjoint):
        results = []
        for inplace in (True, False):
            f, (x, z0) = PreActivation(inplace), inputs()
            given = z0.clone()
            with MODES[mode]():
                # In inference mode both kinds of tensors: made within, which count no changes, and outside.
                x = x.clone().requires_grad_(mode == "training")
                solution = solve(f, x, solver, adjoint, given)
            assert torch.equal(given, z0)
            results.append([solution.value, solution.stats.relative_residual])
            if mode == "training":
                project(solution.value).backward()
                results[-1] += [x.grad, *(p.grad for p in f.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), mode


class AddsInPlace(nn.Module):
    """From its second call on, if `late`: what it changes is then known too late for a copy."""

    def __init__(self, changed, late=False):
        super().__init__()
        self.linear, self.changed, self.late, self.calls = nn.Linear(4, 4), changed, late, 0

    def forward(self, z, x):
        self.calls += 1
        value = torch.tanh(self.linear(z) + x["a"][:, 0])
        if self.calls > 1 or not self.late:
            with torch.no_grad():
                {"x": x["a"], "z": z}[self.changed][:, :1].add_(1.0)
        return value


@with_every_pair
def test_what_would_change_later_evaluations_is_an_error(solver, adjoint):
    for mode, (changed, late) in itertools.product(modes_of(adjoint), (("x", False), ("x", True), ("z", True))):
        f, (x, z0) = AddsInPlace(changed, late), inputs()
        message = rf"f changes its {changed} in place \(evaluation {1 + late}\).*clone"
        with MODES[mode](), pytest.raises(RuntimeError, match=message):
            solve(f, {"a": x.clone()[:, None]}, solver, adjoint, z0.clone())


MAPS = {
    "tanh": lambda z, x: torch.tanh(0.5 * z + x),  # autograd keeps its result
    "x_itself": lambda z, x: x,
    "z_itself": lambda z, x: z,
    "view_of_x": lambda z, x: x.view(x.shape),
}


@with_every_pair
def test_the_value_is_memory_of_its_own(solver, adjoint):
    """An in-place operation right after the layer changes no gradient, and neither x nor z0."""
    for mode, name in itertools.product(modes_of(adjoint), MAPS):
        results = []
        for inplace in (True, False):
            x, z0 = (leaf.requires_grad_() for leaf in inputs())
            with MODES[mode]():
                value = solve(MAPS[name], x, solver, adjoint, z0).value
                value = value.mul_(3.0).relu_() if inplace else (value * 3.0).relu()
            assert torch.equal(x, inputs()[0]), name
            assert torch.equal(z0, inputs()[1]), name
            results.append([value])
            if value.requires_grad:
                project(value).backward()
                results[-1] += [tensor.grad for tensor in (x, z0) if tensor.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (mode, name)


@with_every_solver
def test_after_one_step_too(make):
    x, z0 = inputs()
    with torch.no_grad():
        solve(MAPS["z_itself"], x, make(max_steps=1), BPTT, z0).value.fill_(7.0)
    assert torch.equal(z0, inputs()[1])


@pytest.mark.parametrize("adjoint", [BPTT, REVERSIBLE, ImplicitAdjoint(unconverged="ignore")])
def test_states_on_the_way_are_memory_of_their_own(adjoint):
    gradients = []
    for inplace in (True, False):
        layer = EquilibriumLayer(PreActivation(False), solver=MomentumSolver(max_steps=6), adjoint=adjoint, num_parts=3)
        x, z0 = inputs()
        solution = layer(x.requires_grad_(), z0)
        values = [part.value for part in (*solution.earlier, solution)]
        sum(project(v.mul_(2.0) if inplace else v * 2.0) for v in values).backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    assert_equal_gradients(*gradients, 0.0)


def test_f_that_returns_the_same_memory_each_time():
    """As a CUDA graph does: the state is a copy, or it is noticed that f overwrites it."""
    buffer = torch.empty(3, 4)

    def f(z, x):
        return torch.add(0.5 * z, x, out=buffer)

    x, _ = inputs()
    with torch.no_grad():
        for name, make in EVERY_SOLVER.items():
            solver = make(max_steps=40)
            if name == "picard":  # its state is what f returned
                with pytest.raises(RuntimeError, match="f changes its z in place"):
                    solve(f, x, solver, BPTT)
                continue
            value = solve(f, x, solver, BPTT).value
            assert torch.allclose(value, 2 * x, atol=1e-3), name
            before = value.clone()
            f(value, x)
            assert torch.equal(value, before), name


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.LazyLinear(8), nn.Linear(8, 4)

    def forward(self, z, x):
        return 0.2 * self.out(torch.tanh(self.hidden(z))) + x


@pytest.mark.parametrize("adjoint", [REVERSIBLE, BPTT, PhantomAdjoint()])
def test_lazy_modules_take_their_shapes_from_the_first_solve(adjoint):
    torch.manual_seed(0)
    layer = EquilibriumLayer(Lazy(), solver=ReversibleSolver(max_steps=3), adjoint=adjoint)
    x, _ = inputs()
    first = layer(x)
    project(first.value).backward()
    assert type(layer.f.hidden) is nn.Linear
    assert layer.f.hidden.weight.shape == (8, 4)
    assert all(p.grad is not None for p in layer.parameters())
    assert first.stats.forward_nfe == layer(x).stats.forward_nfe
    assert torch.equal(first.value, layer(x).value)


def test_a_change_that_pytorch_does_not_count():
    """Through `.data`, say: only the certificate notices it."""

    def f(z, x):
        x.data.mul_(0.9)
        return torch.tanh(0.5 * z + x)

    value = solve(f, inputs()[0].requires_grad_(), MomentumSolver(max_steps=3), REVERSIBLE).value
    with pytest.raises(ReconstructionError, match="data changed in place"):
        project(value).backward()


def test_picard_does_not_copy_at_every_evaluation():
    """Only the first evaluation gets a copy, by which a change is noticed."""
    seen = []

    def f(z, x):
        seen.append(z.data_ptr())
        return returned[len(seen) - 1]

    returned = [torch.full((3, 4), float(k)) for k in range(5)]
    with torch.no_grad():
        solve(f, None, PicardSolver(max_steps=5), BPTT, torch.zeros(3, 4))
    assert seen[1:] == [leaf.data_ptr() for leaf in returned[:4]]
