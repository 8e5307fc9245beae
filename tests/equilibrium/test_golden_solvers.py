"""Numbers from the paper's released code (float64). Their folder is `REVDEQ_GOLDEN`, by default tests/golden."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    ImplicitAdjoint,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import relative_error

GOLDEN = Path(os.environ.get("REVDEQ_GOLDEN", Path(__file__).parents[1] / "golden")) / "solvers_mlp.npz"
DATA = dict(np.load(GOLDEN))
CASES = sorted({key.split(":")[0] for key in DATA if ":" in key})
REVERSIBLE = [case for case in CASES if case.startswith("reversible,")]
BPTT = [case for case in CASES if re.match(r"(relaxed|simple|anderson),.*bptt", case)]
IMPLICIT = [case for case in CASES if ",implicit," in case]
PHANTOM = [case for case in CASES if ",phantom=" in case]


def tensor(key: str) -> Tensor:
    return torch.from_numpy(DATA[key])


class Mlp(nn.Module):
    """f(z, x) = mlp([z; x]) with tanh between the layers; sizes from the file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        while f"f.mlp.layers[{len(self.layers)}].weight" in DATA:
            name = f"f.mlp.layers[{len(self.layers)}]"
            layer = nn.Linear(*reversed(DATA[f"{name}.weight"].shape), dtype=torch.float64)
            layer.weight.data, layer.bias.data = tensor(f"{name}.weight"), tensor(f"{name}.bias")
            self.layers.append(layer)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([z, x], dim=-1)
        for layer in self.layers[:-1]:
            h = torch.tanh(layer(h))
        return self.layers[-1](h)


def setting(case: str, name: str) -> float | None:
    match = re.search(rf"{name}=([0-9.e+-]+)", case)
    return float(match[1]) if match else None


def make_solver(case: str, **arithmetic):
    steps, tolerance = setting(case, "steps"), setting(case, "tol")
    # A case that stops by its tolerance names no number of steps: it must stop by itself.
    options = {"max_steps": int(steps) if steps else int(DATA[f"{case}:steps"]) + 20, "rtol": tolerance or 0.0}
    if case.startswith("simple,"):
        return PicardSolver(**options)
    beta = setting(case, "beta")
    assert beta is not None
    if case.startswith("anderson,"):
        # The released ridge is 1e-6 in the units of the squared residuals; ours by default is relative to them.
        return AndersonSolver(
            memory=int(setting(case, "m")), beta=beta, ridge=1e-6, ridge_scale="absolute", **options, **arithmetic
        )
    solver = ReversibleSolver if case.startswith("reversible,") else RelaxedSolver
    return solver(beta=beta, **options, **arithmetic)


def check(case: str, solver, adjoint, tolerance: float) -> None:
    f, x, z0 = Mlp(), tensor("x")[None].requires_grad_(), tensor("z0")[None]
    solution = solve_fixed_point(f, z0, x, solver=solver, adjoint=adjoint)
    (solution.value * tensor("w")).sum().backward()
    assert relative_error(solution.value[0], tensor(f"{case}:z")) <= tolerance
    assert int(solution.stats.num_steps) == int(DATA[f"{case}:steps"])
    assert relative_error(x.grad[0], tensor(f"{case}:grad_x")) <= tolerance
    for i, layer in enumerate(f.layers):
        for name in ("weight", "bias"):
            reference = tensor(f"{case}:grad_f.mlp.layers[{i}].{name}")
            assert relative_error(getattr(layer, name).grad, reference) <= tolerance
    if solver.has_tolerance:  # then the residual is that of the returned state, as in the released code
        assert abs(float(solution.stats.relative_residual) - float(DATA[f"{case}:error"])) <= tolerance


def test_golden_file_holds_cases_of_every_kind():
    assert REVERSIBLE
    assert any("tol" in case for case in REVERSIBLE)
    assert {case.split(",")[0] for case in BPTT} == {"relaxed", "simple", "anderson"}
    assert IMPLICIT
    assert PHANTOM
    assert {*REVERSIBLE, *BPTT, *IMPLICIT, *PHANTOM} == set(CASES)


# "exact" holds the state to multiples of 2^-32: 1e-8.
@pytest.mark.parametrize(
    ("adjoint", "arithmetic", "tolerance"),
    [
        (ReversibleAdjoint(), "exact", 1e-8),
        (ReversibleAdjoint(), "float64", 1e-9),
        (BackpropAdjoint(), "float64", 1e-9),
    ],
    ids=["exact", "float64", "backprop"],
)
@pytest.mark.parametrize("case", REVERSIBLE)
def test_golden_reversible(case, adjoint, arithmetic, tolerance):
    check(case, make_solver(case, arithmetic=arithmetic), adjoint, tolerance)


@pytest.mark.parametrize("case", BPTT)
def test_golden_bptt(case):
    check(case, make_solver(case), BackpropAdjoint(), 1e-9)


@pytest.mark.parametrize("case", IMPLICIT)
def test_golden_implicit(case):
    # The released code solves the linear system with the forward solver, here to the same tolerance.
    backward = RelaxedSolver(beta=0.8, max_steps=100, rtol=setting(case, "tol"))
    check(case, make_solver(case), ImplicitAdjoint(solver=backward), 1e-9)


@pytest.mark.parametrize("case", PHANTOM)
def test_golden_phantom(case):
    beta, num_steps = re.search(r"phantom=([0-9.]+)x([0-9]+)", case).groups()
    solver = make_solver(case)
    check(case, solver, PhantomAdjoint(beta=float(beta), num_steps=int(num_steps), kind="unrolled"), 1e-9)
    # Both kinds agree at a fixed point; here the residual is 1e-10, and enters once in every step.
    check(case, solver, PhantomAdjoint(beta=float(beta), num_steps=int(num_steps), kind="neumann"), 1e-8)
