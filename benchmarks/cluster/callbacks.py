"""Cost of the callbacks: CPU time of training steps with and without them, at their default intervals.

    python -m benchmarks.cluster.callbacks

Short fits with different callbacks run in turn, in a new random order each round, on one thread. Seconds are CPU time
per step; ratios are taken within a round. Callbacks that run every n steps run in every step here, and their cost is
divided by their default n; those that run at validation, by the steps between two validations in the configuration.
Sizes are those of configs/lm/default.yaml (on bytes of Python's library) and configs/cifar10/cpu.yaml (on
scikit-learn's digits, 32x32 pixels). Writes `benchmarks/results/callbacks.{json,md}`; exits with 1 if a limit is
exceeded.
"""

import argparse
import json
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

from benchmarks.measure import paired_ratio, provenance
from benchmarks.part import RESULTS
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
        """Record the time."""
        self.moments.append(time.process_time())

    def on_validation_start(self, *_: Any) -> None:
        """Start the clock: this callback is the first one."""
        self.validation -= time.process_time()

    def on_validation_end(self, *_: Any) -> None:
        """Stop the clock: samples and sweeps run before, at the end of the epoch."""
        self.validation += time.process_time()

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps after the warm-up."""
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
    """The callbacks that run in every step."""
    return [c for c in DEFAULTS.callbacks() if not isinstance(c, ResidualCurve)]


def measure(name: str, folder: Path, rounds: int, num_steps: int) -> dict[str, Any]:
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
    return {
        "task": name,
        "seconds": {key: round(median(values), 4) for key, values in seconds.items()},
        "overheads": overheads,
        "all": sum(overheads.values()),
        "intervals": {label: interval for label, (_, interval) in INTERVALS.items()}
        | dict.fromkeys(("DepthSweep", "Samples"), validation_interval),
    }


def judge(results: list[dict[str, Any]]) -> list[str]:
    """Requirements that are not met."""
    faults = []
    for result in results:
        for label, value, limit in (
            ("all callbacks", result["all"], MOST_OF_ALL),
            ("GradientError", result["overheads"]["GradientError"], MOST_OF_GRADIENT_ERROR),
        ):
            if value >= limit:
                faults.append(f"{label}, {result['task']}: {value:.2%} of a step, required < {limit:.0%}")
    return faults


def markdown(results: list[dict[str, Any]], facts: dict[str, Any], faults: list[str]) -> str:
    """The page."""
    header = ["callback", "once in", *(f"{result['task']}" for result in results)]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for label in results[0]["overheads"]:
        intervals = dict.fromkeys(str(result["intervals"].get(label, 1)) for result in results)
        values = " | ".join(f"{result['overheads'][label]:.2%}" for result in results)
        lines.append(f"| {label} | {' / '.join(intervals)} steps | {values} |")
    total = " | ".join(f"{result['all']:.2%}" for result in results)
    lines.append(f"| all | | {total} |")
    steps = ", ".join(f"{result['task']} {result['seconds']['nothing']:.3f} s" for result in results)
    origin = (
        f"`{facts['command']}`, {facts['date']}, {facts['hardware']['cpu']}, one thread, load"
        f" {facts['hardware']['load_average']}, torch {facts['versions']['torch']}, commit {facts['commit'][:7]}"
        f"{' with uncommitted changes' if facts['uncommitted_changes'] else ''}."
    )
    verdict = (
        "Requirements that are not met:\n\n" + "\n".join(f"- {fault}" for fault in faults)
        if faults
        else "All requirements are met."
    )
    title = "# Callbacks: CPU time added to a training step, at the default intervals"
    required = f"Required: all < {MOST_OF_ALL:.0%}, GradientError < {MOST_OF_GRADIENT_ERROR:.0%}."
    return (
        "\n\n".join([title, origin, f"A step without callbacks: {steps}. {required}", "\n".join(lines), verdict]) + "\n"
    )


def main() -> None:
    """Measure, write, print; exit with 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=32, help="steps per fit; the first two are warm-up")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    facts = provenance("python -m benchmarks.cluster.callbacks")
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, Path(folder), arguments.rounds, arguments.steps) for name in arguments.only]
    faults = judge(results)
    page = markdown(results, facts, faults)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "callbacks.md").write_text(page)
    (arguments.output / "callbacks.json").write_text(json.dumps({"provenance": facts, "results": results}, indent=1))
    print(page)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
