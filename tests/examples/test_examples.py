"""The examples run, and learn."""

import runpy
from pathlib import Path

import pytest

from tests.helpers.processes import run_python

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_plain_pytorch_learns():
    assert main_of("plain_pytorch.py")() < 0.01  # the targets' variance is 0.15


def test_own_lightning_module_is_watched(tmp_path):
    logged = main_of("own_lightning_module.py")(str(tmp_path), max_epochs=2)
    assert logged["equilibrium/num_certified_gradients"] == logged["equilibrium/num_gradients"] == 2 * 29
    assert logged["gradient_error/bptt/relative_l2"] < 1e-5
    assert logged["train/loss"] < 2.3  # log(10), of a guess


def test_own_block_trains_from_yaml(tmp_path):
    short = ("--trainer.max_steps=4", "--trainer.val_check_interval=4", f"--run.folder={tmp_path}", "--run.version=v")
    output = run_python(EXAMPLES / "own_block.py", *short, cwd=tmp_path)
    assert "4 of 4 gradients certified exact" in output.out
    assert list(tmp_path.rglob("v/checkpoints/last.ckpt"))


def test_gpt2_block_has_exact_gradients():
    pytest.importorskip("transformers", reason="needs Hugging Face transformers, which is optional")
    first, last = main_of("gpt2_block.py")(num_steps=21)
    assert last < first


def test_each_script_is_in_the_overview():
    overview = (EXAMPLES / "README.md").read_text()
    assert not [path.name for path in EXAMPLES.rglob("*.py") if path.name != "picture.py" and path.name not in overview]
