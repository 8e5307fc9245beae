"""Sizes and options of the language models."""

from dataclasses import dataclass

from torch import Tensor

BLOCKS = ("modern", "paper")


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
