"""What a user imports from the package."""

import importlib
import subprocess
import sys

import pytest

import revdeq_lightning
from revdeq_lightning import equilibrium


def test_the_core_is_importable_from_the_package():
    assert set(revdeq_lightning.__all__) == set(equilibrium.__all__)
    for name in revdeq_lightning.__all__:
        assert getattr(revdeq_lightning, name) is getattr(equilibrium, name)
    assert set(revdeq_lightning.__all__) <= set(dir(revdeq_lightning))
    with pytest.raises(AttributeError, match="no attribute 'Solver'"):
        revdeq_lightning.Solver  # noqa: B018


def test_what_importing_imports():
    """The package not even PyTorch, the core PyTorch alone, a callback no logger's library."""
    program = """
import sys
imported = lambda *names: [name for name in names if name in sys.modules]
import revdeq_lightning
print(revdeq_lightning.__version__, imported("torch"))
import revdeq_lightning.equilibrium as core
missing = [name for name in core.__all__ if not hasattr(core, name)]
foreign = "lightning", "pytorch_lightning", "omegaconf", "jsonargparse", "datasets", "torchvision", "matplotlib"
print(imported("wandb", "scipy", *foreign), missing)
from revdeq_lightning.callbacks import ResidualCurve, FunctionEvaluations, Cost
print(imported("wandb", "tensorboard", "datasets"))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.splitlines() == [f"{revdeq_lightning.__version__} []", "[] []", "[]"]


ROOMS = (
    *("callbacks", "checkpoints", "data", "distributed", "loggers", "metrics", "models", "report", "runs", "tasks"),
)


@pytest.mark.parametrize("room", ROOMS)
def test_every_exported_name_resolves(room):
    package = importlib.import_module(f"revdeq_lightning.{room}")
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module 'revdeq_lightning.{room}' has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018
