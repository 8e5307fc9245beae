"""Settings: what is accepted, and that a message shows the name, the range, the value and what to do."""

from math import inf, nan

import numpy as np
import pytest
import torch

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.equilibrium.validation import require_choice, require_count, require_in_range
from tests.helpers.equilibrium import EVERY_SOLVER, TanhMap, refuses


@pytest.mark.parametrize(
    ("check", "message"),
    [
        *(
            (lambda v=value: require_in_range("beta", v, "(0, 2)"), f"beta must be in (0, 2), got {value!r}")
            for value in (0, 2, -1.0, nan, inf, "1", None, True, 0.8j, torch.tensor(0.8))
        ),
        (lambda: require_in_range("p", 0, "(0, 1]"), "p must be in (0, 1], got 0"),
        (lambda: require_in_range("p", 1.0, "[0, 1)"), "p must be in [0, 1), got 1.0"),
        (lambda: require_in_range("rtol", inf, "[0, inf)", "use 0"), "rtol must be in [0, inf), got inf: use 0"),
        (lambda: require_count("steps", 0), "steps must be at least 1, got 0"),
        (lambda: require_count("steps", 1, at_least=2), "steps must be at least 2, got 1"),
        *(
            (lambda v=value: require_count("steps", v), f"steps must be an integer, got {value!r}")
            for value in (1.0, "1", None, True, nan)
        ),
        (lambda: require_choice("kind", "c", ("a", "b")), "kind must be one of 'a', 'b', got 'c'"),
    ],
)
def test_message(check, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        check()
    assert str(error.value) == message


def test_what_is_in_range_passes():
    for value, interval in ((1, "(0, 2)"), (0, "[0, 1)"), (1.0, "(0, 1]"), (1e300, "(0, inf)"), (-0.5, "(-1, 1)")):
        require_in_range("value", value, interval)
    require_count("steps", 1)
    require_count("steps", 0, at_least=0)
    require_choice("kind", "a", {"a": 1})


ALL_SOLVERS = list(EVERY_SOLVER.values())
WITH_BETA = [make for make in ALL_SOLVERS if make is not PicardSolver]
TWO_STEP = [ReversibleSolver, MomentumSolver]


@pytest.mark.parametrize(
    ("classes", "settings", "fragments"),
    [
        # That each setting is checked, and in which range: how a range is checked is tested above.
        (ALL_SOLVERS, {"max_steps": 0}, ("max_steps must be at least 1", "0")),
        (ALL_SOLVERS, {"max_steps": 4.0}, ("max_steps must be an integer", "4.0")),
        (ALL_SOLVERS, {"rtol": -1e-9}, ("rtol must be in [0, inf)", "-1e-09")),
        (ALL_SOLVERS, {"atol": inf}, ("atol must be in [0, inf)", "inf")),
        (WITH_BETA, {"beta": 0.0}, ("beta must be in (0, 2)", "0.0")),
        (WITH_BETA, {"beta": 2}, ("beta must be in (0, 2)", "2")),
        ([ReversibleSolver], {"beta": 1}, ("beta must not be 1", "1", "inverse", "0.8")),
        ([ReversibleSolver], {"beta": 1.0, "arithmetic": "float32"}, ("beta must not be 1", "1.0")),
        ([MomentumSolver], {"momentum": -1}, ("momentum must be in (-1, 1)", "-1")),
        ([MomentumSolver], {"momentum": 1.0}, ("momentum must be in (-1, 1)", "1.0")),
        ([MomentumSolver], {"momentum": -0.0, "arithmetic": "float64"}, ("momentum must be nonzero", "-0.0")),
        (TWO_STEP, {"arithmetic": "half"}, ("'exact', 'exact64', 'float64', 'float32'", "'half'")),
        ([ReversibleSolver], {"beta": 0.123456}, ("0.123456", "up to 4096", "fewer digits", "arithmetic='float64'")),
        ([MomentumSolver], {"momentum": 0.123456}, ("0.123456", "up to 4096", "arithmetic='float64'")),
        ([AndersonSolver, BroydenSolver], {"memory": 0}, ("memory must be at least 1", "0")),
        ([AndersonSolver], {"ridge": 0.0}, ("ridge must be in (0, inf)", "0.0", "1e-6")),
        ([AndersonSolver], {"ridge_scale": "none"}, ("'relative', 'absolute'", "'none'")),
        ([BroydenSolver], {"max_halvings": -1}, ("max_halvings must be at least 0", "-1")),
        ([ReversibleAdjoint], {"mismatch": "error"}, ("'warn', 'raise', 'ignore'", "'error'")),
        ([ReversibleAdjoint], {"stored_evaluations": -1}, ("stored_evaluations must be at least 0", "-1")),
        ([BackpropAdjoint], {"num_evaluations": 0}, ("num_evaluations must be at least 1", "0")),
        ([ImplicitAdjoint], {"solver": "anderson"}, ("solver must be one such as", "'anderson'")),
        ([ImplicitAdjoint], {"solver": AndersonSolver()}, ("needs a tolerance", "AndersonSolver(", "rtol=1e-5")),
        ([ImplicitAdjoint], {"unconverged": "error"}, ("'warn', 'raise', 'ignore'", "'error'")),
        ([PhantomAdjoint], {"num_steps": 0}, ("num_steps must be at least 1", "0")),
        ([PhantomAdjoint], {"beta": 2.0}, ("beta must be in (0, 2)", "2.0")),
        ([PhantomAdjoint], {"kind": "jfb"}, ("'unrolled', 'neumann'", "'jfb'")),
    ],
)
def test_settings(classes, settings, fragments):
    for make in classes:
        with refuses(ValueError, *fragments):
            make(**settings)


def test_misspelt_or_positional_settings():
    for solver in ALL_SOLVERS:
        with refuses(TypeError, "max_step"):
            solver(max_step=3)
        with refuses(TypeError, "positional"):
            solver(0.8)


@pytest.mark.parametrize(
    ("solver", "adjoint", "fragments"),
    [
        ("reversible", BackpropAdjoint(), ("solver must be", "'reversible'")),
        (ReversibleSolver, BackpropAdjoint(), ("solver must be", "ReversibleSolver")),
        (ReversibleSolver(), "implicit", ("adjoint must be", "'implicit'")),
        (ReversibleSolver(), ReversibleAdjoint, ("adjoint must be", "ReversibleAdjoint")),
        (ReversibleAdjoint(), ReversibleSolver(), ("solver must be", "ReversibleAdjoint")),
        *(
            (make(), ReversibleAdjoint(), (make.__name__, "ReversibleSolver or MomentumSolver", "ImplicitAdjoint"))
            for make in (PicardSolver, RelaxedSolver, AndersonSolver, BroydenSolver)
        ),
        (
            ReversibleSolver(rtol=0.1),
            ReversibleAdjoint(stored_evaluations=1),
            ("stored_evaluations=1 needs a solver without a tolerance", "rtol=0.1"),
        ),
        (
            PicardSolver(rtol=0.1),
            BackpropAdjoint(num_evaluations=2),
            ("num_evaluations=2 needs a solver without a tolerance", "rtol=0.1"),
        ),
    ],
)
def test_a_layer_of_what_does_not_fit_together(solver, adjoint, fragments):
    with refuses(ValueError, *fragments):
        EquilibriumLayer(torch.nn.Identity(), solver=solver, adjoint=adjoint)
    layer = EquilibriumLayer(torch.nn.Identity(), solver=ReversibleSolver())
    layer.solver, layer.adjoint = solver, adjoint
    for context in (torch.enable_grad, torch.no_grad):
        with context(), refuses(ValueError, *fragments):
            layer(torch.zeros(2, 3))


# Numbers of NumPy

NUMPY = (np.int32, np.int64, np.float32, np.float64)


def test_settings_may_be_numbers_of_numpy():
    """They mean their decimals: float32's 0.8 is 4/5, and nothing of NumPy is left in what is saved."""
    for kind in NUMPY:
        require_in_range("value", kind(1), "(0, 2)")
        with pytest.raises(ValueError, match=r"value must be in \(0, 1\), got"):
            require_in_range("value", kind(1), "(0, 1)")
    for kind in NUMPY[:2]:
        require_count("steps", kind(3))
    for bad in (np.float64(3), np.bool_(True), np.array(3)):
        with pytest.raises(ValueError, match="steps must be an integer"):
            require_count("steps", bad)
    for kind in NUMPY[2:]:
        solver = ReversibleSolver(beta=kind(0.8), max_steps=np.int64(3), rtol=kind(1e-3))
        assert solver == ReversibleSolver(beta=0.8, max_steps=3, rtol=1e-3)
        assert [type(v) for v in (solver.beta, solver.max_steps, solver.rtol)] == [float, int, float]
        assert MomentumSolver(momentum=kind(0.1)) == MomentumSolver(momentum=0.1)
        assert BroydenSolver(memory=np.int32(4), beta=kind(0.7)) == BroydenSolver(memory=4, beta=0.7)


@pytest.mark.parametrize(
    "adjoint",
    [
        BackpropAdjoint(num_evaluations=np.int64(2)),
        PhantomAdjoint(num_steps=np.int64(2), beta=np.float32(0.5)),
        PhantomAdjoint(num_steps=np.int32(2), beta=np.float64(0.5), kind="neumann"),
        ReversibleAdjoint(),
    ],
)
def test_solves_with_numbers_of_numpy(adjoint):
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in vars(adjoint).items()}
    results = []
    for own, number, steps in ((adjoint, np.float32, np.int64), (type(adjoint)(**plain), float, int)):
        f = TanhMap().float()
        solver = MomentumSolver(momentum=number(0.125))
        layer = EquilibriumLayer(f, solver=solver, adjoint=own, num_parts=steps(2))
        x = torch.ones(2, 6, requires_grad=True)
        value = layer(x, max_steps=steps(4)).value
        value.sum().backward()
        results.append([value, x.grad, f.weight.grad])
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*results, strict=True))
