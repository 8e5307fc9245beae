"""A run's folder: its path, its checkpoints, and the commands that use them."""

import itertools
import os
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from revdeq_lightning.checkpoints.files import Found

import yaml

from revdeq_lightning.checkpoints.names import ASIDE, CHECKPOINTS, LAST
from revdeq_lightning.equilibrium.validation import require_count, require_in_range
from revdeq_lightning.program import program

CONFIG, METRICS, REPORT = "config.yaml", "metrics.csv", "report.html"
ENVIRONMENT = "environment.json"


@dataclass
class RunConfig:
    """Where a run stores its files, `FOLDER/NAME/VERSION`, and what it does at its end.

    Attributes:
        folder: Folder of all runs.
        name: Name of the run; null: the name of the configuration file.
        version: Distinguishes runs of the same name; null: date and time.
        resume: auto: continue from this run's newest checkpoint, or start if there is none; for jobs that SLURM or
            `torchrun --max-restarts` restarts with the same command. The job's id is then the run's version.
        wandb: Also log to Weights & Biases: off, online (needs a key), offline, or auto: online if there is a key.
        wandb_project: W&B project.
        wandb_group: W&B group, shared by the runs of a sweep; null: `WANDB_RUN_GROUP`, or the SLURM job array.
        wandb_checkpoints: Also upload the checkpoints as artifacts, at the end of training.
        tensorboard: Also log to TensorBoard, in the subfolder `tensorboard`.
        depth_sweep: In each test, also evaluate with other numbers of solver steps, from 1 to four times as many.
        test: After training, evaluate the best checkpoint on the test split.
        keep_last: Number of checkpoints to keep for resuming: `last.ckpt` and the earlier `step-N.ckpt`.
        checkpoint_every_n_steps: Save every so many optimizer steps; null: only after validations and by time.
        checkpoint_every_minutes: Save when the newest checkpoint is this old; null: never.
        float32_matmul_precision: Matrix products of float32 on a GPU: highest, or high or medium for TensorFloat-32,
            with 10 bits instead of 23 and up to 8 times as fast (`torch.set_float32_matmul_precision`); null: PyTorch's
            setting. Without effect on what autocast computes in 16 bits.
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
    float32_matmul_precision: Literal["highest", "high", "medium"] | None = None

    task: ClassVar[tuple[str, ...]] = ()
    """Words of the command line that name the task."""
    usage: ClassVar[tuple[str, ...]] = ()
    """How to use a trained model: label, command, arguments."""

    @property
    def path(self) -> Path:
        """Folder of this run."""
        return Path(self.folder) / str(self.name) / str(self.version)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS


@dataclass
class LanguageRunConfig(RunConfig):
    """A run of a language model.

    Attributes:
        sample_tokens: Length of the samples at validations and at the end; 0 for none.
        sample_prompt: Text that the sample continues.
        sample_temperature: Sampling temperature.
    """

    folder: str = "runs/lm"
    sample_tokens: int = 200
    sample_prompt: str = "\n"
    sample_temperature: float = 0.8

    usage: ClassVar[tuple[str, ...]] = ("Generate", "generate", "--prompt", "TEXT")

    def __post_init__(self) -> None:
        require_count("run.sample_tokens", self.sample_tokens, at_least=0)
        require_in_range("run.sample_temperature", self.sample_temperature, "[0, inf)")


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
    depth_sweep: bool = False  # `ReasoningReport` shows other numbers of evaluations at a lower cost

    task: ClassVar[tuple[str, ...]] = ("reasoning",)
    usage: ClassVar[tuple[str, ...]] = ("Predict", "predict", "--data.path", "FILE.npz")


def date_and_time() -> str:
    """A version; they sort by the start of the runs."""
    return time.strftime("%Y%m%d-%H%M%S")


def new_version(runs: Path) -> str:
    """A version whose folder this process creates: runs that start in the same second get different ones."""
    first = date_and_time()
    for version in itertools.chain([first], (f"{first}-{n}" for n in itertools.count(2))):
        if not (runs / version).is_dir():
            with suppress(FileExistsError):  # another process was faster
                (runs / version).mkdir(parents=True)
                break
    return version


def job_version() -> str | None:
    """Identifier of this job, the same on all machines and after a restart; None outside of jobs.

    It is torchrun's `--rdzv-id`, or the SLURM job id, which a requeued job keeps.
    """
    torchrun, job, array, task = (
        os.environ.get(key)
        for key in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    )
    if torchrun and torchrun != "none":  # torchrun's value without an id
        return torchrun
    return f"{array}_{task}" if array else job


def run_of_checkpoint(checkpoint: str | Path) -> Path | None:
    """Folder of the run that wrote this checkpoint, or None if it is not in one."""
    folder = Path(checkpoint).parent.parent
    return folder if Path(checkpoint).parent.name == CHECKPOINTS and (folder / CONFIG).is_file() else None


def describes_run(path: Path) -> bool:
    """Whether a configuration defines what is trained, not only how: such a file names the run."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True  # reported when it is parsed
    return not isinstance(settings, dict) or bool({"model", "data"} & settings.keys())


def find_checkpoint(alias: str, run: RunConfig) -> "Found":
    """The "last" or "best" checkpoint of the run, or, if it has no version, of the run of this name that wrote last.

    "last" is `last.ckpt`, or the newest usable checkpoint if that is damaged. The files of older runs are not taken.
    """
    from revdeq_lightning.checkpoints.files import Found, newest_good  # imports PyTorch, which help does not need
    from revdeq_lightning.errors import CheckpointError

    runs = Path(run.folder) / str(run.name)
    written = (CONFIG, f"{CHECKPOINTS}/*.ckpt", f"{CHECKPOINTS}/{ASIDE}")
    paths = [path for name in written for path in runs.glob(f"{run.version or '*'}/{name}")]
    if not paths:
        raise FileNotFoundError(f"no {alias}.ckpt under {runs}: set --ckpt_path to its path")
    newest = runs / max(paths, key=lambda path: path.stat().st_mtime).relative_to(runs).parts[0]
    folder = newest / CHECKPOINTS
    found = newest_good(folder) if alias == "last" else Found(folder / f"{alias}.ckpt", {})
    if found.path and found.path.exists():
        return found
    if found.faults:
        faults = "; ".join(f"{path.name} {fault}" for path, fault in found.faults.items())
        raise CheckpointError(f"no checkpoint in {folder} can be used: {faults}")
    instead = "" if alias == "last" else "last or "
    raise FileNotFoundError(f"{newest} has no {alias}.ckpt yet: set --ckpt_path to {instead}the path of a checkpoint")


def checkpoint_to_resume(run: RunConfig) -> "Found | None":
    """The newest usable checkpoint of a run, or None if it has not saved any.

    If none of those saved is usable, it raises CheckpointError: a new run would overwrite them.
    """
    if run.version is None:
        raise ValueError(
            "run.resume=auto needs run.version, to know which run (SLURM and torchrun --rdzv-id set it to their id)"
        )
    saved = [path for pattern in (LAST, ASIDE, "step-*.ckpt") for path in run.checkpoints.glob(pattern)]
    return find_checkpoint("last", run) if saved else None


def command(run: RunConfig, subcommand: str, checkpoint: Path, *arguments: str) -> str:
    """A command that uses a checkpoint in a run's folder, whose configuration it reads."""
    return f"{program()} {shlex.join([*run.task, subcommand, '--ckpt_path', str(checkpoint), *arguments])}"
