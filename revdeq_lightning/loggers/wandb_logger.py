"""Weights & Biases, its mode always chosen explicitly."""

import netrc
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.errors import RecordWarning
from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.runs.folder import RunConfig

X_AXIS = "trainer/global_step"
PREFIXES = ("train", "val", "test", "equilibrium", "gradient_error", "system", "samples", "depth_sweep")
"""Each is a section of its own; all are drawn over the optimizer steps."""
BEST = {"val/loss": "min", "val/bits_per_byte": "min", "val/accuracy": "max"}
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
            for key, summary in BEST.items():
                run.define_metric(key, step_metric=X_AXIS, summary=summary)
        return self._experiment

    def _begin(self) -> Any:
        import wandb

        seconds = float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS))
        silent = {"silent": True} if self._mode == "offline" else {}
        # Offline all that there is to say was said in one line.
        settings = wandb.Settings(finish_timeout=seconds, **silent)  # type: ignore[arg-type]
        self._wandb_init |= {"mode": self._mode, "settings": settings}
        begin = cast(Any, WandbLogger.experiment).fget
        return begin(self)


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
    """off, online or offline; `auto` is what the environment variable WANDB_MODE says, else online if there is a key.

    Raises:
        ValueError: If `online` is asked for and there is no key.
    """
    mode = os.environ.get("WANDB_MODE", "auto") if run.wandb == "auto" else run.wandb
    mode = {"disabled": "off", "dryrun": "offline", "run": "online"}.get(mode, mode)
    has_key = stored_key() is not None
    if mode == "online" and not has_key:
        setting = "run.wandb" if run.wandb == "online" else "WANDB_MODE"
        raise ValueError(f"{setting}=online needs a key: set WANDB_API_KEY or call `wandb login`, or use offline")
    if mode not in ("off", "online", "offline", "auto"):
        raise ValueError(f"WANDB_MODE must be online, offline or disabled, got {mode!r}")
    return mode if mode != "auto" else "online" if has_key else "offline"


def offline_line(folder: Path) -> str:
    """Where an offline run lies, and the command that sends it."""
    return (
        f"W&B is offline: the run lies in {folder / 'wandb'}; to send it: wandb sync {folder / 'wandb'}/offline-run-*"
    )


def group_of(run: RunConfig) -> str | None:
    """What the runs of one sweep share: as set, as in the environment, or the number of a SLURM job array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return run.wandb_group or os.environ.get("WANDB_RUN_GROUP") or (f"slurm-{array}" if array else None)


def finish_wandb(exit_code: int) -> None:
    """End the W&B runs that this process began, within a bounded time."""
    while _begun:
        logger = _begun.pop()
        is_finished = False
        with logger.survives:
            logger.experiment.finish(exit_code=exit_code)
            is_finished = True
        if not is_finished:
            end_service()


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
    try:
        login = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        login = None
    return os.environ.get("WANDB_API_KEY") or (login[2] if login else None)
