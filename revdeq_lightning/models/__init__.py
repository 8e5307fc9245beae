"""Models: language models, image classifiers, reasoners, their explicit baselines, and what they share."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.models.classifier import ResNet as ResNet, build_classifier as build_classifier
    from revdeq_lightning.models.config import (
        ClassifierConfig as ClassifierConfig,
        ReasonerConfig as ReasonerConfig,
        TransformerConfig as TransformerConfig,
    )
    from revdeq_lightning.models.cross_entropy import chunked_cross_entropy as chunked_cross_entropy
    from revdeq_lightning.models.generation import generate as generate
    from revdeq_lightning.models.reasoner import ExplicitReasoner as ExplicitReasoner, Reasoner as Reasoner
    from revdeq_lightning.models.transformer import (
        ExplicitTransformerLM as ExplicitTransformerLM,
        TransformerLM as TransformerLM,
    )
    from revdeq_lightning.models.transformer_blocks import KeyValueCache as KeyValueCache

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
