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


def test_importing_the_package_imports_no_pytorch():
    program = "import sys, revdeq_lightning; print('torch' in sys.modules, revdeq_lightning.__version__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.split() == ["False", revdeq_lightning.__version__]


ROOMS = (
    *("callbacks", "checkpoints", "data", "data.images", "data.loading", "data.puzzles", "data.text", "distributed"),
    *("loggers", "metrics", "models", "report", "runs", "tasks"),
)


@pytest.mark.parametrize("room", ROOMS)
def test_every_exported_name_resolves(room):
    package = importlib.import_module(f"revdeq_lightning.{room}")
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name).__name__ == name if name != "IGNORE_INDEX" else package.IGNORE_INDEX == -100
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module 'revdeq_lightning.{room}' has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def test_importing_a_callback_imports_neither_wandb_nor_tensorboard():
    program = (
        "import sys; from revdeq_lightning.callbacks import ResidualCurve, FunctionEvaluations, Cost;"
        "print([name for name in ('wandb', 'tensorboard', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.strip() == "[]"
