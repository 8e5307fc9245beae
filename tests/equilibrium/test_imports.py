"""The core is PyTorch only."""

import subprocess
import sys

FOREIGN = (
    "lightning",
    "pytorch_lightning",
    "omegaconf",
    "jsonargparse",
    "wandb",
    "datasets",
    "torchvision",
    "matplotlib",
    "scipy",
)


def test_importing_the_core_imports_pytorch_only():
    program = (
        "import sys, revdeq_lightning.equilibrium as core\n"
        f"print(*(name for name in {FOREIGN} if name in sys.modules))\n"
        "missing = [name for name in core.__all__ if not hasattr(core, name)]\n"
        "assert not missing, missing\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.split() == []


def test_names_of_the_public_interface():
    from revdeq_lightning import equilibrium

    expected = {
        "EquilibriumLayer", "FixedPointSolution", "SolverStats", "solve_fixed_point", "PicardSolver", "RelaxedSolver",
        "ReversibleSolver", "MomentumSolver", "ReversibleAdjoint", "BackpropAdjoint",
    }  # fmt: skip
    assert expected <= set(equilibrium.__all__)
