"""Models that are made now, or without weights, to be made where they are sharded."""

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
    """Within, tasks make their models on the meta device: shapes without weights, which come where FSDP2 shards them.

    No process then ever holds the whole model, but for the first, in the CPU's memory, once.
    """
    token = _is_deferred.set(enabled)
    try:
        yield
    finally:
        _is_deferred.reset(token)


class Recipe:
    """Makes a model, now or later, with the same random numbers.

    Args:
        build: Makes the model.
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
        """The model with the weights that it would have had at first; the generator then stands behind them."""
        torch.set_rng_state(self.random_state)
        return self.build()


def refuse_foreign(strategy: Strategy) -> None:
    """Raise for strategies that shard without knowing of equilibria.

    Raises:
        ParallelismError: If this is one.
    """
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ParallelismError(
            f"{type(strategy).__name__} would shard f apart from its solver, and its gradient would be lost: use"
            " trainer.strategy=fsdp2, or ddp"
        )
