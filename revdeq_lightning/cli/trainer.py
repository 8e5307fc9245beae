"""Base class of the command lines of all tasks: the trainer with its callbacks, loggers and checkpoints."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from revdeq_lightning.callbacks.config import DiagnosticsConfig
from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.checkpoints.callbacks import BestCheckpoint, LastCheckpoint
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.cli.checks import as_list, check_settings, load_weights
from revdeq_lightning.cli.errors import fail, run_errors, setting_errors
from revdeq_lightning.cli.option_names import FROM_DATA
from revdeq_lightning.cli.parser import ReadableErrors
from revdeq_lightning.cli.paths import with_variables
from revdeq_lightning.cli.process_end import end_after_interrupt, let_sigterm_end_the_wait, lost_peer, orderly_end
from revdeq_lightning.cli.quiet import quieten_lightning
from revdeq_lightning.cli.run_choice import choose_run, take_folder, without_a_trace
from revdeq_lightning.cli.saved_config import SaveRunConfig
from revdeq_lightning.cli.yaml_text import prepare_jsonargparse
from revdeq_lightning.distributed.strategies import is_fsdp2, register_strategies, require_meeting_place
from revdeq_lightning.equilibrium import DivergenceError, equilibria
from revdeq_lightning.errors import BlockError, CheckpointError
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.loggers.endurance import enduring
from revdeq_lightning.loggers.progress import RunProgress
from revdeq_lightning.loggers.read_once import ReadOnce
from revdeq_lightning.loggers.wandb_logger import WandbCheckpoints, wandb_logger
from revdeq_lightning.program import program
from revdeq_lightning.report.at_end import RunReport, close_run
from revdeq_lightning.runs.divergence import DivergenceGuard
from revdeq_lightning.runs.folder import CONFIG, RunConfig, date_and_time
from revdeq_lightning.runs.lock import LockedError, locked
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.runs.signals import STOP
from revdeq_lightning.runs.stop_signal import SameStart, StopSignal
from revdeq_lightning.tasks.base import deferred_weights


class Parser(ReadableErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


class AbstractCommandLine(LightningCLI):
    """`fit`, `validate` and `test` of one task and its data."""

    task_class: ClassVar[type]
    data_class: ClassVar[type]
    run_class: ClassVar[type[RunConfig]]
    figures: ClassVar[dict[str, str]]
    """Figures that an evaluation prints: logged key without its split, and format."""
    run_config: RunConfig
    weights: str | None
    """File of exported weights with which the run begins."""

    @classmethod
    def start(cls, subcommand: str, options: Sequence[str]) -> None:
        """Parse and run a command; report what the user can fix in one line."""
        quieten_lightning()
        prepare_jsonargparse()
        register_strategies()
        with orderly_end(notes_signals=subcommand == "fit"):
            cls(subcommand, options)

    def __init__(self, subcommand: str, options: Sequence[str]) -> None:
        self._name, self._options = subcommand, options
        super().__init__(
            self.task_class,
            self.data_class,
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the given one: building the parsers of all subcommands would double the time of a start."""
        return {self._name: LightningCLI.subcommands()[self._name]}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        words = " ".join([*self.run_class.task, subcommand])
        # One line, because the list of two hundred options follows.
        parser.usage = f"{program()} {words} --config FILE [--KEY=VALUE ...]"
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=self.run_class, default=self.run_class())
        parser.add_argument("--diagnostics", type=DiagnosticsConfig, default=DiagnosticsConfig())
        for name in FROM_DATA[" ".join(self.run_class.task) or "lm"]:
            on = "parse" if name == "context_length" else "instantiate"  # the others are known from the data's content
            parser.link_arguments(f"data.{name}", f"model.network.{name}", apply_on=on)

    def task_callbacks(self) -> list[Any]:
        return []

    def details(self, figures: Mapping[str, float]) -> list[str]:
        """Further lines on an evaluation."""
        return []

    def show(self, checkpoint: str) -> None:
        """Show a sample of the trained model at the end of training."""

    def _parse_ckpt_path(self) -> None:
        # In Lightning's method, the checkpoint's settings would override the user's.
        subcommand = self.config.subcommand
        self.run_config, self.weights = choose_run(self.config[subcommand], subcommand, self.run_class, self._options)

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
            check_settings(settings, self.diagnostics, self.model)
            take_folder(self.run_config, self.made)
        progress = settings.get("enable_progress_bar") is not False
        run, diagnostics = self.run_config, self.diagnostics
        sweep = DepthSweep(
            self.results,
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

    @cached_property
    def results(self) -> Path:
        """Folder of pictures and tables: the run's; of a command that only evaluates, a new one in it."""
        path = self.run_config.path
        return path if self._name == "fit" else path / f"{self._name}-{date_and_time()}"

    @property
    def diagnostics(self) -> DiagnosticsConfig:
        return cast(DiagnosticsConfig, self._get(self.config_init, "diagnostics"))

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; report errors of their settings in one line."""
        self.made: list[Path] = []
        strategy = self._get(self.config, "trainer").get("strategy")
        if self.subcommand != "fit":  # nothing is stored for a gradient, which a tolerance would forbid
            self._get(self.config, "model").solver.reversible_stored_evaluations = None
        with without_a_trace(self.run_config, self.made), setting_errors(), deferred_weights(is_fsdp2(strategy)):
            super().instantiate_classes()
            if self.weights:
                load_weights(self.model, self.weights)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; training holds a lock on the run's folder until its final test has ended."""
        trains = subcommand == "fit" and self.trainer.is_global_zero
        with without_a_trace(self.run_config, self.made):
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
        if split and best:
            arguments: Any = {"datamodule": self.datamodule, "ckpt_path": best, "weights_only": True}
            self._evaluate(split, f" ({Path(best).name})", model=self.model, **arguments)
        if self.trainer.is_global_zero:
            if best:
                self.show(best)
            close_run(self.run_config.path, self.run_config)

    def closing_split(self) -> str | None:
        """The split on which the best checkpoint is evaluated after training."""
        return "test" if "test" in self.datamodule.splits else None

    def validate(self, **kwargs: Any) -> None:
        self._evaluate("validation", **kwargs)

    def test(self, **kwargs: Any) -> None:
        self._evaluate("test", **kwargs)

    def _evaluate(self, split: str, checkpoint: str = "", **arguments: Any) -> None:
        if split not in self.datamodule.splits:
            there = ", ".join(self.datamodule.splits)
            hparams = self.datamodule.hparams
            takes_file = "test_path" in hparams and hparams.get("source", "files") == "files"
            advice = ": set data.test_path" if split == "test" and takes_file else ""
            fail(f"the data has no {split} split to evaluate, only {there}{advice}")
        evaluate = self.trainer.test if split == "test" else self.trainer.validate
        with self._run_errors(f"the {split}"):
            try:
                results = evaluate(**arguments | {"verbose": False})
            except SystemExit as stop:
                end_after_interrupt(self.trainer, stop)
        if self.trainer.is_global_zero:
            figures = {key.split("/")[-1]: value for key, value in results[0].items()}
            texts = [form.format(figures[key]) for key, form in self.figures.items() if key in figures]
            print("\n".join([f"\n{split.capitalize()}{checkpoint}: {', '.join(texts)}", *self.details(results[0])]))
            if self._name != "fit":
                with self._run_errors(f"the {split}"):
                    self.results.mkdir(parents=True, exist_ok=True)
                    with (self.results / f"{split}.csv").open("w", newline="") as file:
                        csv.writer(file).writerows([("figure", "value"), *results[0].items()])
                print(f"Pictures and tables in {self.results}")

    def _run_errors(self, what: str) -> AbstractContextManager[None]:
        fits = self.subcommand == "fit"
        return run_errors(what, lambda error: lost_peer(error, self.trainer) if fits else None)
