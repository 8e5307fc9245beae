"""Every solver and every adjoint can be named in a configuration; what does not belong together is an error."""

import re

import pytest

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    ImplicitAdjoint,
    PhantomAdjoint,
    RelaxedSolver,
)
from revdeq_lightning.models.build import SolverConfig


def test_names_stand_for_solvers_and_adjoints():
    settings = SolverConfig(solver="anderson", max_steps=12, rtol=1e-3, memory=3, beta=0.8, ridge=1e-4)
    assert settings.build_solver() == AndersonSolver(max_steps=12, rtol=1e-3, memory=3, beta=0.8, ridge=1e-4)
    assert settings.build_adjoint() == ImplicitAdjoint()
    settings = SolverConfig(solver="broyden", memory=5, max_halvings=2)
    assert settings.build_solver() == BroydenSolver(memory=5, max_halvings=2)
    assert settings.build_adjoint() == ImplicitAdjoint()
    settings = SolverConfig(
        adjoint="implicit", unconverged="raise", backward_solver="relaxed", backward_max_steps=9, backward_rtol=1e-2
    )
    assert settings.build_adjoint() == ImplicitAdjoint(
        solver=RelaxedSolver(max_steps=9, rtol=1e-2), unconverged="raise"
    )
    assert SolverConfig(solver="picard", backprop_evaluations=2).build_adjoint() == BackpropAdjoint(num_evaluations=2)
    assert SolverConfig(adjoint="phantom").build_adjoint() == PhantomAdjoint()
    settings = SolverConfig(adjoint="phantom", phantom_kind="neumann", phantom_steps=1, phantom_beta=1.0)
    assert settings.build_adjoint() == PhantomAdjoint(num_steps=1, beta=1.0, kind="neumann")


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"solver": "momentum", "memory": 3}, ("solver='momentum' has no memory", "memory=3")),
        ({"solver": "broyden", "ridge": 1e-4}, ("solver='broyden' has no ridge", "ridge=0.0001")),
        ({"solver": "anderson", "max_halvings": 0}, ("solver='anderson' has no max_halvings", "max_halvings=0")),
        ({"solver": "anderson", "arithmetic": "exact"}, ("has no arithmetic", "'exact'")),
        ({"solver": "anderson", "adjoint": "reversible"}, ("'reversible'", "'anderson'", "'implicit'", "'momentum'")),
        ({"solver": "picard", "adjoint": "reversible"}, ("'reversible'", "'picard'", "'backprop'")),
        ({"backward_rtol": 1e-3}, ("backward_rtol=0.001", "adjoint='implicit'", "adjoint='reversible'")),
        ({"adjoint": "phantom", "unconverged": "raise"}, ("unconverged='raise'", "'implicit'", "'phantom'")),
        ({"adjoint": "implicit", "phantom_steps": 2}, ("phantom_steps=2", "'phantom'", "'implicit'")),
        ({"backprop_evaluations": 2}, ("backprop_evaluations=2", "adjoint='backprop'", "adjoint='reversible'")),
        ({"adjoint": "backprop", "backprop_evaluations": 0}, ("num_evaluations", "at least 1")),
        ({"adjoint": "implicit", "checkpoint": True}, ("checkpoint=True", "'backprop'", "'implicit'")),
        ({"adjoint": "implicit", "backward_rtol": 0.0}, ("needs a tolerance",)),
        ({"adjoint": "implicit", "backward_max_steps": 0}, ("max_steps", "at least 1")),
        ({"adjoint": "phantom", "phantom_steps": 0}, ("num_steps", "at least 1")),
        ({"adjoint": "phantom", "phantom_beta": 0.0}, ("beta must be in (0, 2)", "0.0")),
    ],
)
def test_settings_that_do_not_belong_are_errors(settings, fragments):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, fragments))):
        (SolverConfig(**settings).build_solver(), SolverConfig(**settings).build_adjoint())
