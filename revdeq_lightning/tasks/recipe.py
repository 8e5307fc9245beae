"""Build models now, or without weights, to initialize them when they are sharded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from revdeq_lightning.errors import ParallelismError

_is_deferred: ContextVar[bool] = ContextVar("weights_deferred", default=False)


@contextmanager
def deferred_weights(enabled: bool = True) -> Iterator[None]:
    """Context in which tasks build models on the meta device, without weights, until FSDP2 shards them.

    Only the first process then ever holds the complete model, once, in CPU memory.
    """
    token = _is_deferred.set(enabled)
    try:
        yield
    finally:
        _is_deferred.reset(token)


class Recipe:
    """Build a model now or later, with the same random numbers.

    Args:
        build: Builds the model.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.build, self.random_state = build, torch.get_rng_state()

    def model(self) -> nn.Module:
        """The model; without weights within `deferred_weights()`."""
        if not _is_deferred.get():
            return self.build()
        with torch.device("meta"):
            return self.build()

    def __call__(self) -> nn.Module:
        """Build the model with its original initial weights, and advance the generator past them."""
        torch.set_rng_state(self.random_state)
        return self.build()


def refuse_foreign(strategy: Strategy) -> None:
    """Raise ParallelismError for strategies that shard without support for equilibria."""
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ParallelismError(
            f"{type(strategy).__name__} would shard f separately from its solver and lose its gradient: use"
            " trainer.strategy=fsdp2 or ddp"
        )
