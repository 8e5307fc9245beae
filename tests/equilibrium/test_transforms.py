"""What torch.func, forward mode, and tracing make of a solve: what they make of a plain loop, or an error of ours."""

import contextlib
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    DivergenceError,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import PAIRS, gradients, relative_error, with_every_pair

# PyTorch's own advice, when it loads its rules for forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

NUM_LOOPS = 20
SOLVERS = {
    "picard": PicardSolver(max_steps=14),
    "relaxed": RelaxedSolver(max_steps=20),
    "reversible": ReversibleSolver(max_steps=16),
    "momentum": MomentumSolver(max_steps=22),
    "float64": MomentumSolver(max_steps=22, arithmetic="float64"),
    "anderson": AndersonSolver(max_steps=11),
    "broyden": BroydenSolver(max_steps=12),
    "tolerance": AndersonSolver(max_steps=16, rtol=1e-13),
    "reversible tolerance": ReversibleSolver(max_steps=16, rtol=1e-9),
}
WORKS = {
    "backprop": BackpropAdjoint(),
    "checkpointed": BackpropAdjoint(checkpoint=True),
    "reversible": ReversibleAdjoint(mismatch="raise"),
    "unrolled": PhantomAdjoint(num_steps=14, beta=1.0),
}
REFUSED = {
    "implicit": ImplicitAdjoint(),
    "neumann": PhantomAdjoint(kind="neumann"),
}
OF_THE_VALUE = 1e-6
"""What is left of the distance to the fixed point after so few steps; the exact state is rounded to 2^-32."""


class Map(nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(not frozen)

    def forward(self, z, x):
        return 0.3 * torch.tanh(self.linear(z)) + x


class Net(nn.Module):
    """Returns the value alone, as programs without Python need it."""

    def __init__(self, solver, adjoint, f=None):
        super().__init__()
        self.layer = EquilibriumLayer(f or Map(), solver=solver, adjoint=adjoint)

    def forward(self, x):
        return self.layer(x).value


def normal(seed):
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, TANGENT, COTANGENT = normal(1), normal(2), normal(3)


def with_dual_numbers(net):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(X, TANGENT))).tangent


TRANSFORMS = {
    "jvp": lambda net: torch.func.jvp(net, (X,), (TANGENT,))[1],
    "dual numbers": with_dual_numbers,
    "dual numbers, no_grad": torch.no_grad()(with_dual_numbers),
    "jacfwd": lambda net: torch.func.jacfwd(net)(X),
    "grad": lambda net: torch.func.grad(lambda x: (net(x) * COTANGENT).sum())(X),
    "vjp": lambda net: torch.func.vjp(net, X)[1](COTANGENT)[0],
    "jacrev": lambda net: torch.func.jacrev(net)(X),
    "vmap": lambda net: torch.vmap(lambda x: net(x[None])[0])(X),
    "gradients of samples": lambda net: torch.vmap(torch.func.grad(lambda x: net(x[None]).square().sum()))(X),
    "of the parameters": lambda net: torch.func.grad(
        lambda parameters: (torch.func.functional_call(net, parameters, (X,)) * COTANGENT).sum()
    )({name: p.detach() for name, p in net.named_parameters()}),
}


FROZEN = ("dual numbers", "dual numbers, no_grad", "jvp", "grad", "gradients of samples")
"""Without parameters that need a gradient autograd records nothing, and a derivative could be lost."""


class Loop(nn.Module):
    """The oracle: plain iteration, with the names of `Net`."""

    def __init__(self, frozen):
        super().__init__()
        self.layer = nn.Module()
        self.layer.f = Map(frozen)

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(NUM_LOOPS):
            z = self.layer.f(z, x)
        return z


def flat(result):
    return torch.cat([t.detach().flatten() for t in (result.values() if isinstance(result, dict) else [result])])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("adjoint", [*WORKS.values(), *REFUSED.values()], ids=[*WORKS, *REFUSED])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_derivatives_are_those_of_a_plain_loop_or_refused(solver, adjoint, frozen):
    if isinstance(adjoint, ReversibleAdjoint) and not isinstance(solver, MomentumSolver | ReversibleSolver):
        return
    for name in FROZEN if frozen else TRANSFORMS:
        transform = TRANSFORMS[name]
        net, loop = Net(solver, adjoint, Map(frozen)), Loop(frozen)
        if adjoint in REFUSED.values():
            with pytest.raises(
                RuntimeError, match=rf"{type(adjoint).__name__} has no.*torch.func.*BackpropAdjoint\(\)"
            ):
                transform(net)
        else:
            ours, reference = flat(transform(net)), flat(transform(loop))
            assert reference.norm() > 0.1
            assert relative_error(ours, reference) <= OF_THE_VALUE, name


