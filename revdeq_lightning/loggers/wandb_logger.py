"""Weights & Biases, its mode always chosen explicitly."""

import netrc
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.checkpoints.names import BEST, LAST
from revdeq_lightning.equilibrium.validation import require_choice
from revdeq_lightning.errors import RecordWarning
from revdeq_lightning.loggers.endurance import Survives, survival
from revdeq_lightning.runs.folder import RunConfig

X_AXIS = "trainer/global_step"
PREFIXES = ("train", "val", "test", "equilibrium", "gradient_error", "system", "samples", "depth_sweep")
"""Each is a section of its own; all are drawn over the optimizer steps."""
SUMMARIES = {"val/loss": "min", "val/bits_per_byte": "min", "val/accuracy": "max"}
"""What a run's summary keeps of these, where others keep the newest value."""
FINISH_SECONDS = 600.0
"""How long the end waits for a slow network; what was not sent lies in the run's folder."""
_begun: list["RunWandbLogger"] = []
"""Those of this process whose run is not finished."""


class RunWandbLogger(WandbLogger):
    """Logs to W&B; where W&B does not answer at the beginning, the run is kept offline.

    Args:
        folder: Where W&B keeps its files, in a folder `wandb` of its own.
        mode: "online" or "offline".
        settings: Of `wandb.init`.
    """

    def __init__(self, folder: Path, mode: str, **settings: Any) -> None:
        super().__init__(save_dir=folder, **settings)
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, though it is not set
        self._folder, self._mode = folder, mode
        self.survives = Survives(type(self).__name__)
        """Also of the end, when nobody holds the `Enduring` around this logger."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                run = self._begin()
            except Exception as error:  # W&B has many for a network that is not there
                if self._mode == "offline":
                    raise
                self._mode = "offline"
                reason = " ".join(str(error).split())
                warnings.warn(f"W&B cannot be reached ({reason}). {offline_line(self._folder)}", RecordWarning, 2)
                end_service()  # which holds the run that failed
                run = self._begin()
            for prefix in PREFIXES:
                run.define_metric(f"{prefix}/*", step_metric=X_AXIS)
            _begun.append(self)
            for key, summary in SUMMARIES.items():
                run.define_metric(key, step_metric=X_AXIS, summary=summary)
        return self._experiment

    def _begin(self) -> Any:
        import wandb

        seconds = float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS))
        silent = {"silent": True} if self._mode == "offline" else {}
        # Offline all that there is to say was said in one line.
        settings = wandb.Settings(finish_timeout=seconds, **silent)  # type: ignore[arg-type]
        self._wandb_init |= {"mode": self._mode, "settings": settings}
        return cast(Any, WandbLogger.experiment).fget(self)


class WandbCheckpoints(Callback):
    """Hands the checkpoints to W&B at the end of training, also after an interruption.

    One artifact `model-RUN` of type `model` with `best.ckpt` and `last.ckpt`; the versions of a resumed run follow each
    other. An offline run keeps a copy, which `wandb sync` sends. Logs no keys; does nothing without a `WandbLogger`.

    Args:
        folder: Where the checkpoints lie.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._send(trainer)  # here, as the last checkpoint is written in `on_train_end`

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._send(trainer)

    def _send(self, trainer: Trainer) -> None:
        files = [path for path in (self.folder / BEST, self.folder / LAST) if path.is_file()]
        for logger in trainer.loggers if files and trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                with survival(logger):
                    import wandb

                    run: Any = logger.experiment
                    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"step": trainer.global_step})
                    for file in files:
                        artifact.add_file(str(file), name=file.name)
                    run.log_artifact(artifact)


def wandb_logger(run: RunConfig) -> RunWandbLogger | None:
    """A logger for the run, or None where W&B is off; the same W&B run goes on when the run is resumed.

    Without an explicit mode W&B asks on a terminal, fails without one, and waits for a network that is not there.

    Raises:
        ValueError: If `online` is asked for and there is no key.
    """
    mode = chosen_mode(run)
    if mode == "off":
        return None
    if mode == "offline" and cast(Any, rank_zero_only).rank == 0:
        print(offline_line(run.path))
    name = f"{run.name}-{run.version}"
    identity = re.sub(r"[/\\#?%:\s]", "-", name)  # what W&B does not allow
    return RunWandbLogger(
        run.path, mode, project=run.wandb_project, name=name, id=identity, resume="allow", group=group_of(run)
    )


def chosen_mode(run: RunConfig) -> str:
    """off, online or offline; `auto` means what the variable WANDB_MODE says, else online if there is a key."""
    mode = os.environ.get("WANDB_MODE", "auto") if run.wandb == "auto" else run.wandb
    mode = {"disabled": "off", "dryrun": "offline", "run": "online"}.get(mode, mode)
    has_key = stored_key() is not None
    if mode == "online" and not has_key:
        setting = "run.wandb" if run.wandb == "online" else "WANDB_MODE"
        raise ValueError(f"{setting}=online needs a key: set WANDB_API_KEY or call `wandb login`, or use offline")
    require_choice("WANDB_MODE", mode, ("off", "online", "offline", "auto"))
    return mode if mode != "auto" else "online" if has_key else "offline"


def offline_line(folder: Path) -> str:
    """Where an offline run lies, and the command that sends it."""
    path = folder / "wandb"
    return f"W&B is offline: the run lies in {path}; to send it: wandb sync {path}/offline-run-*"


def group_of(run: RunConfig) -> str | None:
    """What the runs of one sweep share: as set, as in the environment, or the number of a SLURM job array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return run.wandb_group or os.environ.get("WANDB_RUN_GROUP") or (f"slurm-{array}" if array else None)


def finish_wandb(exit_code: int) -> None:
    """End the W&B runs that this process began, within a bounded time."""
    while _begun:
        logger = _begun.pop()
        with logger.survives:
            try:
                logger.experiment.finish(exit_code=exit_code)
            except Exception:
                end_service()
                raise


def end_service() -> None:
    """End W&B's process and forget its run, whatever state they are in.

    A broken one would be told again at the interpreter's end, in thirty lines, and be taken up by the next run.
    """
    import wandb

    wandb.run = None
    with suppress(Exception):
        wandb.teardown()


def stored_key() -> str | None:
    """The key from the environment or where `wandb login` puts it, without asking or connecting."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    login = None
    with suppress(OSError, netrc.NetrcParseError):
        login = netrc.netrc().authenticators(host)
    return os.environ.get("WANDB_API_KEY") or (login[2] if login else None)
