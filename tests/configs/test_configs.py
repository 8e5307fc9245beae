"""Every configuration builds at full size, and trains at a reduced one unless another with the same parts does."""

from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.quality.budget import settings_of
from benchmarks.quality.text import sentences
from revdeq_lightning.data.images.augmentation import AugmentationConfig
from revdeq_lightning.data.text.tokenizers import BytePairTokenizer
from revdeq_lightning.models import ClassifierConfig, ReasonerConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier, build_language_model, build_reasoner
from revdeq_lightning.tasks.optimizers import OptimizerConfig, build_optimizer
from tests.helpers.data import image_folder
from tests.helpers.runs import run, text_file

# What the data give to the model (classes, vocabulary, or symbols and shape), and its parameters.
FULL = {
    "cifar10/cpu": (10, 1_084_282),
    "cifar10/equilibrium": (10, 1_084_282),
    "cifar10/mdeq": (10, 1_431_322),
    "cifar10/modern": (10, 7_683_722),
    "cifar10/paper_multi": (10, 10_319_754),
    "cifar10/paper_single": (10, 24_714),
    "cifar10/resnet18": (10, 11_173_962),
    "cifar10/resnet_matched": (10, 1_047_882),
    "cifar100/modern": (100, 7_729_892),
    "digits/default": (10, 112_938),
    "imagenet/modern": (1000, 18_378_952),  # ResNet-50 has 25,557,032
    "imagenet/resnet18": (1000, 11_689_512),
    "lm/default": (2048, 1_230_336),
    "lm/tinyshakespeare": (65, 242_944),
    "lm/tinyshakespeare_deq": (65, 242_944),
    "lm/tinyshakespeare_deq_jacobian": (65, 242_944),
    "lm/tinyshakespeare_explicit": (65, 919_552),
    "lm/tinyshakespeare_looped": (65, 242_944),
    "lm/tinyshakespeare_looped_truncated": (65, 242_944),
    "lm/tinyshakespeare_revdeq": (65, 242_944),
    "lm/wikitext103": (50304, 94_138_368),
    "lm/wikitext103_modern": (50304, 86_710_272),
    "reasoning/mazes": ((4, 2, [11, 11]), 83_426),
    "reasoning/prefix_sums": ((2, 2, [32]), 28_034),
    "reasoning/sudoku4": ((5, 5, [4, 4]), 24_437),
    "reasoning/sudoku6": ((7, 7, [6, 6]), 97_255),
    "reasoning/sudoku9": ((10, 10, [9, 9]), 226_314),
    "reasoning/sudoku_extreme": ((10, 10, [9, 9]), 4_247_562),
}
# Only parsed, as their parts train in others: stages, ResNets, ImageNet's folder, the reversible solver, Sudokus.
NOT_TRAINED = {
    *("cifar100/modern", "cifar10/resnet_matched", "imagenet/resnet18"),
    *("lm/tinyshakespeare_revdeq", "reasoning/sudoku4", "reasoning/sudoku9"),
}
FOLDERS = sorted({key.split("/")[0] for key in FULL})
CONFIGS = [path for folder in FOLDERS for path in sorted(Path("configs", folder).glob("*.yaml"))]
SMALL = {
    "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.strategy": "auto",
    "trainer.max_steps": 2, "trainer.log_every_n_steps": 1, "run.wandb": "off", "run.depth_sweep": "false",
    "diagnostics.depth_sweep_every_n_validations": 0,
}  # fmt: skip
SMALL_TASKS = {
    "lm": {
        "model.network.d_model": 16, "model.network.num_heads": 2, "model.network.d_mlp": 24, "data.source": "files",
        "data.dataset_name": "null", "data.tokenizer": "bytes", "data.context_length": 8, "data.batch_size": 4,
        "trainer.val_check_interval": 2, "run.sample_tokens": 5, "run.test": "false",
    },
    # Not 16 pixels: the last of four stages would have one pixel, where oneDNN gives NaN (bfloat16, channels_last).
    "image": {"data.source": "folder", "data.image_size": 32, "data.num_workers": 0, "data.batch_size": 4},
    "reasoning": {
        "model.network.channels": 16, "data.num_validation": 4, "data.num_test": 2, "data.batch_size": 2,
        "trainer.val_check_interval": 2, "trainer.precision": "32-true", "run.test": "false",
    },
}  # fmt: skip
SAYS = {"lm": "step 2: val/loss", "image": "Test (", "reasoning": "2 of 2 gradients certified exact"}


