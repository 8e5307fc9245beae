"""Range checks: what is accepted, and that a message shows the name, the range and the value."""

import re
from math import inf, nan

import numpy as np
import pytest
import torch

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    BroydenSolver,
    EquilibriumLayer,
    MomentumSolver,
    PhantomAdjoint,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.equilibrium.validation import require_choice, require_count, require_in_range
from tests.helpers.equilibrium import TanhMap


@pytest.mark.parametrize(
    ("check", "message"),
    [
        *(
            (lambda v=value: require_in_range("beta", v, "(0, 2)"), f"beta must be in (0, 2), got {value!r}")
            for value in (0, 2, -1.0, nan, inf, "1", None, True)
        ),
        (lambda: require_in_range("p", 0, "(0, 1]"), "p must be in (0, 1], got 0"),
        (lambda: require_in_range("p", 1.0, "[0, 1)"), "p must be in [0, 1), got 1.0"),
        (lambda: require_in_range("rtol", inf, "[0, inf)", "use 0"), "rtol must be in [0, inf), got inf: use 0"),
        (lambda: require_count("steps", 0), "steps must be at least 1, got 0"),
        (lambda: require_count("steps", 1, at_least=2), "steps must be at least 2, got 1"),
        *(
            (lambda v=value: require_count("steps", v), f"steps must be an integer, got {value!r}")
            for value in (1.0, "1", None, True)
        ),
        (lambda: require_choice("kind", "c", ("a", "b")), "kind must be one of 'a', 'b', got 'c'"),
    ],
)
def test_message(check, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check()


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
        torch.manual_seed(0)
        f = TanhMap().float()
        solver = MomentumSolver(momentum=number(0.125))
        layer = EquilibriumLayer(f, solver=solver, adjoint=own, num_parts=steps(2))
        x = torch.ones(2, 6, requires_grad=True)
        value = layer(x, max_steps=steps(4)).value
        value.sum().backward()
        results.append([value, x.grad, f.weight.grad])
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_in_range_passes():
    for value, interval in ((1, "(0, 2)"), (0, "[0, 1)"), (1.0, "(0, 1]"), (1e300, "(0, inf)"), (-0.5, "(-1, 1)")):
        require_in_range("value", value, interval)
    require_count("steps", 1)
    require_count("steps", 0, at_least=0)
    require_choice("kind", "a", {"a": 1})
