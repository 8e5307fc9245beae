"""Every solver and every adjoint can be named in a configuration; what does not belong together is an error."""

import importlib.util
import re
import sys
from dataclasses import dataclass

import pytest

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    ImplicitAdjoint,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleSolver,
)
from revdeq_lightning.equilibrium.adjoints import ADJOINTS
from revdeq_lightning.equilibrium.solvers import SOLVERS
from revdeq_lightning.models import build
from revdeq_lightning.models.build import SolverConfig


def test_names_stand_for_solvers_and_adjoints():
    settings = SolverConfig(solver="reversible", beta=0.5, max_steps=4, rtol=1e-3, arithmetic="float64")
    assert settings.build_solver() == ReversibleSolver(beta=0.5, max_steps=4, rtol=1e-3, arithmetic="float64")
    assert SolverConfig(adjoint="backprop", checkpoint=True).build_adjoint() == BackpropAdjoint(checkpoint=True)
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
    settings = SolverConfig(adjoint="phantom", phantom_kind="neumann", phantom_steps=1, phantom_beta=1.0)
    assert settings.build_adjoint() == PhantomAdjoint(num_steps=1, beta=1.0, kind="neumann")


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"solver": "momentum", "memory": 3}, ("solver='momentum' has no memory", "memory=3")),
        ({"solver": "broyden", "ridge": 1e-4}, ("solver='broyden' has no ridge", "ridge=0.0001")),
        ({"solver": "anderson", "max_halvings": 0}, ("solver='anderson' has no max_halvings", "max_halvings=0")),
        ({"solver": "anderson", "arithmetic": "exact"}, ("has no arithmetic", "'exact'")),
        ({"solver": "anderson", "adjoint": "reversible"}, ("'anderson'", "MomentumSolver", "ImplicitAdjoint")),
        ({"solver": "picard", "adjoint": "reversible"}, ("'picard'", "'reversible'", "BackpropAdjoint")),
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
        ({"solver": "picard", "beta": 0.5}, ("has no beta, got beta=0.5",)),
        ({"beta": 3.0}, ("beta must be in",)),
    ],
)
def test_settings_that_do_not_belong_are_errors(settings, fragments):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, fragments))):
        (SolverConfig(**settings).build_solver(), SolverConfig(**settings).build_adjoint())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("adjoint", [None, *ADJOINTS])
def test_every_registered_solver_and_adjoint_can_be_built(solver, adjoint):
    settings = SolverConfig(solver=solver, adjoint=adjoint, max_steps=3)
    assert settings.build_solver() == SOLVERS[solver](max_steps=3)
    if adjoint == "reversible" and SOLVERS[solver].default_adjoint != "reversible":
        with pytest.raises(ValueError, match=f"cannot run {SOLVERS[solver].__name__} backwards"):
            settings.build_adjoint()
    else:
        assert settings.build_adjoint() == ADJOINTS[adjoint or SOLVERS[solver].default_adjoint]()


@dataclass(frozen=True, kw_only=True)
class FarSolver(PicardSolver):
    """A solver of somebody else.

    Args:
        reach: How far.
    """

    reach: float = 0.5


@dataclass(frozen=True, kw_only=True)
class NearAdjoint(BackpropAdjoint):
    num_looks: int = 1


def test_a_new_solver_or_adjoint_is_one_line_in_the_registry(monkeypatch):
    monkeypatch.setitem(SOLVERS, "far", FarSolver)
    monkeypatch.setitem(ADJOINTS, "near", NearAdjoint)
    spec = importlib.util.spec_from_file_location("build_again", build.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_again", again)
    spec.loader.exec_module(again)
    settings = again.SolverConfig(solver="far", reach=0.3, adjoint="near", near_looks=2)
    assert settings.build_solver() == FarSolver(reach=0.3)
    assert settings.build_adjoint() == NearAdjoint(num_looks=2)
    assert "reach: far: How far." in again.SolverConfig.__doc__
    with pytest.raises(ValueError, match=r"solver='picard' has no reach, got reach=0\.3"):
        again.SolverConfig(solver="picard", reach=0.3).build_solver()
    with pytest.raises(ValueError, match="near_looks=2 belongs to adjoint='near', got adjoint='backprop'"):
        again.SolverConfig(solver="far", near_looks=2).build_adjoint()


def test_settings_of_earlier_checkpoints_are_valid():
    old = {"solver": "anderson", "max_steps": 8, "beta": None, "momentum": None, "rtol": 0.0, "atol": 0.0}
    old |= {"arithmetic": None, "compiled": False, "memory": 4, "ridge": None, "max_halvings": None, "adjoint": None}
    old |= {"checkpoint": False, "backprop_evaluations": None, "mismatch": "warn", "unconverged": None}
    old |= {"backward_solver": None, "backward_max_steps": None, "backward_rtol": None, "phantom_kind": None}
    old |= {"phantom_steps": None, "phantom_beta": None, "num_losses": 1, "loss_decay": None}
    settings = SolverConfig(**old)
    assert settings.build_solver() == AndersonSolver(memory=4)
    assert settings.build_adjoint() == ImplicitAdjoint()


def test_a_setting_of_older_configurations_is_said_to_have_no_effect():
    with pytest.warns(UserWarning, match="compiled=True no longer has an effect: remove it"):
        assert SolverConfig(compiled=True).build_solver() == SolverConfig().build_solver()
