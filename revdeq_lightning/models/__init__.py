"""Models: the equilibrium language model, its explicit baseline, the image classifiers, and what they share."""

from revdeq_lightning.models.cache import KeyValueCache
from revdeq_lightning.models.classifier import AbstractClassifier, ClassifierOutput, build_classifier
from revdeq_lightning.models.config import ClassifierConfig, TransformerConfig
from revdeq_lightning.models.cross_entropy import IGNORE_INDEX, chunked_cross_entropy
from revdeq_lightning.models.explicit import ExplicitTransformerLM
from revdeq_lightning.models.generation import generate
from revdeq_lightning.models.resnet import ResNet
from revdeq_lightning.models.transformer import (
    AbstractLanguageModel,
    LMLoss,
    LMOutput,
    TransformerLM,
)

__all__ = [
    "IGNORE_INDEX",
    "AbstractClassifier",
    "AbstractLanguageModel",
    "ClassifierConfig",
    "ClassifierOutput",
    "ExplicitTransformerLM",
    "KeyValueCache",
    "LMLoss",
    "LMOutput",
    "ResNet",
    "TransformerConfig",
    "TransformerLM",
    "build_classifier",
    "chunked_cross_entropy",
    "generate",
]
