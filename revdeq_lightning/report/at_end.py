"""Prints what a run trains when it starts; at its end writes its page and prints how to continue."""

import warnings
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.checkpoints.files import Found, newest_good
from revdeq_lightning.checkpoints.names import BEST, CHECKPOINTS, LAST
from revdeq_lightning.equilibrium import equilibria
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.report.page import write_report
from revdeq_lightning.report.run_folder import pictures_in
from revdeq_lightning.runs.folder import CONFIG, METRICS, REPORT, RunConfig, command
from revdeq_lightning.runs.signals import Stopped


class RunReport(Callback):
    """Prints what is trained and where; after Ctrl-C or an error writes the page and prints how to continue."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.folder: Path | None = None
        self.has_started = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # all processes must ask for `log_dir`, and only here do they do so together
            self.folder = Path(str(trainer.log_dir))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.has_started = True
        for logger in trainer.loggers:
            if isinstance(logger, ContinuedCSVLogger):
                logger.rewind(trainer.global_step)
        if trainer.is_global_zero:
            model: Any = pl_module.model
            num_parameters = sum(p.numel() for p in model.parameters())
            batches = trainer.num_training_batches
            begin = f"resumed at step {trainer.global_step}" if trainer.global_step else "new"
            print(f"Model: {num_parameters:,} parameters, {describe_solver(model)}")
            steps = trainer.estimated_stepping_batches
            print(f"Run ({begin}): {steps:,} steps, {batches:,} batches an epoch, in {self.folder}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.folder and trainer.is_global_zero:
            # PyTorch raises a dead worker's error again when any other child process ends, until its loader is closed.
            if (data := cast(Any, trainer).datamodule) is not None:
                data.on_exception(exception)
            for logger in trainer.loggers:
                logger.save()
            if isinstance(exception, KeyboardInterrupt | Stopped):
                print(f"\n{str(exception) or 'Interrupted'} after step {trainer.global_step}.")
            if self.has_started:
                close_run(self.folder, self.run)


def describe_solver(model: Any) -> str:
    """Describe solvers and evaluations of f in words."""
    layers = equilibria(model)
    if not layers:
        return "an explicit stack of layers without equilibrium"
    num_f = sum(p.numel() for layer in layers for p in layer.f.parameters())
    names = dict.fromkeys(type(layer.solver).__name__ for layer in layers)
    at_most = "at most " if any(layer.solver.has_tolerance for layer in layers) else ""
    counts = " + ".join(str(layer.solver.num_evaluations) for layer in layers)
    return f"{num_f:,} of them in f; {', '.join(names)}, {at_most}{counts} evaluations of f"


def close_run(folder: Path, run: RunConfig) -> None:
    """Write the run's page and print its files and the commands that continue it."""
    if (folder / METRICS).is_file():
        try:
            write_report([folder])
        except Exception as error:  # the run is complete and saved; its page can be written again by hand
            warnings.warn(f"no page of the run in {folder}: {error!r}", stacklevel=2)
    best, last = (folder / CHECKPOINTS / name for name in (BEST, LAST))
    found = Found(last, {}) if last.exists() else newest_good(folder / CHECKPOINTS)
    print(f"\nRun folder         {folder}")
    files = {path.stem.replace("_", " "): path for path in pictures_in(folder)}
    known = {"report": folder / REPORT, "metrics": folder / METRICS, "settings": folder / CONFIG}
    for label, path in (known | files).items():
        if path.is_file():
            print(f"  {label:<16} {path}")
    if (go_on := found.path) is not None:
        trained = best if best.exists() and best not in found.faults else go_on
        print(f"  {'checkpoints':<16} {', '.join(map(str, dict.fromkeys([trained, go_on])))}")
        label, subcommand, *arguments = run.usage
        print(f"Go on              {command(run, 'fit', go_on)}")
        print(f"Test               {command(run, 'test', trained)}")
        print(f"{label:<18} {command(run, subcommand, trained, *arguments)}", flush=True)
    elif found.faults:
        faults = "; ".join(f"{path.name} {fault}" for path, fault in found.faults.items())
        print(f"No checkpoint in {folder / CHECKPOINTS} can be used: {faults}", flush=True)
    else:
        print("There is no checkpoint yet: the first is written after the first validation, or at Ctrl-C.", flush=True)
