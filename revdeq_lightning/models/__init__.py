"""Models: language models, image classifiers, reasoners, their explicit baselines, and what they share."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.models.cache import KeyValueCache as KeyValueCache
    from revdeq_lightning.models.classifier import (
        AbstractClassifier as AbstractClassifier,
        ClassifierOutput as ClassifierOutput,
        build_classifier as build_classifier,
    )
    from revdeq_lightning.models.config import (
        ClassifierConfig as ClassifierConfig,
        ReasonerConfig as ReasonerConfig,
        TransformerConfig as TransformerConfig,
    )
    from revdeq_lightning.models.cross_entropy import (
        IGNORE_INDEX as IGNORE_INDEX,
        chunked_cross_entropy as chunked_cross_entropy,
    )
    from revdeq_lightning.models.generation import generate as generate
    from revdeq_lightning.models.reasoner import (
        AbstractReasoner as AbstractReasoner,
        ExplicitReasoner as ExplicitReasoner,
        Reasoner as Reasoner,
        ReasonerOutput as ReasonerOutput,
    )
    from revdeq_lightning.models.resnet import ResNet as ResNet
    from revdeq_lightning.models.transformer import (
        AbstractLanguageModel as AbstractLanguageModel,
        ExplicitTransformerLM as ExplicitTransformerLM,
        LMLoss as LMLoss,
        LMOutput as LMOutput,
        TransformerLM as TransformerLM,
    )

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
