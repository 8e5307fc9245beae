"""The language model: embed the tokens, solve for a fixed point over the whole sequence, read out the next tokens.

    x = embedding(tokens),    z = f(z, x) by a solver from z_0 = 0,    logits = head(norm(z))

Layers of their own may stand before and after the equilibrium: `x = prelude(embedding(tokens))`, `head(coda(z))`.

f is `paper`, the released block of arXiv:2509.12917 (same parameters), our `modern` block, or a user-defined block.

Shape suffixes: B batch, T tokens, D d_model, J taps, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdeq_lightning.equilibrium import BackpropAdjoint, EquilibriumLayer, SolverStats
from revdeq_lightning.equilibrium.validation import require_in_range
from revdeq_lightning.models.config import TransformerConfig
from revdeq_lightning.models.cross_entropy import IGNORE_INDEX, chunked_cross_entropy, corrected_loss
from revdeq_lightning.models.linear import Linear
from revdeq_lightning.models.transformer_blocks import MODERN_NORM_EPS, KeyValueCache, ModernBlock, make_block, rms_norm


class LMOutput(NamedTuple):
    """Logits of every position, and statistics of the solve (None without a solver)."""

    logits_BTV: Tensor
    stats: SolverStats | None


class LMLoss(NamedTuple):
    """Mean nats per target, the number of targets, and statistics of the solve (None without a solver)."""

    loss: Tensor
    num_targets: Tensor
    stats: SolverStats | None
    earlier_stats: tuple[SolverStats, ...] = ()  # of a solve in parts


class ShortConvolution(nn.Module):
    """`sum_j taps[j] * x[t - j]` per channel; the identity at initialization."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.taps_JD = nn.Parameter(torch.eye(config.num_taps, 1).repeat(1, config.d_model))

    def forward(self, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        num_taps, num_new = self.taps_JD.shape[0], x_BTD.shape[1]
        if cache is not None:
            (x_BTD,) = cache.extend(x_BTD)
        recent_BTD = x_BTD[:, -(num_new + num_taps - 1) :]
        recent_BTD = F.pad(recent_BTD, (0, 0, num_new + num_taps - 1 - recent_BTD.shape[1], 0))
        windows_BTDJ = recent_BTD.unfold(1, num_taps, 1)
        # Not a convolution or einsum: autocast would round x, the input of every evaluation, to half precision.
        return (windows_BTDJ * self.taps_JD.flip(0).T).sum(-1)


class PaperEmbedding(nn.Module):
    """Token plus learned position."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.context_length, config.d_model)

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        start = 0 if cache is None else cache.length
        return cast(Tensor, self.token(tokens_BT) + self.position.weight[start : start + tokens_BT.shape[1]])


class ModernEmbedding(nn.Module):
    """A short convolution over normalized tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.token.weight, std=0.02)  # the norm removes it; sets Adam's effective step
        self.convolution = ShortConvolution(config)

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        return cast(Tensor, self.convolution(rms_norm(self.token(tokens_BT)), cache))


