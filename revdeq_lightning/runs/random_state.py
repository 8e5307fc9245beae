"""Random states of every process in the checkpoint: a resumed run draws the same numbers as an uninterrupted one."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.processes import gathered

SEED = "PL_GLOBAL_SEED"


class ResumableRandomState(Callback):
    """Store the states of Python's, NumPy's, and PyTorch's global generators for each process.

    They are restored when training starts, unless the number of processes has changed, together with the seed from
    which they began, in the environment variable of Lightning's `seed_everything`.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] = []
        self._seed: str | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = gathered(random_state())
        checkpoint["seed"] = os.environ.get(SEED)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded, self._seed = checkpoint.get("random_states", []), checkpoint.get("seed")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self._loaded) == trainer.world_size:
            set_random_state(self._loaded[trainer.global_rank])
            if self._seed is not None:
                os.environ[SEED] = self._seed
        self._loaded = []


def random_state() -> dict[str, Any]:
    """The global generators' states as plain containers and tensors, which load with `weights_only=True`."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    numpy_keys = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, numpy_keys, int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state returned by `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Context that restores the global generators at its end."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