@pytest.mark.parametrize("name", SOLVERS)
def test_second_derivatives(name):
    """`hessian` is forward mode over reverse mode."""
    net, loop = Net(SOLVERS[name], BackpropAdjoint()), Loop(False)
    x = X[:1]
    ours, reference = (torch.func.hessian(lambda x, m=m: m(x).square().sum())(x) for m in (net, loop))
    assert relative_error(ours, reference) <= 1e-6  # Broyden's pairs are noise at the end


def test_truncated_backpropagation_is_the_same_in_both_modes():
    net = Net(MomentumSolver(max_steps=8), BackpropAdjoint(num_evaluations=2))
    assert relative_error(torch.func.jacfwd(net)(X), torch.func.jacrev(net)(X)) <= 1e-12
    x = X.clone().requires_grad_()
    plain = torch.autograd.grad((net(x) * COTANGENT).sum(), x)[0]
    assert relative_error(TRANSFORMS["grad"](net), plain) <= 1e-12


def test_an_ensemble_by_vmap_over_stacked_parameters():
    nets = [Net(MomentumSolver(max_steps=8), ReversibleAdjoint()) for _ in range(3)]
    with torch.no_grad():
        for k, net in enumerate(nets):
            net.layer.f.linear.weight.mul_(k)
    parameters, buffers = torch.func.stack_module_state(nets)
    values = torch.vmap(lambda p, b: torch.func.functional_call(nets[0], (p, b), (X,)))(parameters, buffers)
    (values * COTANGENT).sum().backward()
    for k, net in enumerate(nets):
        value = net(X)
        assert torch.equal(values[k], value)
        expected = gradients_by_backward(net, value)
        assert all(relative_error(parameters[name].grad[k], gradient) <= 1e-12 for name, gradient in expected.items())


def gradients_by_backward(net, value):
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((value * COTANGENT).sum(), parameters), strict=True))


@with_every_pair
def test_vmap_without_gradients_works_with_every_adjoint(solver, adjoint):
    net = Net(solver, adjoint)
    with torch.no_grad():
        assert relative_error(TRANSFORMS["vmap"](net), net(X)) <= 1e-12


def test_f_that_works_in_place_under_vmap():
    class InPlace(Map):
        def forward(self, z, x):
            z.mul_(0.5)
            return super().forward(z, x.add_(1))

    class Copying(Map):
        def forward(self, z, x):
            return super().forward(0.5 * z, x + 1)

    for solver in (PicardSolver(max_steps=3), MomentumSolver(max_steps=3)):
        for name in ("vmap", "grad", "jacfwd"):
            ours, twin = (TRANSFORMS[name](Net(solver, BackpropAdjoint(), f)) for f in (InPlace(), Copying()))
            assert torch.equal(ours, twin)


MANY = {
    "is_grads_batched": lambda value, x, g: torch.autograd.grad(value, x, g, is_grads_batched=True)[0],
    "vmap": lambda value, x, g: torch.vmap(lambda g: torch.autograd.grad(value, x, g, retain_graph=True)[0])(g),
}


@pytest.mark.parametrize("way", MANY)
@pytest.mark.parametrize(
    "adjoint", [*WORKS.values(), *REFUSED.values(), BackpropAdjoint(num_evaluations=3)], ids=lambda a: type(a).__name__
)
def test_many_gradients_at_once(adjoint, way):
    net, x = Net(MomentumSolver(max_steps=16), adjoint), X.clone().requires_grad_()
    cotangents = torch.stack([COTANGENT, TANGENT])
    value = net(x)
    if isinstance(adjoint, ImplicitAdjoint) or (isinstance(adjoint, ReversibleAdjoint) and way == "vmap"):
        with pytest.raises(RuntimeError, match=rf"{type(adjoint).__name__} has no gradient.*many outputs.*Backprop"):
            MANY[way](value, x, cotangents)
        return
    one_by_one = [torch.autograd.grad(net(x), x, g)[0] for g in cotangents]
    assert relative_error(MANY[way](value, x, cotangents), torch.stack(one_by_one)) <= 1e-12


