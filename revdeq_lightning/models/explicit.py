"""The baseline without an equilibrium: a stack of the same layers with separate weights."""

from torch import Tensor, nn

from revdeq_lightning.equilibrium import SolverStats
from revdeq_lightning.models.cache import KeyValueCache
from revdeq_lightning.models.config import TransformerConfig
from revdeq_lightning.models.transformer import AbstractLanguageModel, ModernBlock


class ExplicitTransformerLM(AbstractLanguageModel):
    """`config.num_layers` modern layers, evaluated once: `h = f(0, x)`.

    Same embedding, layers, readout, and interface as `TransformerLM` with `block="modern"`; the statistics are None.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.block != "modern":
            raise ValueError(f"the explicit baseline needs block='modern', got block={config.block!r}")
        self.block: nn.Module = ModernBlock(config)

    def transform(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, SolverStats | None]:
        block = self.block if cache is None else cache.bind(self.block.forward)
        return block(x_BTD.new_zeros(x_BTD.shape), x_BTD), None
