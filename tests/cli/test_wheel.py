"""The wheel in an environment of its own, in another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

import revdeq_lightning

pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that holds the wheel, and sees the dependencies of this one; a folder to work in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # the build writes into it
    shutil.copytree(ROOT / "revdeq_lightning", source / "revdeq_lightning")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    programs = folder / "venv/bin"
    subprocess.run([*pip, "--python", programs / "python", "install", "--no-deps", wheel], check=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # A path in a .pth file is searched last, and .pth files in it are not read: no editable installation is found.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "elsewhere").mkdir()
    return programs, folder / "elsewhere"


def call(installed, program, *arguments):
    programs, folder = installed
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [programs / program, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_package_is_imported_from_the_wheel(installed):
    program = "import revdeq_lightning as r; print(r.__file__, r.__version__, r.EquilibriumLayer.__name__)"
    path, *rest = call(installed, "python", "-c", program).split()
    assert Path(path).is_relative_to(installed[0].parent)
    assert rest == [revdeq_lightning.__version__, "EquilibriumLayer"]


@pytest.mark.slow
def test_the_console_script_trains_with_a_block_of_the_users_folder(installed):
    assert "revdeq fit --config" in call(installed, "revdeq", "--help")
    block = "import torch\n\nclass Block(torch.nn.Conv2d):\n"
    block += "    def __init__(self, channels):\n        super().__init__(channels, channels, 1)\n\n"
    block += "    def forward(self, z, x):\n        return torch.tanh(x + 0.1 * super().forward(z))\n"
    (installed[1] / "my_block.py").write_text(block)
    options = ["--trainer.max_steps=3", "--run.version=v", "--run.depth_sweep=false"]
    options += ["--model.network.block=my_block.Block"]
    out = call(installed, "revdeq", "image", "fit", "--config", ROOT / "configs/digits/default.yaml", *options)
    folder = installed[1] / "runs/image/default/v"
    assert f"revdeq image predict --ckpt_path {folder.relative_to(installed[1])}/checkpoints/last.ckpt" in out
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["network"]["block"] == "my_block.Block"
    assert (folder / "report.html").stat().st_size > 10_000  # its template is in the wheel
