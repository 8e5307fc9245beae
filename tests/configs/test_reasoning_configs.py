"""Every reasoning configuration builds at full size, and makes optimizer steps at a reduced one."""

from pathlib import Path

import pytest
import torch

from benchmarks.quality.budget import settings_of
from revdeq_lightning.models import ReasonerConfig
from revdeq_lightning.models.build import SolverConfig, build_reasoner
from revdeq_lightning.tasks.optimizers import OptimizerConfig, build_optimizer
from tests.helpers.runs import run

CONFIGS = sorted(Path("configs/reasoning").glob("*.yaml"))
# symbols, answers, shape, most parameters
FULL = {
    "mazes": (4, 2, [11, 11], 100_000),
    "prefix_sums": (2, 2, [32], 30_000),
    "sudoku4": (5, 5, [4, 4], 25_000),
    "sudoku6": (7, 7, [6, 6], 100_000),
    "sudoku9": (10, 10, [9, 9], 250_000),
    "sudoku_extreme": (10, 10, [9, 9], 5_000_000),
}
SMALL = {
    "data.num_validation": 4,
    "data.num_test": 2,
    "data.batch_size": 2,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.log_every_n_steps": 1,
    "model.network.channels": 16,
    "run.wandb": "off",
}


def files(path):
    """The files that describe a run: the smaller and the larger Sudoku are laid over `sudoku6.yaml`."""
    base = path.with_name("sudoku6.yaml")
    return [base, path] if path.stem in ("sudoku4", "sudoku9") else [path]


def test_there_are_the_configurations_that_the_documentation_names():
    assert [path.stem for path in CONFIGS] == sorted(FULL)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_full_size_has_no_more_parameters_than_it_claims(path):
    settings = settings_of(map(str, files(path)))
    symbols, answers, shape, most = FULL[path.stem]
    network = ReasonerConfig(num_symbols=symbols, num_answers=answers, shape=shape, **settings["model"]["network"])
    with torch.device("meta"):
        model = build_reasoner(network, SolverConfig(**settings["model"]["solver"]))
    build_optimizer(model, OptimizerConfig(**settings["model"]["optimizer"]))
    assert 0.5 * most < sum(p.numel() for p in model.parameters()) <= most


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_few_steps_at_reduced_size(path, tmp_path, capsys):
    options = SMALL | {"data.cache_dir": tmp_path / "cache", "run.folder": tmp_path}
    settings = settings_of(map(str, files(path)))["data"]
    if "num_train" in settings:
        options["data.num_train"] = 8
    if "test_sizes" in settings:
        options["data.test_sizes"] = "[]"
    if "path" in settings:
        options |= {"data.path": "null", "data.num_train": 4}
    configs = [f"--config={file}" for file in files(path)]
    run("reasoning", "fit", *configs, *(f"--{key}={value}" for key, value in options.items()))
    (folder,) = (tmp_path / path.stem).iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert "2 of 2 gradients certified exact" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_header_says_command_hardware_and_result(path):
    header = path.read_text().split("\nseed_everything")[0].split("\nmodel:")[0]
    for word in ("command", *(f"--config {file}" for file in files(path)), "hardware", "result"):
        assert word in header
