"""Cost of the callbacks: CPU time of training steps with and without them, at their default intervals.

    python -m benchmarks.cluster.callbacks

Short fits with different callbacks run in turn, in a new random order each round, on one thread. Seconds are CPU time
per step; ratios are taken within a round. Callbacks that run every n steps run in every step here, and their cost is
divided by their default n; those that run at validation, by the steps between two validations in the configuration.
Sizes are those of configs/lm/default.yaml (on bytes of Python's library) and configs/cifar10/cpu.yaml (on
scikit-learn's digits, 32x32 pixels).
"""

import argparse
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from lightning import Callback, Trainer

from benchmarks import part
from benchmarks.measure import paired_ratio
from benchmarks.requirements import Requirement, Rows, at_most
from revdeq_lightning.callbacks.config import DiagnosticsConfig
from revdeq_lightning.callbacks.contraction import Contraction
from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.callbacks.gradient_error import GradientError
from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.callbacks.samples import ImageSamples, TextSamples
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.models import ClassifierConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig

MOST_OF_ALL, MOST_OF_GRADIENT_ERROR = 0.03, 0.02
DEFAULTS = DiagnosticsConfig()
INTERVALS = {
    "ResidualCurve": (ResidualCurve, DEFAULTS.residual_curve_every_n_steps),
    "GradientError": (GradientError, GradientError().every_n_steps),
    "Contraction": (Contraction, Contraction().every_n_steps),
}
"""Default intervals in steps. The first entry is always on, the others on request."""
ALWAYS = "Cost, FunctionEvaluations, ReconstructionCertificate"
WARM_UP = 2


class Clock(Callback):
    """CPU seconds of the steps after the warm-up, and of the validations."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.validation = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.moments.append(time.process_time())

    def on_validation_start(self, *_: Any) -> None:
        """Start the clock: this callback is the first one."""
        self.validation -= time.process_time()

    def on_validation_end(self, *_: Any) -> None:
        """Stop the clock: samples and sweeps run before, at the end of the epoch."""
        self.validation += time.process_time()

    @property
    def seconds_per_step(self) -> float:
        return (self.moments[-1] - self.moments[WARM_UP]) / (len(self.moments) - 1 - WARM_UP)


def language(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Task, data, and settings of the default language model."""
    settings = yaml.safe_load(Path("configs/lm/default.yaml").read_text())
    sizes = {"context_length": settings["data"]["context_length"], "batch_size": settings["data"]["batch_size"]}
    limits = {"max_train_bytes": 1_000_000, "max_eval_bytes": 100_000}
    data = TextDataModule("python", tokenizer="bytes", cache_dir=str(folder / "cache"), **sizes, **limits)
    data.prepare_data()
    network = {"vocab_size": data.vocab_size, "context_length": sizes["context_length"]} | settings["model"]["network"]
    solver, optimizer = (settings["model"][name] for name in ("solver", "optimizer"))
    task = LanguageModelingTask(TransformerConfig(**network), SolverConfig(**solver), OptimizerConfig(**optimizer))
    return task, data, settings["trainer"]


