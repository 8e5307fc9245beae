"""What the tasks' command lines share: LightningCLI with short errors and a folder for each run."""

import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger

from revdeq_lightning.callbacks.config import DiagnosticsConfig
from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.checkpoints.best import BestCheckpoint
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
from revdeq_lightning.cli.kept_checkpoints import best_or_last, last_checkpoint
from revdeq_lightning.cli.loggers import run_loggers
from revdeq_lightning.cli.main import ReadableErrors, fail, given_files
from revdeq_lightning.cli.messages import (
    check_writable,
    chosen,
    lost_resource,
    readable_checkpoint,
)
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
from revdeq_lightning.cli.readable_errors import device_errors, readable_errors
from revdeq_lightning.cli.saved_config import SaveRunConfig
from revdeq_lightning.distributed.strategies import is_fsdp2, register_strategies, require_meeting_place
from revdeq_lightning.equilibrium import DivergenceError, equilibria
from revdeq_lightning.errors import BlockError, CheckpointError
from revdeq_lightning.loggers.endurance import enduring
from revdeq_lightning.loggers.progress import RunProgress
from revdeq_lightning.loggers.wandb_checkpoints import WandbCheckpoints
from revdeq_lightning.program import program
from revdeq_lightning.report.at_end import RunReport, close_run
from revdeq_lightning.runs.divergence import DivergedError, DivergenceGuard
from revdeq_lightning.runs.folder import (
    CONFIG,
    RunConfig,
    checkpoint_to_resume,
    describes_run,
    find_checkpoint,
    job_version,
    new_version,
    run_of_checkpoint,
)
from revdeq_lightning.runs.lock import LockedError, locked
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.runs.same_start import SameStart
from revdeq_lightning.runs.stop_signal import StopSignal
from revdeq_lightning.tasks.recipe import deferred_weights

REMOVED_SETTINGS = (("", "divergence"), ("run", "keep_every_hours"), ("run", "async_checkpoints"))
"""Group and name of settings in the configuration of runs of version 0.1.0.dev0, without effect on what is trained."""


class Parser(ReadableErrors, LightningArgumentParser):
    """Lightning's parser with errors of one line."""


