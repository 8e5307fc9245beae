"""Weights & Biases: a logger with a mode that is always explicit, and what it shows beside numbers."""

import netrc
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from revdeq_lightning.loggers.plots import Plot
from revdeq_lightning.runs.folder import RunConfig

X_AXIS = "trainer/global_step"
PREFIXES = ("train", "val", "test", "equilibrium", "gradient_error", "system", "samples", "depth_sweep")
"""Each is a section of W&B's page; all are drawn over the optimizer steps."""
SUMMARIES = {"val/loss": "min", "val/bits_per_byte": "min", "val/accuracy": "max"}
"""What a run's summary keeps; for other keys it is the newest value."""
FINISH_SECONDS = 600.0
"""How long the end of a run waits for a slow network; unsent data stays in the run's folder."""
_begun: list["RunWandbLogger"] = []
"""Loggers of this process whose run is not finished."""


class RunWandbLogger(WandbLogger):
    """Logs to W&B; if W&B does not respond at the start, the run is kept offline.

    Args:
        folder: W&B keeps its files in `FOLDER/wandb`.
        mode: "online" or "offline".
        settings: Arguments of `wandb.init`.
    """

    def __init__(self, folder: Path, mode: str, **settings: Any) -> None:
        super().__init__(save_dir=folder, **settings)
        self._wandb_init.pop("anonymous", None)  # W&B warns of it even if it is not set
        self._folder, self._mode = folder, mode
        self.survives = Survives(type(self).__name__)
        """Also needed by `finish_wandb`, which does not have the `Enduring` around this logger."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                run = self._begin()
            except Exception as error:  # W&B raises many types if there is no network
                if self._mode == "offline":
                    raise
                self._mode = "offline"
                reason = " ".join(str(error).split())
                warnings.warn(f"W&B cannot be reached ({reason}). {offline_line(self._folder)}", RecordWarning, 2)
                end_service()  # it still holds the run that failed
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
        silent = {"silent": True} if self._mode == "offline" else {}  # `offline_line` said everything
        settings = wandb.Settings(finish_timeout=seconds, **silent)  # type: ignore[arg-type]
        self._wandb_init |= {"mode": self._mode, "settings": settings}
        return cast(Any, WandbLogger.experiment).fget(self)


class WandbCheckpoints(Callback):
    """Sends the checkpoints in a folder to W&B at the end of training, also after an interruption.

    They are one artifact `model-RUN` of type `model` with `best.ckpt` and `last.ckpt`; a resumed run adds versions. An
    offline run keeps a copy, which `wandb sync` sends. Logs no keys; does nothing without a `WandbLogger`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
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

    on_fit_end = on_exception  # the last checkpoint is written in `on_train_end`


def log_media(trainer: Trainer, key: str, make: Callable[[Any], Any]) -> None:
    """Log `make(wandb)`, such as a table or a picture, to W&B."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            with survival(logger):
                import wandb

                logger.log_metrics({key: make(wandb)}, step=step_of(trainer))


def log_table(trainer: Trainer, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log rows with the same columns."""
    data = [list(row.values()) for row in rows]
    log_media(trainer, key, lambda wandb: wandb.Table(columns=list(rows[0]), data=data))


def log_curves(trainer: Trainer, key: str, title: str, plots: Sequence[Plot]) -> None:
    """Log the curves of several panels as one custom chart."""
    lines = [(line, f", {i}" if len(plots) > 1 else "") for i, plot in enumerate(plots, 1) for line in plot.lines]
    xs, ys = [line.x.tolist() for line, _ in lines], [line.y.tolist() for line, _ in lines]
    names = [f"{line.label}{number}" for line, number in lines]
    if lines:
        x_name = plots[0].xlabel
        log_media(trainer, key, lambda wandb: wandb.plot.line_series(xs, ys, keys=names, title=title, xname=x_name))


def log_picture(trainer: Trainer, key: str, path: Path, caption: str) -> None:
    """Log a PNG file."""
    log_media(trainer, key, lambda wandb: wandb.Image(str(path), caption=caption))


def step_of(trainer: Trainer) -> int:
    """The newest optimizer step, counted from 0 as in Lightning's metrics."""
    return max(0, trainer.global_step - 1)


def wandb_logger(run: RunConfig) -> RunWandbLogger | None:
    """Return a logger for the run, or None if W&B is off; a resumed run continues its W&B run.

    Without an explicit mode, W&B would ask for a key on a terminal, fail without one, and wait for a missing network.
    """
    mode = chosen_mode(run)
    if mode == "off":
        return None
    if mode == "offline" and cast(Any, rank_zero_only).rank == 0:
        print(offline_line(run.path))
    name = f"{run.name}-{run.version}"
    identity = re.sub(r"[/\\#?%:\s]", "-", name)  # not allowed by W&B
    return RunWandbLogger(
        run.path, mode, project=run.wandb_project, name=name, id=identity, resume="allow", group=group_of(run)
    )


def chosen_mode(run: RunConfig) -> str:
    """Return off, online or offline. `auto` is the value of WANDB_MODE, otherwise online if there is a key."""
    mode = os.environ.get("WANDB_MODE", "auto") if run.wandb == "auto" else run.wandb
    mode = {"disabled": "off", "dryrun": "offline", "run": "online"}.get(mode, mode)
    has_key = stored_key() is not None
    if mode == "online" and not has_key:
        setting = "run.wandb" if run.wandb == "online" else "WANDB_MODE"
        raise ValueError(f"{setting}=online needs a key: set WANDB_API_KEY or call `wandb login`, or use offline")
    require_choice("WANDB_MODE", mode, ("off", "online", "offline", "auto"))
    return mode if mode != "auto" else "online" if has_key else "offline"


def offline_line(folder: Path) -> str:
    """Say where an offline run is and which command sends it."""
    path = folder / "wandb"
    return f"W&B is offline: the run lies in {path}; to send it: wandb sync {path}/offline-run-*"


def group_of(run: RunConfig) -> str | None:
    """The group of a sweep's runs: as set, from the environment, or the number of a SLURM job array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return run.wandb_group or os.environ.get("WANDB_RUN_GROUP") or (f"slurm-{array}" if array else None)


def finish_wandb(exit_code: int) -> None:
    """Finish the W&B runs of this process within a bounded time."""
    while _begun:
        logger = _begun.pop()
        with logger.survives:
            try:
                logger.experiment.finish(exit_code=exit_code)
            except Exception:
                end_service()
                raise


def end_service() -> None:
    """End W&B's process and forget its run, whatever their state.

    Otherwise W&B reports a broken run again when the interpreter exits, in thirty lines, and the next run continues it.
    """
    import wandb

    wandb.run = None
    with suppress(Exception):
        wandb.teardown()


def stored_key() -> str | None:
    """The key from the environment or from `wandb login`, where W&B looks for it, without a prompt or a connection."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    path = next((path for path in map(os.path.expanduser, files) if os.path.exists(path)), None)
    login = None
    if path:
        with suppress(OSError, netrc.NetrcParseError):
            login = netrc.netrc(path).authenticators(host)
    return os.environ.get("WANDB_API_KEY") or (login[2] if login else None) or None
