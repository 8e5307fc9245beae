"""Every configuration builds at full size, and trains at a reduced one."""

from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.quality.budget import settings_of
from benchmarks.quality.text import sentences
from revdeq_lightning.data.text.tokenizers import BytePairTokenizer
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_language_model
from revdeq_lightning.tasks.optimizers import OptimizerConfig, build_optimizer
from tests.helpers.runs import run, text_file

CONFIGS = sorted(Path("configs/lm").glob("*.yaml"))
# vocabulary, parameters
FULL = {
    "default": (2048, 1_230_336),
    "tinyshakespeare": (65, 242_944),
    "tinyshakespeare_deq": (65, 242_944),
    "tinyshakespeare_deq_jacobian": (65, 242_944),
    "tinyshakespeare_explicit": (65, 919_552),
    "tinyshakespeare_looped": (65, 242_944),
    "tinyshakespeare_looped_truncated": (65, 242_944),
    "tinyshakespeare_revdeq": (65, 242_944),
    "wikitext103": (50304, 94_138_368),
    "wikitext103_modern": (50304, None),
}
SMALL = {
    "model.network.d_model": 16,
    "model.network.num_heads": 2,
    "model.network.d_mlp": 24,
    "data.source": "files",
    "data.dataset_name": "null",
    "data.tokenizer": "bytes",
    "data.context_length": 8,
    "data.batch_size": 4,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.strategy": "auto",
    "trainer.max_steps": 3,
    "trainer.val_check_interval": 2,
    "trainer.log_every_n_steps": 1,
    "run.sample_tokens": 5,
    "run.wandb": "off",
}


def files(path):
    """The files that describe a run: those beside `tinyshakespeare.yaml` are laid over it."""
    base = path.with_name("tinyshakespeare.yaml")
    return [base, path] if path.stem.startswith("tinyshakespeare_") else [path]


def test_there_are_the_configurations_that_the_readme_names():
    assert [path.stem for path in CONFIGS] == sorted(FULL)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_full_size_has_the_parameters_that_it_claims(path):
    settings = settings_of(map(str, files(path)))
    vocab_size, expected = FULL[path.stem]
    sizes = {"vocab_size": vocab_size, "context_length": settings["data"]["context_length"]}
    network = TransformerConfig(**sizes, **settings["model"]["network"])
    solver = {k: float(v) if k == "rtol" else v for k, v in settings["model"]["solver"].items()}
    with torch.device("meta"):
        model = build_language_model(network, SolverConfig(**solver))
    build_optimizer(model, OptimizerConfig(**settings["model"]["optimizer"]))
    if expected:
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_few_steps_at_reduced_size(path, tmp_path, capsys):
    options = SMALL | {"data.path": text_file(tmp_path), "data.cache_dir": tmp_path / "cache", "run.folder": tmp_path}
    configs = [f"--config={file}" for file in files(path)]
    run("fit", *configs, *(f"--{key}={value}" for key, value in options.items()))
    (folder,) = (tmp_path / path.stem).iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert "step 2: val/loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wikitext103", "wikitext103_modern"])
def test_wikitext_in_a_local_folder_with_a_tokenizer_file(name, tmp_path, capsys):
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split, count in (("train", 40_000), ("validation", 1000), ("test", 1000)):
        rows = [f" {sentence} . \n" for sentence in sentences(count)]  # about 6 MB; no line ends in a letter
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    tokenizer = Tokenizer.from_str(BytePairTokenizer.train(rows, 4000).state()["definition"])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = {key: value for key, value in SMALL.items() if key not in ("data.source", "data.dataset_name")}
    options |= {"data.path": folder, "data.tokenizer": tmp_path / "tokenizer.json", "run.folder": tmp_path}
    options |= {"data.cache_dir": tmp_path / "cache", "data.context_length": 448, "trainer.limit_val_batches": 2}
    run("fit", f"--config=configs/lm/{name}.yaml", *(f"--{key}={value}" for key, value in options.items()))
    assert "step 2: val/loss" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_header_says_command_hardware_and_result(path):
    header = path.read_text().split("\nseed_everything")[0].split("\nmodel:")[0]
    for word in ("command", *(f"--config {file}" for file in files(path)), "hardware", "result"):
        assert word in header