def test_divergence_under_a_transform_is_nan():
    """There the host cannot look; a state beyond the range of the exact state must not pass for a value."""
    net = Net(MomentumSolver(max_steps=3), BackpropAdjoint())
    far = X * 1e7
    with pytest.raises(DivergenceError):
        net(far)
    assert torch.vmap(lambda x: net(x[None])[0])(far).isnan().all()
    assert torch.func.jvp(net, (far,), (TANGENT,))[0].isnan().all()


# Programs without Python


@pytest.mark.parametrize("context", [torch.no_grad, contextlib.nullcontext])
@pytest.mark.parametrize("name", ["momentum-reversible", "reversible-reversible-tolerance", "anderson-implicit"])
def test_exported_program_has_the_value(name, context):
    net, x = Net(*PAIRS[name]).eval(), X.clone().requires_grad_()
    with context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        program = torch.export.export(net, (X,)).module()
    for other in (X, normal(7)):
        with torch.no_grad():
            assert torch.equal(program(other), net(other))
    assert not program(x).requires_grad  # rather than a gradient of zero, that of the rounding
    if name != "anderson-implicit":
        assert program(X * 1e7).isnan().all()


@pytest.mark.parametrize("name", ["momentum-reversible", "broyden-implicit", "relaxed-unrolled-tolerance"])
def test_exported_program_takes_any_batch(name):
    net = Net(*PAIRS[name]).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        program = torch.export.export(net, (X,), dynamic_shapes=({0: batch},)).module()
        for x in (X, torch.cat([X, normal(7)])):
            assert relative_error(program(x), net(x)) <= 1e-12


def test_traced_program_has_the_value():
    for name in ("momentum-reversible", "picard-backprop-tolerance", "broyden-implicit"):
        net = Net(*PAIRS[name]).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer is deprecated
            program = torch.jit.trace(net, X)
            assert torch.equal(program(normal(7)), net(normal(7))), name


def test_training_mode_is_not_exported():
    """Its dropout would draw a mask for every evaluation."""
    for export in (lambda net: torch.export.export(net, (X,)), lambda net: make_fx(net)(X)):
        with pytest.raises(Exception, match=r"evaluation mode.*\.eval\(\)"):
            export(Net(MomentumSolver(max_steps=3), ReversibleAdjoint()))


@pytest.mark.parametrize("name", ["momentum-reversible", "reversible-reversible-tolerance", "anderson-implicit"])
def test_recorded_operations_give_the_value(name):
    net = Net(*PAIRS[name]).eval()
    with pytest.raises(ValueError, match=r"make_fx.*no_grad"):
        make_fx(net)(X)
    with torch.no_grad():
        assert torch.equal(make_fx(net)(X)(normal(7)), net(normal(7)))


def test_scripts_are_refused():
    for script in (torch.jit.script, torch.fx.symbolic_trace):
        with pytest.raises((RuntimeError, ValueError), match=r"EquilibriumLayer.*torch\.(export|fx\.Tracer)"):
            script(Net(MomentumSolver(max_steps=3), ReversibleAdjoint()))


@with_every_pair
def test_shapes_without_numbers(solver, adjoint):
    """With fake tensors, for estimates of memory and cost."""
    net = Net(solver, adjoint)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net(mode.from_tensor(X)).shape == X.shape


def test_gradients_outside_of_transforms_are_untouched():
    """Afterwards, and within a level that nothing of the solve takes part in, all is as ever."""
    f, x = Map(), X.clone().requires_grad_()
    solver = ReversibleSolver(max_steps=3)
    solve = lambda: solve_fixed_point(f, torch.zeros_like(x), x, solver=solver, adjoint=ReversibleAdjoint())  # noqa: E731
    solution = solve()
    expected = gradients(solution.value, x, *f.parameters())
    assert solution.stats.reconstruction_mismatch == 0
    with forward_ad.dual_level():
        assert relative_error(gradients(solve().value, x, *f.parameters()), expected) <= 1e-12
