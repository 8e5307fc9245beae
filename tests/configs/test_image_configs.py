"""Every image configuration builds at full size, and makes optimizer steps at a reduced one."""

from pathlib import Path

import pytest
import torch
import yaml

from revdeq_lightning.data.images.augmentation import AugmentationConfig
from revdeq_lightning.models import ClassifierConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier
from revdeq_lightning.tasks.optimizers import OptimizerConfig, build_optimizer
from tests.helpers.data import image_folder
from tests.helpers.runs import run

FOLDERS = ("cifar10", "cifar100", "digits", "imagenet")
CONFIGS = sorted(path for folder in FOLDERS for path in Path("configs", folder).glob("*.yaml"))
# classes, most parameters
FULL = {
    "cifar10/cpu": (10, 2_000_000),
    "cifar10/mdeq": (10, 1_431_322),
    "cifar10/modern": (10, 10_319_754),
    "cifar10/paper_multi": (10, 10_319_754),
    "cifar10/paper_single": (10, 24_714),
    "cifar10/resnet18": (10, 11_173_962),
    "cifar10/resnet_matched": (10, 1_047_882),
    "cifar100/modern": (100, 10_319_754),
    "digits/default": (10, 1_000_000),
    "imagenet/modern": (1000, 25_557_032),  # ResNet-50's
    "imagenet/resnet18": (1000, 11_689_512),
}
SMALL = {
    "data.source": "folder",
    # Not 16: the last of four stages would have one pixel, where oneDNN gives NaN (bfloat16, channels_last).
    "data.image_size": 32,
    "data.batch_size": 4,
    "data.num_workers": 0,
    "data.max_eval_images": 6,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.strategy": "auto",
    "trainer.max_steps": 2,
    "trainer.log_every_n_steps": 1,
    "run.wandb": "off",
}


def name(path):
    return f"{path.parent.name}/{path.stem}"


def test_there_are_the_configurations_that_the_readme_names():
    assert [name(path) for path in CONFIGS] == sorted(FULL)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_full_size_has_no_more_parameters_than_it_claims(path):
    settings = yaml.safe_load(path.read_text())
    num_classes, most = FULL[name(path)]
    network = ClassifierConfig(num_classes=num_classes, **settings["model"]["network"])
    with torch.device("meta"):
        model = build_image_classifier(network, SolverConfig(**settings["model"]["solver"]))
    build_optimizer(model, OptimizerConfig(**settings["model"]["optimizer"]))
    AugmentationConfig(**settings["data"]["augmentation"])
    assert sum(p.numel() for p in model.parameters()) <= most


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_two_steps_at_reduced_size(path, tmp_path, capsys):
    settings = yaml.safe_load(path.read_text())
    channels = [16] * len(settings["model"]["network"]["channels"])
    options = SMALL | {
        "model.network.channels": channels,
        "data.path": image_folder(tmp_path, num_images=4),
        "data.cache_dir": tmp_path / "cache",
        "run.folder": tmp_path / "runs",
    }
    run("image", "fit", "--config", path, *(f"--{key}={value}" for key, value in options.items()))
    (folder,) = (tmp_path / "runs" / path.stem).iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert "Test (" in capsys.readouterr().out
    assert (folder / "confusion_matrix.png").is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_the_header_says_command_hardware_and_result(path):
    header = path.read_text().split("seed_everything")[0]
    for word in ("command", f"--config {path}", "hardware", "result"):
        assert word in header
