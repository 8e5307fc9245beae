"""Base class of the command lines of all tasks: the trainer with its callbacks, loggers and checkpoints."""

import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError, safe_open

from revdeq_lightning.callbacks.config import DiagnosticsConfig
from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.checkpoints.best import BestCheckpoint
from revdeq_lightning.checkpoints.files import Found, try_folder
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.checkpoints.last import LastCheckpoint
from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
from revdeq_lightning.cli.errors import fail, run_errors, setting_errors
from revdeq_lightning.cli.parser import ReadableErrors
from revdeq_lightning.cli.paths import with_variables
from revdeq_lightning.cli.process_end import (
    children_ended,
    end_after_interrupt,
    end_process_group,
    finished_wandb,
    let_sigterm_end_the_wait,
    lost_peer,
    stop_signals_noted,
)
from revdeq_lightning.cli.quiet import quieten_lightning
from revdeq_lightning.cli.saved_config import SaveRunConfig
from revdeq_lightning.cli.yaml_text import prepare_jsonargparse
from revdeq_lightning.distributed.strategies import is_fsdp2, register_strategies, require_meeting_place
from revdeq_lightning.equilibrium import DivergenceError, ReversibleAdjoint, equilibria
from revdeq_lightning.errors import BlockError, CheckpointError
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.loggers.endurance import enduring
from revdeq_lightning.loggers.progress import RunProgress
from revdeq_lightning.loggers.read_once import ReadOnce
from revdeq_lightning.loggers.wandb_logger import WandbCheckpoints, wandb_logger
from revdeq_lightning.program import program
from revdeq_lightning.report.at_end import RunReport, close_run
from revdeq_lightning.runs.divergence import DivergedError, DivergenceGuard
from revdeq_lightning.runs.folder import (
    CONFIG,
    RunConfig,
    checkpoint_to_resume,
    date_and_time,
    describes_run,
    find_checkpoint,
    job_version,
    new_version,
    run_of_checkpoint,
)
from revdeq_lightning.runs.lock import LOCK, LockedError, locked
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.runs.signals import STOP
from revdeq_lightning.runs.stop_signal import SameStart, StopSignal
from revdeq_lightning.tasks.checkpoint_fit import changed_settings, check_weights
from revdeq_lightning.tasks.recipe import deferred_weights

NOT_SUPPORTED: dict[type, str] = {
    LearningRateFinder: "it would train before the run; set model.optimizer.lr",
    BatchSizeFinder: "it would train before the run; set data.batch_size",
    StochasticWeightAveraging: "checkpoints would not have the average; set model.optimizer.ema_decay",
    WeightAveraging: "checkpoints would not have the average; set model.optimizer.ema_decay",
    EMAWeightAveraging: "set model.optimizer.ema_decay",
}
"""Callbacks of Lightning, and what to do instead."""