class AbstractLanguageModel(nn.Module):
    """Embedding, readout, and loss around a map from embedded tokens to hidden states."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        is_paper = config.block == "paper"
        self.embedding = ModernEmbedding(config) if config.block == "modern" else PaperEmbedding(config)
        self.prelude, self.coda = (
            ModernBlock(replace(config, num_layers=count)) if count else None
            for count in (config.num_prelude_layers, config.num_coda_layers)
        )
        ends_with_norm = is_paper or self.coda is not None
        self.norm = nn.Identity() if ends_with_norm else nn.RMSNorm(config.d_model, MODERN_NORM_EPS)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if not is_paper:
            nn.init.zeros_(self.head.weight)

    @abstractmethod
    def transform(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, SolverStats | None]:
        """Map embedded tokens to hidden states; with a cache, of the tokens after the cached ones."""

    def embed(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Input injection x.

        Raises:
            ValueError: If the tokens exceed the context or (on CPU) the vocabulary. On CUDA, where a check would
                synchronize in every step, the embedding's kernel asserts instead.
        """
        if tokens_BT.dim() != 2 or tokens_BT.is_floating_point():
            raise ValueError(
                f"tokens must be integers of shape (B, T), got {tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}"
            )
        end = tokens_BT.shape[1] + (0 if cache is None else cache.length)
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens do not fit the model's context_length {self.config.context_length}")
        if tokens_BT.device.type == "cpu" and not torch.compiler.is_compiling():
            self.config.check_tokens(tokens_BT)
        x_BTD = self.embedding(tokens_BT, cache)
        return x_BTD if self.prelude is None else cast(Tensor, self.prelude(torch.zeros_like(x_BTD), x_BTD, cache))

    def read_out(self, h_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Input of the output projection, from what `transform` returned."""
        if self.coda is None:
            return cast(Tensor, self.norm(h_BTD))
        return cast(Tensor, self.coda(torch.zeros_like(h_BTD), h_BTD, cache))

    def hidden(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, SolverStats | None]:
        """Input of the output projection, and statistics; with a cache, of the tokens after the cached ones."""
        h_BTD, stats = self.transform(self.embed(tokens_BT, cache), cache)
        h_BTD = self.read_out(h_BTD, cache)
        if cache is not None:
            cache.end_pass(tokens_BT.shape[1])
        return h_BTD, stats

    @property
    def output_weight_VD(self) -> Tensor:
        return self.head.weight

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> LMOutput:
        h_BTD, stats = self.hidden(tokens_BT, cache)
        return LMOutput(self.head(h_BTD), stats)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> LMLoss:
        """Mean nats per target other than -100, without storing the logits of all tokens."""
        h_BTD, stats = self.hidden(tokens_BT)
        return LMLoss(self.nats(h_BTD, targets_BT), (targets_BT != IGNORE_INDEX).sum(), stats)

    def nats(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean nats per target, from the inputs of the output projection."""
        return chunked_cross_entropy(
            h_BTD.flatten(0, 1), self.output_weight_VD, targets_BT.flatten(), chunk_size=self.config.loss_chunk_size
        )


class TransformerLM(AbstractLanguageModel):
    """The equilibrium language model: the hidden state is a fixed point of one block.

    Args:
        config: Sizes and block.
        solver: Solver of the fixed point, such as `ReversibleSolver(beta=0.8, max_steps=8)`.
        adjoint: Gradient rule, such as `ReversibleAdjoint()`.
        num_losses: Fixed-point correction: split the solve into this number of parts, also in evaluation; in training,
            the loss is the weighted mean over the ends of all parts. 1 for none.
        loss_decay: Ratio of the weight of each part's loss to that of the next, in (0, 1].
    """

    def __init__(
        self, config: TransformerConfig, solver: Any, adjoint: Any, num_losses: int = 1, loss_decay: float = 0.8
    ) -> None:
        super().__init__(config)
        require_in_range("loss_decay", loss_decay, "(0, 1]")
        self.loss_decay = loss_decay
        self.equilibrium = EquilibriumLayer(make_block(config), solver=solver, adjoint=adjoint, num_parts=num_losses)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> LMLoss:
        """Compute the loss; in training with correction, the weighted mean over the parts of the solve."""
        if self.equilibrium.num_parts == 1 or not self.training:
            return super().loss(tokens_BT, targets_BT)
        x_BTD = self.embed(tokens_BT)
        last = self.equilibrium(x_BTD, torch.zeros_like(x_BTD))
        parts = (*last.earlier, last)
        loss = corrected_loss([self.nats(self.read_out(part.value), targets_BT) for part in parts], self.loss_decay)
        return LMLoss(loss, (targets_BT != IGNORE_INDEX).sum(), last.stats, tuple(part.stats for part in last.earlier))

    def transform(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, SolverStats | None]:
        z0_BTD = torch.zeros_like(x_BTD)
        if cache is None:
            solution = self.equilibrium(x_BTD, z0_BTD)
        else:
            # Not with a compiled f, which would be recompiled for every length.
            f = cache.bind(getattr(self.equilibrium.f, "_orig_mod", self.equilibrium.f).forward)
            solution = self.equilibrium.solve(f, z0_BTD, x_BTD, adjoint=BackpropAdjoint())
        return solution.value, solution.stats


class ExplicitTransformerLM(AbstractLanguageModel):
    """The baseline without an equilibrium: `config.num_layers` modern layers, evaluated once: `h = f(0, x)`.

    Same embedding, layers, readout, and interface as `TransformerLM` with `block="modern"`; the statistics are None.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.block != "modern":
            raise ValueError(f"the explicit baseline needs block='modern', got block={config.block!r}")
        for name in ("num_prelude_layers", "num_coda_layers"):
            if value := getattr(config, name):
                raise ValueError(f"solver='none' has no {name}, got {name}={value!r}: remove it, or raise num_layers")
        self.block = ModernBlock(config)

    def transform(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, SolverStats | None]:
        block = self.block if cache is None else cache.bind(self.block.forward)
        return block(torch.zeros_like(x_BTD), x_BTD), None
