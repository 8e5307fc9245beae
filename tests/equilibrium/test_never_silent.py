"""Settings, states and maps that cannot work: errors that show the value received and what to change."""

import dataclasses
import math
import re

import pytest
import torch

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BroydenSolver,
    DivergenceError,
    EquilibriumLayer,
    MomentumSolver,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import BPTT, REVERSIBLE, SOLVERS, attention_layer, sequence

SOLVER = SOLVERS["reversible"]
ALL_SOLVERS = [ReversibleSolver, MomentumSolver, RelaxedSolver, PicardSolver, AndersonSolver, BroydenSolver]
nan, inf = math.nan, math.inf


def refuses(error, *fragments):
    """All fragments, in this order, must be in the message."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, fragments)))


def solve(f, z0=None, x=None, solver=SOLVER, adjoint=REVERSIBLE):
    x = sequence() if x is None else x
    return solve_fixed_point(f, torch.zeros_like(x) if z0 is None else z0, x, solver=solver, adjoint=adjoint)


# Settings


@pytest.mark.parametrize("solver", [solver for solver in ALL_SOLVERS if solver is not PicardSolver])
@pytest.mark.parametrize(
    "beta", [0, 0.0, 2, 2.0, -0.1, 2.5, nan, inf, -inf, "0.8", None, True, torch.tensor(0.8), 0.8j]
)
def test_beta(solver, beta):
    with refuses(ValueError, "beta must be", repr(beta)):
        solver(beta=beta)


@pytest.mark.parametrize("beta", [1, 1.0])
@pytest.mark.parametrize("arithmetic", ["exact", "float64", "float32"])
def test_beta_1_has_no_inverse(beta, arithmetic):
    with refuses(ValueError, "beta must not be 1", repr(beta), "inverse", "0.8"):
        ReversibleSolver(beta=beta, arithmetic=arithmetic)


@pytest.mark.parametrize("momentum", [0, 0.0, -0.0, 1, -1, 2, -1.5, nan, inf, "0.1", None, True])
@pytest.mark.parametrize("arithmetic", ["exact", "float64"])
def test_momentum(momentum, arithmetic):
    with refuses(ValueError, "momentum must be", repr(momentum)):
        MomentumSolver(momentum=momentum, arithmetic=arithmetic)


@pytest.mark.parametrize("solver", ALL_SOLVERS)
@pytest.mark.parametrize("max_steps", [0, -1, 1.5, 4.0, True, "8", None, nan])
def test_max_steps(solver, max_steps):
    with refuses(
        ValueError, f"max_steps must be {'at least 1' if type(max_steps) is int else 'an integer'}", repr(max_steps)
    ):
        solver(max_steps=max_steps)


@pytest.mark.parametrize("solver", ALL_SOLVERS)
@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("tolerance", [-1e-9, -1, nan, inf, -inf, "1e-3", None, True])
def test_tolerances(solver, name, tolerance):
    with refuses(ValueError, f"{name} must be", repr(tolerance)):
        solver(**{name: tolerance})


@pytest.mark.parametrize("make", [lambda v: ReversibleSolver(beta=v), lambda v: MomentumSolver(momentum=v)])
def test_coefficient_that_the_exact_state_cannot_hold(make):
    with refuses(ValueError, "0.123456", "denominator up to 4096", "fewer digits", "arithmetic='float64'"):
        make(0.123456)


def test_arithmetic():
    for solver in (ReversibleSolver, MomentumSolver):
        with refuses(ValueError, "'exact', 'exact64', 'float64', 'float32'", "'bfloat16'"):
            solver(arithmetic="bfloat16")


def test_misspelt_or_positional_settings():
    for solver in ALL_SOLVERS:
        with refuses(TypeError, "max_step"):
            solver(max_step=3)
        with refuses(TypeError, "positional"):
            solver(0.8)


def test_mismatch_policy():
    with refuses(ValueError, "'warn', 'raise', 'ignore'", "'error'"):
        ReversibleAdjoint(mismatch="error")


@pytest.mark.parametrize("solver", [PicardSolver(), RelaxedSolver(), AndersonSolver(), BroydenSolver()])
def test_solver_without_an_inverse(solver):
    for context in (torch.enable_grad, torch.no_grad):
        with (
            context(),
            refuses(ValueError, type(solver).__name__, "ReversibleSolver or MomentumSolver", "BackpropAdjoint"),
        ):
            solve(lambda z, x: x, solver=solver)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"solver": "reversible"}, ("solver must be", "'reversible'")),
        ({"solver": ReversibleSolver}, ("solver must be", "ReversibleSolver")),
        ({"adjoint": None}, ("adjoint must be", "None")),
        ({"adjoint": ReversibleAdjoint}, ("adjoint must be", "ReversibleAdjoint")),
        ({"solver": REVERSIBLE, "adjoint": SOLVER}, ("solver must be", "ReversibleAdjoint")),
    ],
)
def test_other_things_in_the_place_of_solver_and_adjoint(settings, fragments):
    with refuses(ValueError, *fragments):
        solve(lambda z, x: x, **settings)
    if settings.get("adjoint", True):  # a layer has a default
        with refuses(ValueError, *fragments):
            EquilibriumLayer(torch.nn.Identity(), **{"solver": SOLVER} | settings)


# The state


@pytest.mark.parametrize("adjoint", [REVERSIBLE, BPTT])
@pytest.mark.parametrize(
    ("z0", "fragments"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), ("floating-point", "int64", "(4, 3)")),
        (torch.zeros(4, dtype=torch.bool), ("floating-point", "bool")),
        (torch.zeros(4, dtype=torch.complex64), ("floating-point", "complex64")),
        (torch.tensor(0.0), ("(batch, ...)", "()")),
        (torch.zeros(0, 3), ("at least 1", "(0, 3)")),
        (torch.zeros(3, 0), ("at least 1", "(3, 0)")),
        ((torch.zeros(4, 3), torch.zeros(5, 3)), ("one batch size", "[4, 5]")),
        ((torch.zeros(4, 3), torch.zeros(4, 3, device="meta")), ("one device", "cpu", "meta")),
        ([], ("at least one tensor",)),
        (None, ("floating-point", "None")),
        ([torch.zeros(4, 3), 1.0], ("floating-point", "1.0")),
    ],
    ids=lambda value: None,
)
def test_initial_state(z0, fragments, adjoint):
    with refuses(ValueError, "z0", *fragments):
        solve_fixed_point(lambda z, x: z, z0, None, solver=SOLVER, adjoint=adjoint)


def test_layer_without_an_initial_state():
    layer = attention_layer(SOLVER, REVERSIBLE)
    with refuses(ValueError, "z0 is needed", "tuple"):
        layer((sequence(), sequence()))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("adjoint", [REVERSIBLE, BPTT])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(
    ("f", "fragments"),
    [
        (lambda z, x: x[:, :3], ("shape", "(4, 5, 16)", "(4, 3, 16)")),
        (lambda z, x: x[..., :1], ("shape", "(4, 5, 16)", "(4, 5, 1)")),
        (lambda z, x: x.sum(), ("shape", "(4, 5, 16)", "()")),
        (lambda z, x: x.double(), ("dtype", "float32", "float64")),
        (lambda z, x: x.bfloat16(), ("dtype", "float32", "bfloat16")),
        (lambda z, x: x > 0, ("dtype", "float32", "bool")),
        (lambda z, x: x.to("meta"), ("device", "cpu", "meta")),
        (lambda z, x: (x, x), ("structure", "*")),
        (lambda z, x: [x], ("structure", "*")),
        (lambda z, x: None, ("NoneType",)),
        (lambda z, x: 1.0, ("float",)),
    ],
    ids=["time", "channel", "scalar", "wider", "narrower", "bool", "device", "tuple", "list", "none", "number"],
)
def test_f_that_changes_the_state(f, fragments, solver, adjoint, context):
    fragments = [fragment for fragment in fragments if fragment != "*"]
    with context(), refuses(ValueError, "f must", *fragments):
        solve(f, solver=solver, adjoint=adjoint)


# Divergence


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("adjoint", [REVERSIBLE, BPTT])
@pytest.mark.parametrize("arithmetic", ["exact", "float64", "float32"])
def test_non_finite_initial_state(bad, adjoint, arithmetic):
    z0 = torch.zeros(4, 5, 16)
    z0[2, 3, 4] = bad
    for context in (torch.enable_grad, torch.no_grad):
        with context(), refuses(DivergenceError, "not finite", "in z0", "Look for NaN", "ReversibleSolver"):
            solve(lambda z, x: x, z0, solver=ReversibleSolver(arithmetic=arithmetic), adjoint=adjoint)


class BreaksAt:
    """f that returns `bad` at one element of one sample in its k-th evaluation."""

    def __init__(self, k, bad):
        self.k, self.bad, self.calls = k, bad, 0

    def __call__(self, z, x):
        self.calls += 1
        value = torch.tanh(z + x)
        if self.calls == self.k:
            value = value.index_fill(0, torch.tensor([1]), self.bad)
        return value


@pytest.mark.parametrize(
    "solver",
    [
        SOLVER,
        SOLVERS["momentum"],
        ReversibleSolver(max_steps=4, rtol=1e-6),
        PicardSolver(max_steps=8),
        PicardSolver(max_steps=8, rtol=1e-6),
        RelaxedSolver(max_steps=8, atol=1e-6),
        AndersonSolver(max_steps=8),
        AndersonSolver(max_steps=8, rtol=1e-9),
        BroydenSolver(max_steps=8),
        BroydenSolver(max_steps=8, rtol=1e-9),
    ],
)
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_non_finite_evaluation_is_named(solver, bad, k):
    step = (k - 1) // solver.evaluations_per_step + 1
    adjoints = [BPTT, REVERSIBLE] if isinstance(solver, ReversibleSolver | MomentumSolver) else [BPTT]
    for adjoint in adjoints:
        with refuses(DivergenceError, "not finite", f"after {k} evaluations of f (step {step})", "Look for NaN"):
            solve(BreaksAt(k, bad), solver=solver, adjoint=adjoint)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_last_evaluation_counts_too(solver):
    k = solver.max_steps * solver.evaluations_per_step
    if solver.has_tolerance:
        solver = ReversibleSolver(max_steps=solver.max_steps, rtol=1e-12)
    with refuses(DivergenceError, f"after {k} evaluations of f"):
        solve(BreaksAt(k, nan), solver=solver)


@pytest.mark.parametrize(
    ("solver", "dtype", "limit", "wider"),
    [
        (ReversibleSolver(beta=0.5, max_steps=8), torch.float32, "1024", "2.621e+05"),
        (ReversibleSolver(beta=1.2, max_steps=8), torch.bfloat16, "853.3", "1.049e+05"),
        (MomentumSolver(momentum=0.125, max_steps=8), torch.float32, "910.2", "6.554e+04"),
        (ReversibleSolver(beta=0.8, max_steps=8, arithmetic="exact64"), torch.float32, "1.049e+05", None),
        (MomentumSolver(momentum=0.125, max_steps=8), torch.float64, "6.554e+04", None),
        (ReversibleSolver(beta=0.9995, max_steps=8), torch.float32, "1024", None),  # in 64 bits: 262
    ],
)
def test_state_beyond_the_range_of_the_exact_state(solver, dtype, limit, wider):
    """`wider` is the range that the advice names."""
    x = torch.full((4, 3), 1.5 * float(limit), requires_grad=True, dtype=dtype)
    advice = [f"arithmetic='exact64' (a range of {wider})"] if wider else []
    for adjoint in (REVERSIBLE, BPTT):
        beyond = "reached", f"beyond the range of {limit}", "after ", "normalize", "lower beta", *advice
        with refuses(DivergenceError, *beyond) as error:
            solve(lambda z, x: x + z, x=x, z0=torch.zeros_like(x), solver=solver, adjoint=adjoint)
        assert wider or "exact64' (" not in str(error.value)
        with refuses(DivergenceError, "reached", limit, "in z0"):
            solve(lambda z, x: 0 * z, z0=x.detach().clone(), x=x, solver=solver, adjoint=adjoint)
    if wider:
        wide = dataclasses.replace(solver, arithmetic="exact64", max_steps=2)
        assert solve(lambda z, x: x + 0 * z, x=x, z0=torch.zeros_like(x), solver=wide).value.isfinite().all()


def test_float_states_have_no_such_range():
    for arithmetic in ("float64", "float32"):
        solution = solve(
            lambda z, x: x + 0 * z, x=torch.full((2, 3), 1e9), solver=ReversibleSolver(arithmetic=arithmetic)
        )
        assert (solution.value - 1e9).abs().max() < 1e9
