"""The compiled update against the eager one; the whole solve against BPTT."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from revdeq_lightning.equilibrium import MomentumSolver, ReversibleSolver
from revdeq_lightning.equilibrium.exact import kernels
from revdeq_lightning.equilibrium.exact.arithmetic import ExactArithmetic, Recurrence
from tests.helpers.equilibrium import (
    BPTT,
    COMPILES,
    REVERSIBLE,
    assert_equal_gradients,
    attention_layer,
    gradients_of,
    project,
    sequence,
)

pytestmark = COMPILES
RECURRENCES = [
    Recurrence(Fraction(1, 5), 0.0, 0.8),
    Recurrence(Fraction(-1, 5), 0.0, 1.2),
    Recurrence(Fraction(-1, 8), 0.125, 1.0),
    Recurrence(Fraction(3, 7), 0.3, 0.27),
]


def runs_the_compiled_kernels(monkeypatch):
    """Count the calls, so that a silent way around them is seen."""
    calls, run = [], kernels.run

    def counted(kernel, *arguments):
        calls.append(kernel.__name__)
        run(kernel, *arguments)

    monkeypatch.setattr(kernels, "run", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
def test_states_and_digits_have_the_bits_of_the_eager_ones(recurrence, dtype, monkeypatch):
    calls = runs_the_compiled_kernels(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 7, generator=generator)
    values = [torch.randn(2, 3, 7, generator=generator).to(dtype) for _ in range(60)]  # more digits than two words hold
    states = {}
    for arithmetic in (ExactArithmetic(recurrence), ExactArithmetic(recurrence, compiled=True)):
        previous, current = arithmetic.encode(start), arithmetic.encode(start)
        remainders = arithmetic.remainders(current)
        for value in values:
            previous, current = current, arithmetic.advance_(previous, current, value, remainders)
        end = (previous.clone(), current.clone(), *[w.clone() for w in remainders.words], *remainders.spilled)
        for value in reversed(values):
            previous, current = arithmetic.invert_(current, previous, value, remainders), previous
        assert torch.equal(previous, arithmetic.encode(start))
        assert torch.equal(current, arithmetic.encode(start))
        states[arithmetic] = end
    assert calls == ["advance_"] * 60 + ["invert_"] * 60
    assert all(len(end) > 4 for end in states.values())
    for a, b in zip(*states.values(), strict=True):
        # c * u is exact for c = 0 and 1/8. For c = 0.3 a sum that is rounded twice may be one off, and so may digits.
        assert torch.equal(a, b) or (recurrence.c == 0.3 and ((a - b).abs() > 0).float().mean() < 0.2)


@pytest.mark.parametrize(
    "solver",
    [ReversibleSolver(beta=0.8, max_steps=40, compiled=True), MomentumSolver(max_steps=60, compiled=True)],
    ids=["reversible", "momentum"],
)
def test_gradient_matches_bptt_and_is_certified(solver, monkeypatch):
    calls = runs_the_compiled_kernels(monkeypatch)
    gradients = []
    for adjoint, compiled in ((REVERSIBLE, True), (BPTT, False)):
        layer, x = attention_layer(replace(solver, compiled=compiled), adjoint), sequence()
        solution = layer(x)
        project(solution.value).backward()
        gradients.append(gradients_of(layer, x))
        if compiled:
            assert solution.stats.reconstruction_mismatch == 0
    assert_equal_gradients(*gradients)
    names = ("advance_", "invert_", "carry_")
    assert {name: calls.count(name) for name in names} == dict.fromkeys(
        names, solver.max_steps * solver.evaluations_per_step
    )


def test_with_a_tolerance_the_eager_updates_run(monkeypatch):
    calls = runs_the_compiled_kernels(monkeypatch)
    layer = attention_layer(ReversibleSolver(beta=0.5, max_steps=6, rtol=0.2, compiled=True), REVERSIBLE)
    x = sequence()
    project(layer(x).value).backward()
    assert calls == []
    assert all(gradient is not None for gradient in gradients_of(layer, x))


def test_floating_point_states_are_not_compiled():
    with pytest.raises(ValueError, match="compiled=True belongs to arithmetic='exact', got 'float64'"):
        ReversibleSolver(beta=0.8, max_steps=4, arithmetic="float64", compiled=True)


def test_without_a_compiler_the_error_says_what_to_do():
    program = """
import torch
from revdeq_lightning.equilibrium import EquilibriumLayer, MomentumSolver
layer = EquilibriumLayer(torch.nn.Bilinear(3, 3, 3), solver=MomentumSolver(max_steps=2, compiled=True))
layer(torch.randn(2, 3, requires_grad=True))
"""
    environment = os.environ | {"CXX": "/nonexistent/compiler"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last_line = result.stderr.strip().splitlines()[-1]
    assert re.match(r"RuntimeError: compiled=True: torch.compile failed .*compiler.* without compiled=True", last_line)