def key(path):
    return f"{path.parent.name}/{path.stem}"


every_config = pytest.mark.parametrize("path", CONFIGS, ids=key)


def files(path):
    """The files that describe a run: a variant is laid over its base."""
    bases = {"sudoku4": "sudoku6", "sudoku9": "sudoku6", "equilibrium": "cpu"}
    base = "tinyshakespeare" if path.stem.startswith("tinyshakespeare_") else bases.get(path.stem)
    return [str(path.with_name(f"{base}.yaml")), str(path)] if base else [str(path)]


def task(path):
    return path.parent.name if path.parent.name in ("lm", "reasoning") else "image"


def test_there_are_the_configurations_that_the_readme_names():
    assert list(map(key, CONFIGS)) == list(FULL)


@every_config
def test_full_size_has_the_parameters_that_it_claims(path):
    settings = settings_of(files(path))
    given, expected = FULL[key(path)]
    network = settings["model"]["network"]
    solver = SolverConfig(**{k: float(v) if k == "rtol" else v for k, v in settings["model"]["solver"].items()})
    with torch.device("meta"):
        if task(path) == "lm":
            sizes = {"vocab_size": given, "context_length": settings["data"]["context_length"]}
            model = build_language_model(TransformerConfig(**sizes, **network), solver)
        elif task(path) == "image":
            model = build_image_classifier(ClassifierConfig(given, **network), solver)
            AugmentationConfig(**settings["data"]["augmentation"])
        else:
            model = build_reasoner(ReasonerConfig(*given, **network), solver)
    build_optimizer(model, OptimizerConfig(**settings["model"]["optimizer"]))
    assert sum(p.numel() for p in model.parameters()) == expected


@every_config
def test_two_steps_at_reduced_size(path, tmp_path, capsys):
    settings = settings_of(files(path))
    options = SMALL | SMALL_TASKS[task(path)] | {"data.cache_dir": tmp_path / "cache", "run.folder": tmp_path / "runs"}
    if task(path) == "lm":
        options["data.path"] = text_file(tmp_path)
    elif task(path) == "image":
        options["model.network.channels"] = [16] * len(settings["model"]["network"]["channels"])
        options |= {"data.path": image_folder(tmp_path, num_images=4), "data.max_eval_images": 6}
    else:
        small = {"num_train": 4, "test_sizes": "[]", "path": "null"}
        options |= {f"data.{name}": value for name, value in small.items() if name in settings["data"]}
        if "path" in settings["data"]:
            options["data.num_train"] = 4
    command = [] if task(path) == "lm" else [task(path)]
    configs = [f"--config={file}" for file in files(path)]
    words = [*command, "fit", *configs, *(f"--{name}={value}" for name, value in options.items())]
    if key(path) in NOT_TRAINED:
        with pytest.raises(SystemExit, match=r"^0$"):
            run(*words, "--print_config")
        return
    run(*words)
    (folder,) = (tmp_path / "runs" / path.stem).iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert SAYS[task(path)] in capsys.readouterr().out


@pytest.mark.slow
def test_wikitext_in_a_local_folder_with_a_tokenizer_file(tmp_path, capsys):
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split, count in (("train", 40_000), ("validation", 1000), ("test", 1000)):
        rows = [f" {sentence} . \n" for sentence in sentences(count)]  # about 6 MB; no line ends in a letter
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    tokenizer = Tokenizer.from_str(BytePairTokenizer.train(rows, 4000).state()["definition"])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = SMALL | {
        key: v for key, v in SMALL_TASKS["lm"].items() if key not in ("data.source", "data.dataset_name")
    }
    options |= {"data.path": folder, "data.tokenizer": tmp_path / "tokenizer.json", "run.folder": tmp_path}
    options |= {"data.cache_dir": tmp_path / "cache", "data.context_length": 448, "trainer.limit_val_batches": 2}
    run("fit", "--config=configs/lm/wikitext103.yaml", *(f"--{key}={value}" for key, value in options.items()))
    assert "step 2: val/loss" in capsys.readouterr().out


@every_config
def test_the_header_says_command_hardware_and_result(path):
    header = path.read_text().split("\nseed_everything")[0].split("\nmodel:")[0]
    for word in ("command", *(f"--config {file}" for file in files(path)), "hardware", "result"):
        assert word in header
