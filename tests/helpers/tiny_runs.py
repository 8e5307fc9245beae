"""Tiny runs of the language model's task, in this process."""

from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from revdeq_lightning.callbacks.cost import Cost
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig

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
