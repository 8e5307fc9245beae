"""Weights & Biases, its mode always chosen explicitly."""

import netrc
import os
from typing import Any, cast
from urllib.parse import urlparse

from revdeq_lightning.runs import RunConfig


def wandb_logger(run: RunConfig) -> Any:
    """A logger for the run; the same W&B run goes on when the run is resumed.

    Without an explicit mode W&B asks on a terminal, fails without one, and waits for a network that is not there.

    Raises:
        ValueError: If `online` is asked for and there is no key.
    """
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_only

    has_key = stored_key() is not None
    if run.wandb == "online" and not has_key:
        raise ValueError("run.wandb=online needs a key: set WANDB_API_KEY or call `wandb login`, or use offline")
    is_first = cast(Any, rank_zero_only).rank == 0
    offline = run.wandb == "offline" or not has_key
    if offline and is_first:
        folder = run.path / "wandb"
        print(f"W&B is offline: the run lies in {folder}; to send it: wandb sync {folder}/offline-run-*")
    if is_first:
        run.path.mkdir(parents=True, exist_ok=True)
    name = f"{run.name}-{run.version}"
    return WandbLogger(
        project=run.wandb_project, name=name, id=name, resume="allow", save_dir=run.path, offline=offline
    )


def stored_key() -> str | None:
    """The key from the environment or where `wandb login` puts it, without asking or connecting."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        login = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        login = None
    return os.environ.get("WANDB_API_KEY") or (login[2] if login else None)
