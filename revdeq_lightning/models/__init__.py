"""Models: the equilibrium language model, its explicit baseline, and what they share."""

from revdeq_lightning.models.config import TransformerConfig
from revdeq_lightning.models.cross_entropy import IGNORE_INDEX, chunked_cross_entropy
from revdeq_lightning.models.explicit import ExplicitTransformerLM
from revdeq_lightning.models.generation import KeyValueCache, generate
from revdeq_lightning.models.transformer import (
    AbstractLanguageModel,
    LMLoss,
    LMOutput,
    TransformerLM,
)

__all__ = [
    "IGNORE_INDEX",
    "AbstractLanguageModel",
    "ExplicitTransformerLM",
    "KeyValueCache",
    "LMLoss",
    "LMOutput",
    "TransformerConfig",
    "TransformerLM",
    "chunked_cross_entropy",
    "generate",
]
