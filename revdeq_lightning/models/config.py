"""Sizes and options of the models."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

BLOCKS = ("modern", "paper")
ARCHITECTURES = ("stages", "joint", "paper_single", "paper_stages", "resnet")
OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "blocks": ([], ("resnet",)),
    "block": ("modern", ("stages", "joint")),
    "group_size": (16, ("stages", "joint")),
    "dropout": (0.0, ("stages", "joint")),
    "stochastic_depth": (0.0, ("stages",)),
    "stem_stride": (1, ("stages", "joint", "resnet")),
}
"""Options that not all classifiers have: their default, and the architectures to which others belong."""
MODERN_BLOCK_ONLY = ("group_size", "dropout")


@dataclass
class TransformerConfig:
    """Sizes and options of a language model.

    Attributes:
        vocab_size: Number of tokens.
        context_length: Longest sequence.
        d_model: Width of the state.
        num_heads: Attention heads; divides `d_model`.
        block: `modern` or `paper`.
        num_layers: Layers in one evaluation of f (the paper's f has one).
        d_mlp: Width of the MLP; 0 for `4 * d_model`.
        double_projection: Paper block only: project q, k, v twice, as the released code does.
        rope_base: Modern block only: the slowest rotation is about `1 / rope_base` radians a token.
        num_taps: Modern block only: tokens that the short convolution over the embedding reaches; 1 for none.
        loss_chunk_size: Tokens of which the logits exist at once in `loss`.
    """

    vocab_size: int
    context_length: int
    d_model: int
    num_heads: int
    block: str = "modern"
    num_layers: int = 1
    d_mlp: int = 0
    double_projection: bool = False
    rope_base: float = 10000.0
    num_taps: int = 4
    loss_chunk_size: int = 1024

    def __post_init__(self) -> None:
        positive = ("vocab_size", "context_length", "d_model", "num_heads", "num_layers", "num_taps", "loss_chunk_size")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rope_base > 0:
            raise ValueError(f"rope_base must be positive, got {self.rope_base}")
        if self.d_mlp < 0:
            raise ValueError(f"d_mlp must be positive, or 0 for 4 * d_model, got {self.d_mlp}")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {self.block!r}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}")
        if self.block == "modern" and self.head_size % 2:
            raise ValueError(
                "rotary positions need an even head size, "
                f"got d_model / num_heads = {self.d_model} / {self.num_heads} = {self.head_size}"
            )
        if self.block == "modern" and self.double_projection:
            raise ValueError("double_projection=True belongs to block='paper', got block='modern'")
        if self.block == "paper" and self.num_layers != 1:
            raise ValueError(f"the paper's block has one layer, got num_layers={self.num_layers}")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        return self.d_mlp or 4 * self.d_model

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a ValueError that names the first token outside the vocabulary; waits for the device."""
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if wrong.numel():
            raise ValueError(
                f"token {wrong[0].item()} is not in the vocabulary of {self.vocab_size}: "
                "do model and tokenizer belong together?"
            )


@dataclass
class ClassifierConfig:
    """Sizes and options of an image classifier.

    Attributes:
        num_classes: Number of classes.
        num_channels: Channels of the images.
        architecture: `stages` (one equilibrium a resolution), `joint` (one equilibrium over all resolutions), or the
            released `paper_single` and `paper_stages`; or `resnet`, the baseline without equilibrium.
        channels: Channels of each stage; the resolution halves from stage to stage.
        widths: Channels inside f over those of the state, for each stage; empty for 1 in each.
        steps: Solver steps of each stage; empty for the solver's `max_steps` in each.
        blocks: Of `resnet`, residual blocks of each stage; empty for 2 in each.
        block: f of `stages` and `joint`: `modern`, or the `paper`'s in its place.
        group_size: Modern block only: channels that GroupNorm normalises together; 0 for all.
        stem_stride: Pixels from one position of the first stage to the next: 1 or 2 for images of 32x32, 4 for 224x224.
        dropout: Fraction of the channels inside f that are dropped in training, one mask a solve.
        stochastic_depth: Of `stages`, probability that a sample goes past an equilibrium in training.
    """

    num_classes: int
    num_channels: int = 3
    architecture: str = "stages"
    channels: list[int] = field(default_factory=lambda: [64, 128, 256])
    widths: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    block: str = "modern"
    group_size: int = 16
    stem_stride: int = 1
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        for name in ("num_classes", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channels:
            raise ValueError("channels must name the channels of at least one stage, got []")
        self.channels = list(self.channels)
        self.widths = list(self.widths) or [1] * len(self.channels)
        self.steps, self.blocks = list(self.steps), list(self.blocks)
        for name in ("channels", "widths", "steps", "blocks"):
            values = getattr(self, name)
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must be at least 1, got {values}")
            if values and len(values) != len(self.channels):
                raise ValueError(f"{name} must have one entry a stage, got {values} for channels {self.channels}")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {self.block!r}")
        for name, (default, architectures) in OPTIONS.items():
            value = getattr(self, name)
            if value != default and self.architecture not in architectures:
                belongs = " or ".join(map(repr, architectures))
                raise ValueError(f"{name} belongs to architecture {belongs}, got {value} for {self.architecture!r}")
            if value != default and name in MODERN_BLOCK_ONLY and self.block != "modern":
                raise ValueError(f"{name} belongs to block='modern', got {value} for {self.block!r}")
        if self.group_size < 0:
            raise ValueError(f"group_size must be positive, or 0 for all channels, got {self.group_size}")
        size = self.group_size
        if size and any(c > size and c % size for c in self.channels):
            raise ValueError(f"channels above {size} must be multiples of it, the size of a group, got {self.channels}")
        if self.stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 1, 2 or 4, got {self.stem_stride}")
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.architecture == "paper_single" and len(self.channels) != 1:
            raise ValueError(f"architecture='paper_single' has one stage, got channels {self.channels}")
        if self.architecture == "joint" and self.steps:
            raise ValueError(f"architecture='joint' has one solve: set solver.max_steps, got steps={self.steps}")
