"""What a user imports from the package."""

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