def classifier(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Task, data, and settings of the classifier for two CPU cores."""
    settings = yaml.safe_load(Path("configs/cifar10/cpu.yaml").read_text())
    sizes = {"batch_size": settings["data"]["batch_size"], "image_size": 32}
    data = ImageDataModule("digits", cache_dir=str(folder / "cache"), **sizes)
    data.prepare_data()
    network = {"num_classes": data.num_classes, "num_channels": data.num_channels} | settings["model"]["network"]
    solver, optimizer = (settings["model"][name] for name in ("solver", "optimizer"))
    task = ClassificationTask(ClassifierConfig(**network), SolverConfig(**solver), OptimizerConfig(**optimizer))
    return task, data, settings["trainer"]


TASKS: dict[str, tuple[Callable[[Path], tuple[Any, Any, dict[str, Any]]], Callable[[], Callback], int]] = {
    # Steps between two validations: as configured; two epochs of 45,000 images.
    "language model": (language, lambda: TextSamples(["def "], max_new_tokens=200), 175),
    "classifier": (classifier, ImageSamples, 2 * (45_000 // 128)),
}


def fit(make: Any, folder: Path, callbacks: list[Callback], num_steps: int, *, validate: bool = False) -> Clock:
    """Train for some steps, optionally with one validation on one batch at the end."""
    torch.manual_seed(0)
    task, data, settings = make(folder)
    clock = Clock()
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=num_steps,
            callbacks=[clock, *callbacks],
            logger=ContinuedCSVLogger(run),
            log_every_n_steps=settings["log_every_n_steps"],
            gradient_clip_val=settings.get("gradient_clip_val"),
            limit_val_batches=1 if validate else 0,
            val_check_interval=num_steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(task, data)
    return clock


def always() -> list[Callback]:
    return [c for c in DEFAULTS.callbacks() if not isinstance(c, ResidualCurve)]


def measure(name: str, folder: Path, rounds: int, num_steps: int) -> list[dict[str, Any]]:
    """Overheads as fractions of the step time, and the underlying seconds."""
    make, samples, validation_interval = TASKS[name]
    few = WARM_UP + 5
    competitors: dict[str, Callable[[], float]] = {
        "nothing": lambda: fit(make, folder, [], num_steps).seconds_per_step,
        ALWAYS: lambda: fit(make, folder, always(), num_steps).seconds_per_step,
    }
    for label, (kind, _) in INTERVALS.items():
        competitors[label] = lambda kind=kind: fit(make, folder, [kind(1)], few).seconds_per_step
    validations: dict[str, list[Callback]] = {"validation": []}
    seconds: dict[str, list[float]] = {key: [] for key in (*competitors, "validation", "DepthSweep", "Samples")}
    generator = random.Random(0)
    for i in range(rounds + 1):
        found = {key: competitors[key]() for key in generator.sample(list(competitors), len(competitors))}
        validations = {"validation": [], "DepthSweep": [DepthSweep(every_n_validations=1)], "Samples": [samples()]}
        for key, callbacks in validations.items():
            found[key] = fit(make, folder, callbacks, 1, validate=True).validation
        if i > 0:  # the first round warms up
            for key, value in found.items():
                seconds[key].append(value)
            print(f"{name}, round {i}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    step = seconds["nothing"]
    overheads: dict[str, float] = {ALWAYS: paired_ratio(seconds[ALWAYS], step).median - 1}
    for label, (_, interval) in INTERVALS.items():
        overheads[label] = (paired_ratio(seconds[label], step).median - 1) / interval
    for label in ("DepthSweep", "Samples"):
        more = [a - b for a, b in zip(seconds[label], seconds["validation"], strict=True)]
        overheads[label] = paired_ratio(more, step).median / validation_interval
    intervals = {label: interval for label, (_, interval) in INTERVALS.items()}
    intervals |= dict.fromkeys(("DepthSweep", "Samples"), validation_interval)
    return [
        {
            "task": name,
            "callback": label,
            "steps between": intervals.get(label, 1),
            "share of a step": share,
            "seconds": round(median(seconds[label]), 4),
            "seconds of a step": round(median(step), 4),
        }
        for label, share in overheads.items()
    ]


def judge(rows: Rows) -> list[Requirement]:
    verdict = []
    for task in dict.fromkeys(row["task"] for row in rows):
        shares = {row["callback"]: row["share of a step"] for row in rows if row["task"] == task}
        for what, share, limit in (
            ("all callbacks", sum(shares.values()), MOST_OF_ALL),
            ("GradientError", shares["GradientError"], MOST_OF_GRADIENT_ERROR),
        ):
            verdict.append(at_most(f"{task}: {what}, share of a step's time", share, limit, "{:.4f}"))
    return verdict


def page(rows: Rows) -> list[str]:
    """Callbacks down, tasks across."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for label in dict.fromkeys(row["callback"] for row in rows):
        own = [row for row in rows if row["callback"] == label]
        intervals = " / ".join(dict.fromkeys(str(row["steps between"]) for row in own))
        shares = {row["task"]: f"{row['share of a step']:.2%}" for row in own}
        lines.append({"callback": label, "once in": f"{intervals} steps"} | shares)
    totals = {task: f"{sum(row['share of a step'] for row in rows if row['task'] == task):.2%}" for task in tasks}
    steps = {row["task"]: f"{row['task']} {row['seconds of a step']:.3f} s" for row in rows}
    return [
        f"CPU time added to a training step, at the default intervals. A step without: {', '.join(steps.values())}.",
        part.markdown_table([*lines, {"callback": "all", "once in": ""} | totals]),
    ]


def run(options: argparse.Namespace) -> part.Result:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds, steps = (1, 8) if options.quick else (options.rounds, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in options.only for row in measure(name, Path(folder), rounds, steps)]
    return part.Result({"": rows}, judge(rows), page(rows))


main = part.command(
    "cluster.callbacks",
    "Callbacks",
    __doc__,
    run,
    options={
        "--rounds": {"type": int, "default": 7},
        "--steps": {"type": int, "default": 32, "help": "steps per fit; the first two are warm-up"},
        "--only": {"nargs": "+", "choices": list(TASKS), "default": list(TASKS)},
    },
)

if __name__ == "__main__":
    sys.exit(main())