class AbstractCommandLine(LightningCLI):
    """`fit`, `validate` and `test` of one task and its data."""

    run_class: ClassVar[type[RunConfig]]
    figures: ClassVar[dict[str, str]]
    """What an evaluation prints: logged key without its split, and how."""
    run_config: RunConfig

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """With a usage of one line: the list of two hundred options follows anyway."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        words = " ".join([*self.run_class.task, subcommand])
        parser.usage = f"{program()} {words} --config FILE [--KEY=VALUE ...]"
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's folder; what is measured; sizes that the model takes from the data."""
        parser.add_argument("--run", type=self.run_class, default=self.run_class())
        parser.add_argument("--diagnostics", type=DiagnosticsConfig, default=DiagnosticsConfig())
        self.link_sizes(parser)

    @abstractmethod
    def link_sizes(self, parser: LightningArgumentParser) -> None:
        """Link the sizes that the model takes from the data."""

    def task_callbacks(self) -> list[Any]:
        """Callbacks of this task alone."""
        return []

    @abstractmethod
    def show(self, checkpoint: str) -> None:
        """At the end of training: what the trained model does."""

    def _parse_ckpt_path(self) -> None:
        """Find checkpoint and run.

        Lightning's own would put the settings in the checkpoint above those that the user gave.
        """
        config = self.config[self.config.subcommand]
        run = config.run
        files = config.get("config") or []
        naming = [path for path in map(Path, map(str, files)) if describes_run(path)]
        run.name = run.name or (naming[-1].stem if naming else "run")
        checkpoint = config.get("ckpt_path")
        if checkpoint in ("last", "best"):
            with readable_errors():
                found = find_checkpoint(checkpoint, self.run_class(**run.as_dict()))
            checkpoint = config.ckpt_path = chosen(found)
        if self.config.subcommand != "fit" and checkpoint is None:
            fail(f"which checkpoint? {self.config.subcommand} needs --ckpt_path FILE, or last, or best")
        if checkpoint and is_sharded_checkpoint(checkpoint) and not is_fsdp2(config.trainer.strategy):
            fail(
                f"{checkpoint} is a sharded checkpoint (a folder): add --trainer.strategy=fsdp2, on any number of"
                " processes, or take its weights alone: export --ckpt_path"
            )
        self.run_config = self.run_class(**run.as_dict())
        folder = run_of_checkpoint(checkpoint) if checkpoint else None
        if folder and run.version is None:
            run_folder, name = str(folder.parent.parent), folder.parent.name
            self.run_config = replace(self.run_config, folder=run_folder, name=name, version=folder.name)
        if self.config.subcommand == "fit":
            self._find_run_to_go_on_with(folder)
        self.run_config.version = self.run_config.version or new_version()

    def _find_run_to_go_on_with(self, folder: Path | None) -> None:
        """With `resume=auto` the run of this job; never a run that is there by chance.

        Args:
            folder: Of the run whose checkpoint was given, if any.
        """
        run = self.run_config
        if run.resume == "auto":
            run.version = run.version or job_version()
            with readable_errors():
                newest = checkpoint_to_resume(run)
            if newest:
                self.config["fit"].ckpt_path = chosen(newest)
            return
        if run.version and run.path != folder and (run.path / CONFIG).is_file():
            fail(
                f"there is a run in {run.path} already: choose another run.version, or go on from a checkpoint in it, "
                "as --run.resume=auto does by itself"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of this run: its callbacks, loggers and checkpoints."""
        settings = self._get(self.config_init, "trainer")
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
            if settings.get("logger") is False:
                fail("trainer.logger=false: a run always has a folder with its metrics; choose where by run.folder")
            if (every := settings.get("log_every_n_steps")) is not None and every < 1:
                fail(
                    f"trainer.log_every_n_steps={every}: at logging steps a run certifies its gradients, and looks"
                    " whether a checkpoint is due; choose a large number for few of them"
                )
            asked = diagnostics.gradient_error_every_n_steps or diagnostics.contraction_every_n_steps
            if asked and is_fsdp2(settings.get("strategy")):
                fail(
                    "diagnostics.gradient_error_every_n_steps and contraction_every_n_steps need the whole model in"
                    " each process: trainer.strategy=ddp, not fsdp2"
                )
            report = RunReport(run)
            watching = diagnostics.callbacks(has_equilibrium=bool(equilibria(self.model)))
            callbacks[:0] = [StopSignal(), SameStart(), *watching, ResumableRandomState(), report]
            callbacks.append(DivergenceGuard())
            if settings.get("enable_checkpointing") is not False:
                if "validation" in self.datamodule.splits:
                    callbacks.append(BestCheckpoint())
                callbacks.append(last_checkpoint(self.run_config))
            own = settings.get("logger")
            if any(isinstance(logger, WandbLogger) for logger in as_list(own)):
                fail("trainer.logger=WandbLogger would ask for a key, and wait: use run.wandb=auto, online or offline")
            check_writable(run.path)
            loggers = run_loggers(run, [] if own is True else as_list(own))
            if run.wandb_checkpoints:
                callbacks.append(WandbCheckpoints(run.checkpoints))
        self.trainer_defaults = {"callbacks": callbacks}
        checkpoint_io = AtomicCheckpointIO(errors="warn")
        plugins = [*as_list(settings.get("plugins")), checkpoint_io]
        trainer = super().instantiate_trainer(
            logger=[enduring(logger) for logger in loggers] or False, plugins=plugins, **kwargs
        )
        require_meeting_place(trainer)
        return trainer

    @property
    def diagnostics(self) -> DiagnosticsConfig:
        """What is measured."""
        return cast(DiagnosticsConfig, self._get(self.config_init, "diagnostics"))

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; find faults of the data here, where they can be told in one line."""
        strategy = self._get(self.config, "trainer").get("strategy")
        with readable_errors(), deferred_weights(is_fsdp2(strategy)):
            super().instantiate_classes()
            self.datamodule.setup(str(self.subcommand))

    def _run_subcommand(self, subcommand: str) -> None:
        """Train in a folder, and test at the end, as the only program that does."""
        trains = subcommand == "fit" and self.trainer.is_global_zero
        try:
            with locked(self.run_config.path) if trains else nullcontext():
                super()._run_subcommand(subcommand)
        except LockedError as error:
            fail(str(error))

    def fit(self, **kwargs: Any) -> None:
        """Train."""
        let_sigterm_end_the_wait(self.trainer)
        with device_errors(), self._losses_told("training"):
            try:
                self.trainer.fit(**kwargs)
            except DivergedError as error:  # on all processes together
                if self.trainer.is_global_zero:
                    fail(str(error), code=1)
                sys.exit(1)
            except (DivergenceError, CheckpointError, BlockError) as error:
                fail(str(error), code=1)
            except SystemExit as stop:
                end_after_interrupt(self.trainer, stop)

    @readable_checkpoint()
    def after_fit(self) -> None:
        """Test, show, and say how to go on."""
        if cast(Any, self.trainer).fast_dev_run:
            return
        best = best_or_last(self.trainer)
        split = self.closing_split() if best and self.run_config.test else None
        if split:
            evaluate = self.trainer.test if split == "test" else self.trainer.validate
            with self._evaluation(split):
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
        """What the best checkpoint is evaluated on after training."""
        return "test" if "test" in self.datamodule.splits else None

    def validate(self, **kwargs: Any) -> None:
        """Print the figures of the validation split."""
        self._require("validation")
        with self._evaluation("validation"):
            results = self.trainer.validate(**kwargs | {"verbose": False})
        self._print_figures("Validation", results)

    def test(self, **kwargs: Any) -> None:
        """Print the figures of the test split."""
        self._require("test")
        with self._evaluation("test"):
            results = self.trainer.test(**kwargs | {"verbose": False})
        self._print_figures("Test", results)

    @contextmanager
    def _evaluation(self, split: str) -> Iterator[None]:
        """End in one line where the split cannot be evaluated."""
        with device_errors(), readable_checkpoint(), self._losses_told(f"the {split}"):
            yield

    @contextmanager
    def _losses_told(self, what: str) -> Iterator[None]:
        """End in one line where another process, a file, the disk or a worker is lost."""
        try:
            yield
        except (OSError, EOFError, RuntimeError) as error:
            peer = lost_peer(error, self.trainer) if self.subcommand == "fit" else None
            if (line := peer or lost_resource(error, what)) is None:
                raise
            fail(line, code=1)

    def _require(self, split: str) -> None:
        if split not in self.datamodule.splits:
            there = ", ".join(self.datamodule.splits)
            fail(f"nothing to evaluate: the data has no {split} split, it has {there}")

    def _print_figures(self, title: str, results: Any) -> None:
        if self.trainer.is_global_zero:
            figures = {key.split("/")[-1]: value for key, value in results[0].items()}
            texts = [form.format(figures[key]) for key, form in self.figures.items() if key in figures]
            print(f"\n{title}: {', '.join(texts)}")


@children_ended()
def run_command_line(
    command_line: type[AbstractCommandLine], task: type, data: type, subcommand: str, options: Sequence[str]
) -> None:
    """Parse and run; what the user can mend is told in one line."""
    quieten_lightning()
    register_strategies()
    with stop_signals_noted() if subcommand == "fit" else nullcontext(), finished_wandb(), children_ended():
        command_line(
            task,
            data,
            args=[subcommand, *with_config_of_checkpoint(options)],
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


def with_config_of_checkpoint(options: Sequence[str]) -> list[str]:
    """Without a `--config` of a model that of the checkpoint's run applies."""
    runs = [run_of_checkpoint(path) for path in given_files(options, "--ckpt_path")]
    if runs and runs[-1] and not any(map(describes_run, given_files(options, "--config", "-c"))):
        return ["--config", config_of_run(runs[-1]), *options]
    return list(options)


def config_of_run(folder: Path) -> str:
    """Path of a run's configuration; its text without them, where an older version wrote settings that are gone."""
    path = folder / CONFIG
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return str(path)  # reported when it is parsed
    known = settings if isinstance(settings, dict) else {}
    found = [(part, key) for part, key in REMOVED_SETTINGS if key in part_of(known, part)]
    for part, key in found:
        del part_of(known, part)[key]
    return yaml.safe_dump(settings) if found else str(path)


def part_of(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A group of settings; all of them for an empty name."""
    part = settings.get(name) if name else settings
    return part if isinstance(part, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A list of what a setting holds: nothing, one or several."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
