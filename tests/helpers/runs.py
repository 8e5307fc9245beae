"""Small runs of text, and run folders."""

import csv
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from revdeq_lightning.callbacks.cost import Cost
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.checkpoints.files import checksums, write_checksums
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.checkpoints.names import SUMS
from revdeq_lightning.checkpoints.sharded import VALUES, other_values, write_part
from revdeq_lightning.cli.main import main
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig

# Tiny runs of the language model's task, in this process.


MUON = {"optimizer": "muon", "lr": 0.01, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "ema_decay": 0.9}


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    if not path.exists():
        numbers = torch.randint(97, 113, (1500,), generator=torch.Generator().manual_seed(0))
        path.write_text("".join(" " if i % 5 == 0 else chr(n) for i, n in enumerate(numbers.tolist())))
    return path


def tiny_data(folder: Path, **arguments) -> TextDataModule:
    arguments = {"tokenizer": "characters", "context_length": 8, "batch_size": 4, "seed": 3} | arguments
    return TextDataModule("files", path=str(text_file(folder)), cache_dir=str(folder / "cache"), **arguments)


def tiny_task(data: TextDataModule, *, solver=None, optimizer=None, seed=0, **settings) -> LanguageModelingTask:
    torch.manual_seed(seed)
    sizes = {"vocab_size": data.vocab_size, "context_length": 8, "d_model": 16, "num_heads": 2, "d_mlp": 24}
    solver = SolverConfig(**(solver or {"max_steps": 3, "mismatch": "raise"}))
    return LanguageModelingTask(TransformerConfig(**sizes), solver, OptimizerConfig(**(optimizer or MUON)), **settings)


def tiny_trainer(folder: Path, callbacks: list[Callback] = (), **settings) -> Trainer:
    settings = {"enable_progress_bar": False} | settings
    settings = {"enable_model_summary": False, "enable_checkpointing": False} | settings
    settings = {"max_steps": 20, "logger": False, "gradient_clip_val": 1.0, "log_every_n_steps": 2} | settings
    settings = {"check_val_every_n_epoch": None, "val_check_interval": 7, "num_sanity_val_steps": 0} | settings
    callbacks = [Cost(), FunctionEvaluations(), ResumableRandomState(), *callbacks]
    return Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        **{"devices": 1} | settings,
    )


def assert_equal(a, b, where="checkpoint"):
    """Of two states, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where


# The command line on a tiny model, in this process.


def tiny_config(folder: Path, *, network=None, **trainer) -> Path:
    config = {
        "model": {
            "network": network or {"d_model": 16, "num_heads": 2, "d_mlp": 24},
            "solver": {"max_steps": 3},
            "optimizer": {"optimizer": "muon", "lr": 0.01, "ema_decay": 0.9},
        },
        "data": {
            "source": "files",
            "path": str(text_file(folder)),
            "tokenizer": "characters",
            "context_length": 8,
            "batch_size": 4,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            **trainer,
        },
        "run": {"folder": str(folder / "runs"), "sample_tokens": 5, "sample_prompt": "a"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


def error_of(capsys: pytest.CaptureFixture, *arguments: object, code: int | None = None) -> str:
    """The one error that a command tells before it ends."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == code if code else stop.value.code
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


# What a run of the command line left in its folder.


TRAINED = ("state_dict", "trained_weights", "optimizer_states", "lr_schedulers", "random_states", "global_step")


def run_metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of run_metrics.csv without what depends on the clock; evaluations after training are left out."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            {key: v for key, v in row.items() if v and not key.startswith("system/")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"step"} and not any(key.startswith("test/") for key in row)]


def trained(checkpoint: Path) -> dict[str, Any]:
    """What training goes on from."""
    content = torch.load(checkpoint, weights_only=True)
    return {key: content[key] for key in TRAINED if key in content}


def put_back(kept: Path, folder: Path, *names: str) -> None:
    """The run's folder as it was kept, with these checkpoints alone. (At another path `best.ckpt` begins anew.)"""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name not in names:
            path.unlink()


def kept_steps(folder: Path) -> dict[str, int]:
    """The steps of a run's checkpoints, by their names without `.ckpt`."""
    paths = (folder / "checkpoints").glob("*.ckpt")
    return {path.stem: torch.load(path, weights_only=True)["global_step"] for path in paths}


def names(folder: Path) -> set[str]:
    """All files of a run."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def damage(path: Path) -> None:
    """Cut the end off, as a crash of the machine does."""
    content = path.read_bytes()
    path.unlink()  # another name of the file stays whole
    path.write_bytes(content[: len(content) // 2])


def watch_disk(note: Callable[[str, str], object], patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Call `note` with "sync" and the path after each sync, and with "rename" and the target before each new name."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def noting(change: Callable[..., None]) -> Callable[..., None]:
        def noted(path: Any, target: Any, **options: Any) -> None:
            note("rename", os.path.abspath(target))
            change(path, target, **options)

        return noted

    for name, call in {"fsync": fsync, "rename": noting(os.rename), "replace": noting(os.replace)}.items():
        patch(os, name, call)  # `Path`'s call them


@contextmanager
def limited_file_sizes() -> Iterator[Callable[[int | None], None]]:
    """Let no file grow beyond a size, as a full disk does with another error number; None: without a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# W&B.


def without_key(patch: pytest.MonkeyPatch, home: Path) -> None:
    """As on a machine where nobody logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.delenv("NETRC", raising=False)


# Folders of shards, written by this process, and what may happen to them.


STATE = {
    "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7)},
    "optimizer_0": {"param_groups": [{"lr": 0.25}], "state": {"w": {"exp_avg": torch.ones(2, 3).bfloat16()}}},
}


def write_shards(folder: Path, step: int = 1) -> Path:
    """A checkpoint of this step, sealed."""
    folder.mkdir(exist_ok=True)
    write_part(STATE, folder, 0)
    torch.save({"global_step": step, "loops": {}, VALUES: other_values(STATE)}, folder / "meta.pt")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the checksums of all that is in the folder now."""
    write_checksums(folder, checksums(path for path in folder.iterdir() if path.name != SUMS))


def change_places(folder: Path, change: Any) -> None:
    """Let `change` do something to what the file of the first process says of its tensors' places; sealed."""
    path = folder / "process-0.safetensors"
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    changed = change(places)
    save_file(load_file(path), path, {"DCP_SHARDING_INFO": changed if isinstance(changed, str) else json.dumps(places)})
    seal(folder)


class Malice:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (str(self.path),)


def touch(path: str) -> None:
    Path(path).touch()