class Parser(ReadableErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


class AbstractCommandLine(LightningCLI):
    """`fit`, `validate` and `test` of one task and its data."""

    run_class: ClassVar[type[RunConfig]]
    figures: ClassVar[dict[str, str]]
    """Figures that an evaluation prints: logged key without its split, and format."""
    run_config: RunConfig
    made: Sequence[Path] = ()
    """Folders that this start made, the innermost first."""
    weights: str | None = None
    """File of exported weights with which the run begins."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        words = " ".join([*self.run_class.task, subcommand])
        # One line, because the list of two hundred options follows.
        parser.usage = f"{program()} {words} --config FILE [--KEY=VALUE ...]"
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=self.run_class, default=self.run_class())
        parser.add_argument("--diagnostics", type=DiagnosticsConfig, default=DiagnosticsConfig())
        self.link_sizes(parser)

    @abstractmethod
    def link_sizes(self, parser: LightningArgumentParser) -> None:
        """Link the sizes of the model to those of the data."""

    def task_callbacks(self) -> list[Any]:
        """Callbacks of this task alone."""
        return []

    def show(self, checkpoint: str) -> None:
        """Show a sample of the trained model at the end of training."""

    def _parse_ckpt_path(self) -> None:
        """Find checkpoint and run. In Lightning's method, the checkpoint's settings would override the user's."""
        config = self.config[self.config.subcommand]
        run = config.run
        files = config.get("config") or []
        naming = [path for path in map(Path, map(str, files)) if describes_run(path)]
        run.name = run.name or (naming[-1].stem if naming else "run")
        for key in ("name", "version"):  # each is one folder
            if run[key] is not None and (run[key] == ".." or Path(run[key]).name != run[key]):
                fail(f"run.{key} must be a name without '/', got {run[key]!r}: set run.folder to store runs elsewhere")
        checkpoint = config.get("ckpt_path")
        if checkpoint in ("last", "best"):
            with setting_errors():
                found = find_checkpoint(checkpoint, self.run_class(**run.as_dict()))
            checkpoint = config.ckpt_path = chosen(found)
        self.weights = checkpoint if checkpoint and Path(checkpoint).suffix == ".safetensors" else None
        if self.weights:  # of `export`: a new run begins with them
            checkpoint = config.ckpt_path = None
            if is_fsdp2(config.trainer.strategy):
                fail(f"--ckpt_path={self.weights}: a run cannot begin with weights alone and fsdp2: use ddp")
        if self.config.subcommand != "fit" and checkpoint is None:
            fail(f"{self.config.subcommand} needs a checkpoint: set --ckpt_path to a file, last or best")
        if checkpoint and is_sharded_checkpoint(checkpoint) and not is_fsdp2(config.trainer.strategy):
            fail(
                f"{checkpoint} is a sharded checkpoint (a folder): add --trainer.strategy=fsdp2, on any number of"
                " processes, or export only its weights: export --ckpt_path"
            )
        self.run_config = self.run_class(**run.as_dict())
        folder = run_of_checkpoint(checkpoint) if checkpoint else None
        if folder and run.version is None:
            run_folder, name = str(folder.parent.parent), folder.parent.name
            self.run_config = replace(self.run_config, folder=run_folder, name=name, version=folder.name)
            if folder.parent.resolve() != Path(run.folder, run.name).resolve():  # another name, or a moved folder
                run.folder, run.name = run_folder, name
        if self.config.subcommand == "fit":
            self._find_run_to_go_on_with(folder)
        else:
            self.run_config.version = self.run_config.version or date_and_time()

    def _find_run_to_go_on_with(self, folder: Path | None) -> None:
        """With `resume=auto`, continue the run of this job; otherwise refuse a folder that holds another run.

        Args:
            folder: Of the run whose checkpoint was given, if any.
        """
        run = self.run_config
        if run.resume == "auto":
            run.version = run.version or job_version()
            with setting_errors():
                newest = checkpoint_to_resume(run)
            if newest:
                self.config["fit"].ckpt_path = chosen(newest)
            return
        if run.version and run.path != folder and (run.path / CONFIG).is_file():
            fail(
                f"{run.path} already contains a run: choose another run.version, or continue it with --ckpt_path or "
                "--run.resume=auto"
            )

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            fail(f"seed_everything: {error}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        if self.run_config.float32_matmul_precision:
            torch.set_float32_matmul_precision(self.run_config.float32_matmul_precision)
        self.datamodule.setup(str(self.subcommand))
        if self.subcommand == "fit":
            self._check_settings(settings)
            self._take_folder()
        progress = settings.get("enable_progress_bar") is not False
        run, diagnostics = self.run_config, self.diagnostics
        sweep = DepthSweep(
            run.path,
            every_n_validations=diagnostics.depth_sweep_every_n_validations,
            num_batches=diagnostics.depth_sweep_num_batches,
            at_test=run.depth_sweep,
        )
        callbacks: list[Any] = [*([RunProgress()] if progress else []), *self.task_callbacks(), sweep]
        loggers: list[Logger] = []
        if self.subcommand == "fit":
            watching = diagnostics.callbacks(has_equilibrium=bool(equilibria(self.model)))
            callbacks[:0] = [StopSignal(), SameStart(), *watching, ReadOnce(), ResumableRandomState(), RunReport(run)]
            callbacks.append(DivergenceGuard())
            if settings.get("enable_checkpointing") is not False:
                if "validation" in self.datamodule.splits:
                    callbacks.append(BestCheckpoint())
                callbacks.append(
                    LastCheckpoint(
                        keep_last=run.keep_last,
                        every_n_steps=run.checkpoint_every_n_steps,
                        every_minutes=run.checkpoint_every_minutes,
                        stop_signal=lambda: STOP.agreed,
                    )
                )
            loggers = [enduring(logger, waits=True) for logger in self._loggers(settings.get("logger"))]
            if run.wandb_checkpoints:
                callbacks.append(WandbCheckpoints(run.checkpoints))
        self.trainer_defaults = {"callbacks": callbacks}
        kwargs["plugins"] = [*as_list(settings.get("plugins")), AtomicCheckpointIO(errors="warn")]
        try:
            trainer = super().instantiate_trainer(logger=loggers or False, **kwargs)
        except MisconfigurationException as error:
            given = ", ".join(f"{name}={settings.get(name)}" for name in ("accelerator", "devices", "strategy"))
            raise MisconfigurationException(f"trainer ({given}): {error}") from None
        require_meeting_place(trainer)
        return trainer

    def _loggers(self, own: Any) -> list[Logger]:
        """The CSV logger of every run, the user's own loggers, and those of the run's settings."""
        run = self.run_config
        loggers = [ContinuedCSVLogger(run.path), *as_list(None if own is True else own), *as_list(wandb_logger(run))]
        if run.tensorboard:
            loggers.append(TensorBoardLogger(run.path, name="tensorboard", version="", default_hp_metric=False))
        return loggers

    def _check_settings(self, settings: Any) -> None:
        """Refuse trainer settings that would break a run's guarantees."""
        if settings.get("logger") is False:
            fail("trainer.logger=false: a run always writes its metrics to a folder; set run.folder to choose it")
        if (every := settings.get("log_every_n_steps")) is not None and every < 1:
            fail(
                f"trainer.log_every_n_steps={every}: at logging steps a run certifies its gradients and checks"
                " whether a checkpoint is due; choose a large number to log rarely"
            )
        is_exact = any(
            isinstance(layer.adjoint, ReversibleAdjoint) and getattr(layer.solver, "is_exact", False)
            for layer in equilibria(self.model)
        )
        if settings.get("benchmark") and is_exact:
            fail(
                "trainer.benchmark=true: cuDNN would choose other kernels in the backward pass, and the gradient would"
                " not be exact: remove it, or set model.solver.arithmetic=float64"
            )
        for name, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
            if (value := settings.get(name)) is not None and value < least:
                fail(f"trainer.{name} must be at least {least}, got {value}")
        diagnostics = self.diagnostics
        asked = diagnostics.gradient_error_every_n_steps or diagnostics.contraction_every_n_steps
        if asked and is_fsdp2(settings.get("strategy")):
            fail(
                "diagnostics.gradient_error_every_n_steps and contraction_every_n_steps need the whole model in"
                " each process: use trainer.strategy=ddp, not fsdp2"
            )
        for callback, advice in ((c, NOT_SUPPORTED.get(type(c))) for c in as_list(settings.get("callbacks"))):
            if advice:
                fail(f"trainer.callbacks: {type(callback).__name__} is not supported: {advice}")
        if any(isinstance(logger, WandbLogger) for logger in as_list(settings.get("logger"))):
            fail("trainer.logger=WandbLogger would wait for a key: use run.wandb=auto, online or offline")

    def _take_folder(self) -> None:
        """Create the run's folder, of a new version if it has none; only the first process."""
        run = self.run_config
        folder = run.path if run.version else run.path.parent
        if cast(Any, rank_zero_only).rank:
            run.version = run.version or date_and_time()
            return
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            try_folder(folder)
            if not run.version:
                run.version = new_version(folder)
                self.made.insert(0, run.path)
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another run.folder") from None

    @property
    def diagnostics(self) -> DiagnosticsConfig:
        """The settings of the diagnostics."""
        return cast(DiagnosticsConfig, self._get(self.config_init, "diagnostics"))

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """If the start is refused, remove the folders that it made, unless something is in them."""
        try:
            yield
        except SystemExit:
            if self.made and not (self.run_config.path / CONFIG).exists():
                with suppress(OSError):
                    (self.made[0] / LOCK).unlink(missing_ok=True)
                    for folder in [*sorted(self.made[0].rglob("*"), reverse=True), *self.made]:
                        folder.rmdir()
            raise

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; report errors of their settings in one line."""
        strategy = self._get(self.config, "trainer").get("strategy")
        with self._without_a_trace(), setting_errors(), deferred_weights(is_fsdp2(strategy)):
            super().instantiate_classes()
            if self.weights:
                load_weights(self.model, self.weights)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; training holds a lock on the run's folder until its final test has ended."""
        trains = subcommand == "fit" and self.trainer.is_global_zero
        with self._without_a_trace():
            try:
                with locked(self.run_config.path) if trains else nullcontext():
                    super()._run_subcommand(subcommand)
            except LockedError as error:
                fail(str(error))

    def fit(self, **kwargs: Any) -> None:
        let_sigterm_end_the_wait(self.trainer)
        with self._run_errors("training"):
            try:
                self.trainer.fit(**kwargs)
            except DivergedError as error:  # on all processes together
                if self.trainer.is_global_zero:
                    fail(str(error), code=1)
                sys.exit(1)
            except (DivergenceError, CheckpointError, BlockError) as error:
                fail(str(error), code=1)
            except ValueError as error:  # before the first step, about the settings
                if any(getattr(callback, "has_started", False) for callback in cast(Any, self.trainer).callbacks):
                    raise
                fail(" ".join(str(error).split()))
            except SystemExit as stop:
                end_after_interrupt(self.trainer, stop)

    @run_errors("the end of training")
    def after_fit(self) -> None:
        """Test, show, and print the commands that continue the run."""
        # The last one if there was no validation.
        kept = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint | LastCheckpoint)]
        best = next((str(callback.path) for callback in kept if callback.path.exists()), None)
        split = self.closing_split() if best and self.run_config.test else None
        if split:
            evaluate = self.trainer.test if split == "test" else self.trainer.validate
            with self._run_errors(f"the {split}"):
                try:
                    results = evaluate(self.model, self.datamodule, ckpt_path=best, verbose=False, weights_only=True)
                except SystemExit as stop:
                    end_after_interrupt(self.trainer, stop)
            self._print_figures(f"{split.capitalize()} ({Path(str(best)).name})", results)
        if self.trainer.is_global_zero:
            if best:
                self.show(best)
            close_run(self.run_config.path, self.run_config)

    def closing_split(self) -> str | None:
        """The split on which the best checkpoint is evaluated after training."""
        return "test" if "test" in self.datamodule.splits else None

    def validate(self, **kwargs: Any) -> None:
        self._evaluate("validation", "Validation", self.trainer.validate, kwargs)

    def test(self, **kwargs: Any) -> None:
        self._evaluate("test", "Test", self.trainer.test, kwargs)

    def _evaluate(self, split: str, title: str, evaluate: Callable[..., Any], arguments: dict[str, Any]) -> None:
        if split not in self.datamodule.splits:
            there = ", ".join(self.datamodule.splits)
            fail(f"the data has no {split} split to evaluate, only {there}")
        with self._run_errors(f"the {split}"):
            results = evaluate(**arguments | {"verbose": False})
        self._print_figures(title, results)

    def _run_errors(self, what: str) -> AbstractContextManager[None]:
        fits = self.subcommand == "fit"
        return run_errors(what, lambda error: lost_peer(error, self.trainer) if fits else None)

    def _print_figures(self, title: str, results: Any) -> None:
        if self.trainer.is_global_zero:
            figures = {key.split("/")[-1]: value for key, value in results[0].items()}
            texts = [form.format(figures[key]) for key, form in self.figures.items() if key in figures]
            print(f"\n{title}: {', '.join(texts)}")


