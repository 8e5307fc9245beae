"""A run's folder: its location, and how checkpoints and command lines refer to it."""

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from revdeq_lightning.checkpoints.files import Found

import yaml

from revdeq_lightning.checkpoints.names import ASIDE, CHECKPOINTS, LAST
from revdeq_lightning.program import program

CONFIG, METRICS, REPORT = "config.yaml", "metrics.csv", "report.html"
ENVIRONMENT = "environment.json"


@dataclass
class RunConfig:
    """Where a run keeps its files, `FOLDER/NAME/VERSION`, and what it does at its end.

    Attributes:
        folder: Folder of all runs.
        name: Name of the run; null: that of the configuration's file.
        version: Names one run of this name; null: date and time.
        resume: auto: go on from the newest checkpoint of this run if it has any, else begin; for jobs that are started
            again with the same command line, by SLURM or `torchrun --max-restarts`. A job's id is its run's version.
        wandb: Log to Weights & Biases too: off, online (needs a key), offline, or auto: online if there is a key.
        wandb_project: Project there.
        wandb_group: What the runs of one sweep share there; null: the environment's WANDB_RUN_GROUP, or the SLURM job
            array.
        wandb_checkpoints: Send the checkpoints there too, at the end of training, as artifacts.
        tensorboard: Log to TensorBoard too, into the folder tensorboard in the run's.
        depth_sweep: With each test, evaluate with other numbers of solver steps too, from 1 to four times as many.
        test: After training, evaluate the best checkpoint on the test split.
        keep_last: How many checkpoints to keep to go on from: `last.ckpt` and, before it, `step-N.ckpt`.
        checkpoint_every_n_steps: Write one after so many optimizer steps; null: after validations and by time only.
        checkpoint_every_minutes: Write one when the newest is so old; null: never.
    """

    folder: str = "runs"
    name: str | None = None
    version: str | None = None
    resume: Literal["no", "auto"] = "no"
    wandb: Literal["off", "auto", "online", "offline"] = "off"
    wandb_project: str = "revdeq"
    wandb_group: str | None = None
    wandb_checkpoints: bool = False
    tensorboard: bool = False
    depth_sweep: bool = True
    test: bool = True
    keep_last: int = 2
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_minutes: float | None = 30.0

    task: ClassVar[tuple[str, ...]] = ()
    """Words of the command line that name the task."""
    usage: ClassVar[tuple[str, ...]] = ()
    """What one does with a trained model: a label, the command, its arguments."""

    @property
    def path(self) -> Path:
        """Folder of this run."""
        return Path(self.folder) / str(self.name) / str(self.version)

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.path / CHECKPOINTS


@dataclass
class LanguageRunConfig(RunConfig):
    """A run of a language model.

    Attributes:
        sample_tokens: Length of the samples at validations and at the end; 0 for none.
        sample_prompt: What the sample continues.
        sample_temperature: Of the sample.
    """

    folder: str = "runs/lm"
    sample_tokens: int = 200
    sample_prompt: str = "\n"
    sample_temperature: float = 0.8

    usage: ClassVar[tuple[str, ...]] = ("Generate", "generate", "--prompt", "TEXT")


@dataclass
class ImageRunConfig(RunConfig):
    """A run of an image classifier."""

    folder: str = "runs/image"

    task: ClassVar[tuple[str, ...]] = ("image",)
    usage: ClassVar[tuple[str, ...]] = ("Predict", "predict", "--images", "FOLDER")


@dataclass
class ReasoningRunConfig(RunConfig):
    """A run of a reasoner."""

    folder: str = "runs/reasoning"
    depth_sweep: bool = False  # `ReasoningReport` shows what other numbers of evaluations do, for less

    task: ClassVar[tuple[str, ...]] = ("reasoning",)
    usage: ClassVar[tuple[str, ...]] = ("Predict", "predict", "--data.path", "FILE.npz")


def new_version() -> str:
    """Date and time, sorted as the runs began."""
    return time.strftime("%Y%m%d-%H%M%S")


def job_version() -> str | None:
    """What names this job on all of its machines, and still when it is started again.

    That is torchrun's `--rdzv-id`, or SLURM's job id, which a requeued job keeps; None outside of jobs.
    """
    torchrun, job, array, task = (
        os.environ.get(key)
        for key in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    )
    if torchrun and torchrun != "none":  # what torchrun says where it was given no id
        return torchrun
    return f"{array}_{task}" if array else job


def run_of_checkpoint(checkpoint: str | Path) -> Path | None:
    """Folder of the run that wrote this checkpoint, if it lies in one."""
    folder = Path(checkpoint).parent.parent
    return folder if Path(checkpoint).parent.name == CHECKPOINTS and (folder / CONFIG).is_file() else None


def describes_run(path: Path) -> bool:
    """Whether a configuration says what is trained, and not only how: then it names the run."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True  # told when it is parsed
    return not isinstance(settings, dict) or bool({"model", "data"} & settings.keys())


def find_checkpoint(alias: str, run: RunConfig) -> "Found":
    """The last or best checkpoint of the run, or of the newest run of this name if the run has no version.

    "last" is `last.ckpt`, or the newest that can be used where that one is damaged.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If none can be used.
    """
    from revdeq_lightning.checkpoints.files import Found, newest_good  # PyTorch: not for help
    from revdeq_lightning.errors import CheckpointError

    runs = Path(run.folder) / str(run.name)
    names = ("*.ckpt", ASIDE) if alias == "last" else (f"{alias}.ckpt",)
    paths = [path for name in names for path in runs.glob(f"{run.version or '*'}/{CHECKPOINTS}/{name}")]
    found = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    if found is None:
        raise FileNotFoundError(f"no {alias}.ckpt under {runs}: give its path as --ckpt_path")
    if alias != "last":
        return Found(found, {})
    newest = newest_good(found.parent)
    if newest.path is None:
        faults = "; ".join(f"{path.name} {fault}" for path, fault in newest.faults.items())
        raise CheckpointError(f"no checkpoint in {found.parent} can be used: {faults}")
    return newest


def checkpoint_to_resume(run: RunConfig) -> "Found | None":
    """The newest good checkpoint of a run that has got as far as its first.

    Raises:
        ValueError: If nothing tells which run that is.
        CheckpointError: If there are checkpoints and none of them is good: a run that begins would overwrite them.
    """
    if run.version is None:
        raise ValueError(
            "run.resume=auto: which run? Give run.version (in a SLURM job and under torchrun --rdzv-id it is their id)"
        )
    saved = [path for pattern in (LAST, ASIDE, "step-*.ckpt") for path in run.checkpoints.glob(pattern)]
    return find_checkpoint("last", run) if saved else None


def command(run: RunConfig, subcommand: str, checkpoint: Path, *arguments: str) -> str:
    """The command line that goes on from a checkpoint in a run's folder, which knows its configuration."""
    return f"{program()} {shlex.join([*run.task, subcommand, '--ckpt_path', str(checkpoint), *arguments])}"
