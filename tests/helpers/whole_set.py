"""All callbacks that watch, each as often as it can, on tiny tasks; files and weights of the runs."""

import csv
from pathlib import Path

import torch
from lightning import Trainer
from strangers import StepByStep
from tiny_images import image_folder
from tiny_runs import tiny_data, tiny_task

from revdeq_lightning.callbacks.contraction import Contraction
from revdeq_lightning.callbacks.cost import Cost
from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.callbacks.gradient_error import GradientError
from revdeq_lightning.callbacks.reconstruction_certificate import ReconstructionCertificate
from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.callbacks.samples import ImageSamples, TextSamples
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.models import ClassifierConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig


def language(folder: Path):
    data = tiny_data(folder)
    return tiny_task(data), data


def classifier(folder: Path):
    """Two equilibria; BatchNorm before and behind them."""
    data = ImageDataModule(
        "folder", path=str(image_folder(folder)), image_size=16, batch_size=8, cache_dir=str(folder / "cache"), seed=3
    )
    data.prepare_data()
    torch.manual_seed(0)
    network = ClassifierConfig(num_classes=3, channels=[16, 16], stem_stride=2)
    solver = SolverConfig(max_steps=2, mismatch="raise")
    return ClassificationTask(network, solver, OptimizerConfig(lr=0.01, ema_decay=0.9)), data


def watching(every: int, validations: int) -> list:
    return [
        Cost(peak_flops=1e12),
        FunctionEvaluations(),
        ReconstructionCertificate("raise"),
        GradientError(every),
        Contraction(every, num_iterations=3, warn_at=100.0),
        ResidualCurve(every),
        DepthSweep(every_n_validations=validations),
        TextSamples(["a", "b c"], max_new_tokens=20, every_n_validations=validations),
        ImageSamples(num_images=5, every_n_validations=validations),
    ]


def whole_set(task, every: int = 2, validations: int = 1) -> list:
    """Without those of the other task."""
    other = ImageSamples if hasattr(task, "sample_text") else TextSamples
    return [callback for callback in watching(every, validations) if not isinstance(callback, other)]


def fit(folder: Path, make, callbacks, ckpt_path=None, **settings):
    """Losses and random numbers of each step, and all that the run leaves."""
    task, data = make(folder)
    notes = StepByStep()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    run = Trainer(
        callbacks=[*callbacks(task), ResumableRandomState(), notes],
        logger=ContinuedCSVLogger(folder / "run"),
        **quiet
        | {"accelerator": "cpu", "devices": 1, "max_steps": 6, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
        | {"val_check_interval": 3, "check_val_every_n_epoch": None}
        | settings,
    )
    for logger in run.loggers:
        if ckpt_path:
            logger.rewind(torch.load(ckpt_path, weights_only=True)["global_step"])
    run.fit(task, data, ckpt_path=ckpt_path)
    return notes, run


def table(path: Path, without: str = "system/") -> list[dict[str, str]]:
    """Rows of a CSV file, but for the columns that hold times."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if v and not k.startswith(without)} for row in csv.DictReader(file)]
