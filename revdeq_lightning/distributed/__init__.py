"""Strategies for several devices, and how models are sharded."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.distributed.strategies import (
        EquilibriumDDP as EquilibriumDDP,
        EquilibriumFSDP2 as EquilibriumFSDP2,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
