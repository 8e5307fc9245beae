"""Sizes and options of the models."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from torch import Tensor

from revdeq_lightning.equilibrium.validation import refuse_unused, require_choice, require_count, require_in_range

BLOCKS = ("modern", "paper")
REASONER_BLOCKS = ("convolution", "attention")
ARCHITECTURES = ("stages", "joint", "paper_single", "paper_stages", "resnet")
OURS = ("stages", "joint")


def only(default: Any, **owners: tuple[str, ...]) -> Any:
    """A field that only these blocks, or these architectures, have; others must keep the default."""
    return field(default=default, metadata=owners)


@dataclass
class TransformerConfig:
    """Sizes and options of a language model.

    Attributes:
        vocab_size: Number of tokens.
        context_length: Longest sequence.
        d_model: Width of the state.
        num_heads: Attention heads; divides `d_model`. Required by `modern` and `paper`.
        block: `modern`, `paper`, or the import path of your own `nn.Module`, such as `my_package.MyBlock`: f is
            `MyBlock(d_model, **block_options)` and maps `z` and `x` of shape `(batch, tokens, d_model)` to a new `z`,
            each token from itself and earlier ones. Embedded tokens then include a learned position, and
            generation has no cache.
        block_options: Keyword arguments of your own block. Texts are read as YAML, in quotes too: `yes` is true.
        num_layers: Layers in one evaluation of f (the paper's f has one).
        d_mlp: Width of the MLP; 0 for `4 * d_model`.
        double_projection: Paper block only: project q, k, v twice, as the released code does.
        rope_base: Modern block only: the slowest rotation is about `1 / rope_base` radians per token.
        num_taps: Modern block only: width in tokens of the short convolution over the embedding; 1 for none.
        num_prelude_layers: Modern block only: layers before the equilibrium, with parameters of their own.
        num_coda_layers: Modern block only: layers after the equilibrium, with parameters of their own.
        loss_chunk_size: Number of tokens whose logits exist at the same time in `loss`.
    """

    vocab_size: int
    context_length: int
    d_model: int
    num_heads: int = only(0, block=BLOCKS)
    block: str = "modern"
    num_layers: int = only(1, block=BLOCKS)
    d_mlp: int = only(0, block=BLOCKS)
    double_projection: bool = only(False, block=("paper",))
    rope_base: float = only(10000.0, block=("modern",))
    num_taps: int = only(4, block=("modern",))
    num_prelude_layers: int = only(0, block=("modern",))
    num_coda_layers: int = only(0, block=("modern",))
    loss_chunk_size: int = 1024
    block_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_taps", "loss_chunk_size"):
            require_count(name, getattr(self, name))
        require_in_range("rope_base", self.rope_base, "(0, inf)")
        require_count("d_mlp", self.d_mlp, at_least=0, advice="0 is for 4 * d_model")
        for name in ("num_prelude_layers", "num_coda_layers"):
            require_count(name, getattr(self, name), at_least=0)
        _check_block(self, BLOCKS)
        if not self.has_cache:
            return
        require_count("num_heads", self.num_heads)
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}")
        if self.block == "modern" and self.head_size % 2:
            raise ValueError(
                "rotary positions need an even head size, "
                f"got d_model / num_heads = {self.d_model} / {self.num_heads} = {self.head_size}"
            )
        if self.block == "paper" and self.num_layers != 1:
            raise ValueError(f"the paper's block has one layer, got num_layers={self.num_layers}")

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads

    @property
    def mlp_width(self) -> int:
        return self.d_mlp or 4 * self.d_model

    @property
    def has_cache(self) -> bool:
        """Whether f can keep the keys and values of earlier tokens."""
        return self.block in BLOCKS

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a ValueError that names the first token outside the vocabulary; waits for the device."""
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if wrong.numel():
            raise ValueError(
                f"token {wrong[0].item()} is not in the vocabulary of {self.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )


@dataclass
class ClassifierConfig:
    """Sizes and options of an image classifier.

    Attributes:
        num_classes: Number of classes.
        num_channels: Channels of the images.
        architecture: `stages` (one equilibrium per resolution), `joint` (one equilibrium over all resolutions), or the
            released `paper_single` and `paper_stages`; or `resnet`, the baseline without equilibrium.
        channels: Channels of each stage; the resolution halves from stage to stage.
        widths: Ratio of the channels inside f to those of the state, for each stage; empty for 1 in each.
        steps: Solver steps of each stage; empty for the solver's `max_steps` in each.
        blocks: For `resnet`, residual blocks of each stage; empty for 2 in each.
        block: f of `stages` and `joint`: `modern`, `paper`, or the import path of your own `nn.Module`, such as
            `my_package.MyBlock`: f of a stage is `MyBlock(channels, **block_options)` and maps `z` and `x` of shape
            `(batch, channels, height, width)` to a new `z`.
        block_options: Keyword arguments of your own block. Texts are read as YAML, in quotes too: `yes` is true.
        group_size: Modern block only: channels that GroupNorm normalizes together; 0 for all.
        stem_stride: Total stride of the first stage: 1 or 2 for images of 32x32, 4 for 224x224.
        dropout: Fraction of the channels inside f that are dropped in training, with one mask per solve.
        stochastic_depth: For `stages`, probability that a sample skips an equilibrium in training.
    """

    num_classes: int
    num_channels: int = 3
    architecture: str = "stages"
    channels: list[int] = field(default_factory=lambda: [64, 128, 256])
    widths: list[int] = field(default_factory=list)
    steps: list[int] = field(
        default_factory=list, metadata={"architecture": ("stages", "paper_single", "paper_stages")}
    )
    blocks: list[int] = field(default_factory=list, metadata={"architecture": ("resnet",)})
    block: str = only("modern", architecture=OURS)
    group_size: int = only(16, architecture=OURS, block=("modern",))
    stem_stride: int = only(1, architecture=(*OURS, "resnet"))
    dropout: float = only(0.0, architecture=OURS, block=("modern",))
    stochastic_depth: float = only(0.0, architecture=("stages",))
    block_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("architecture", self.architecture, ARCHITECTURES)
        for name in ("num_classes", "num_channels"):
            require_count(name, getattr(self, name))
        if not self.channels:
            raise ValueError("channels must have at least one entry, got []")
        for name in ("channels", "widths", "steps", "blocks"):
            values = list(getattr(self, name))
            setattr(self, name, values)
            for value in values:
                require_count(name, value)
            if values and len(values) != len(self.channels):
                raise ValueError(f"{name} must have one entry per stage, got {values} for channels {self.channels}")
        if self.architecture == "joint" and self.steps:
            raise ValueError(f"architecture='joint' has one solve: set solver.max_steps, got steps={self.steps}")
        _check_owners(self, "architecture")
        _check_block(self, BLOCKS)
        self.widths = self.widths or [1] * len(self.channels)
        if self.block not in BLOCKS and max(self.widths) > 1:
            raise ValueError(f"widths belongs to block 'modern' or 'paper', got {self.widths} for {self.block!r}")
        require_count("group_size", self.group_size, at_least=0)
        size = self.group_size if self.block in BLOCKS or self.architecture == "joint" else 0
        if size and any(c > size and c % size for c in self.channels):
            raise ValueError(f"channels above {size} must be multiples of it, the size of a group, got {self.channels}")
        require_choice("stem_stride", self.stem_stride, (1, 2, 4))
        for name in ("dropout", "stochastic_depth"):
            require_in_range(name, getattr(self, name), "[0, 1)")
        if self.architecture == "paper_single" and len(self.channels) != 1:
            raise ValueError(f"architecture='paper_single' has one stage, got channels {self.channels}")


@dataclass
class ReasonerConfig:
    """Sizes and options of a reasoner.

    Attributes:
        num_symbols: Symbols that a cell may hold.
        num_answers: Answers that a cell may have.
        shape: Of the training puzzles, `[length]` or `[height, width]`.
        channels: Of the state of each cell.
        block: f: `convolution` (puzzles of any size), `attention` (of one size), or the import path of your own
            `nn.Module`, such as `my_package.MyBlock`: f is `MyBlock(channels, **block_options)` and maps `z` and `x` of
            shape `(batch, channels, ...)` to a new `z`.
        block_options: Keyword arguments of your own block. Texts are read as YAML, in quotes too: `yes` is true.
        num_layers: Layers in one evaluation of f.
        num_heads: Attention only: heads; divides `channels`.
        d_mlp: Attention only: width of the MLP; 0 for `4 * channels`.
        padding: Convolution only: `zeros`, or `circular`, with which f does not depend on where the border is.
        growth: Puzzles larger than those of training get `max_steps` times the ratio of the numbers of cells to this
            power.
    """

    num_symbols: int
    num_answers: int
    shape: list[int]
    channels: int = 48
    block: str = "convolution"
    num_layers: int = only(1, block=REASONER_BLOCKS)
    num_heads: int = only(0, block=("attention",))
    d_mlp: int = only(0, block=("attention",))
    padding: str = only("zeros", block=("convolution",))
    growth: float = 1.0
    block_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_symbols", "num_answers", "channels", "num_layers"):
            require_count(name, getattr(self, name))
        self.shape = list(self.shape)
        if len(self.shape) not in (1, 2):
            raise ValueError(f"shape must be [length] or [height, width], got {self.shape}")
        for size in self.shape:
            require_count("shape", size)
        require_in_range("growth", self.growth, "[0, inf)")
        _check_block(self, REASONER_BLOCKS)
        require_choice("padding", self.padding, ("zeros", "circular"))
        if self.block == "attention":
            require_count("num_heads", self.num_heads)
            refuse_unused(vars(self), ReasonerConfig, "a block for puzzles of any size", "growth")

    @property
    def ndim(self) -> int:
        """1 for strings, 2 for grids."""
        return len(self.shape)


def _check_block(config: Any, ours: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown block, or an option that this block does not have."""
    if config.block not in ours and "." not in config.block:
        raise ValueError(f"block must be one of {', '.join(ours)} or an import path, got {config.block!r}")
    if config.block_options and config.block in ours:
        raise ValueError(f"block_options requires a user-defined block, got block={config.block!r}")
    _check_owners(config, "block")


def _check_owners(config: Any, kind: str) -> None:
    """Raise ValueError if an option is set that this block or architecture does not have."""
    owner = getattr(config, kind)
    for option in fields(config):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        value, owners = getattr(config, option.name), option.metadata.get(kind, (owner,))
        if value != default and owner not in owners:
            names = " or ".join(map(repr, owners))
            raise ValueError(f"{option.name} belongs to {kind} {names}, got {value} for {owner!r}")