@children_ended()
def run_command_line(
    command_line: type[AbstractCommandLine], task: type, data: type, subcommand: str, options: Sequence[str]
) -> None:
    """Parse and run a command; report what the user can fix in one line."""
    quieten_lightning()
    prepare_jsonargparse()
    register_strategies()
    with stop_signals_noted() if subcommand == "fit" else nullcontext(), finished_wandb(), children_ended():
        command_line(
            task,
            data,
            args=[subcommand, *map(with_variables, options)],
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False, "prog": program()},
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"config_filename": CONFIG, "overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    end_process_group()


def load_weights(task: Any, path: str) -> None:
    """Load exported weights into a task's model; CheckpointError if they do not fit."""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            settings = json.loads((file.metadata() or {}).get("hyper_parameters", "{}"))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no file of weights, or a damaged one ({error})") from None
    check_weights(weights, task.model.state_dict(), changed_settings(settings, dict(task.hparams)))
    task.model.load_state_dict(weights)


def chosen(found: Found) -> str:
    """Path of the found checkpoint; the first process warns of unusable newer ones."""
    if cast(Any, rank_zero_only).rank == 0:
        for path, fault in found.faults.items():
            print(f"warning: {path} {fault}: continuing from {found.path}", file=sys.stderr, flush=True)
    return str(found.path)


def as_list(value: Any) -> list[Any]:
    """The value or values of a setting as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
