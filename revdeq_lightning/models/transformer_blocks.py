"""The transformer's blocks: f of the released language model, ours, its layers, and the cache of keys and values.

Shape suffixes: B batch, T tokens, D d_model, H heads, K size of a head (half of it in the tables of rotations).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdeq_lightning.models.config import TransformerConfig
from revdeq_lightning.models.linear import Linear
from revdeq_lightning.models.own_block import own_block

PAPER_NORM_EPS, MODERN_NORM_EPS = 1e-5, 1e-6


class KeyValueCache:
    """Keys, values, and other cached tensors of the tokens so far, one slot per call of `extend` in a pass.

    A solve with a fixed number of steps is a deep causal network with shared weights: after each evaluation, the state
    of a token depends only on earlier tokens, through their keys and values in the same evaluation. One slot per
    attention and evaluation is therefore exact, and a new token costs a solve over one token, whatever came before.

    A pass is one run of the model over new tokens. Every pass makes the same calls in the same order (the layers of
    evaluation 1, those of evaluation 2, ...), so slots need no names. Memory for `context_length` tokens is
    allocated at the start, so nothing is copied as the text grows.

    Attributes:
        length: Number of tokens in the cache: the position of the next one.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.length = 0
        self._slots: list[tuple[Tensor, ...]] = []
        self._next_slot = 0

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append to the next slot along dimension -2 and return views of its contents."""
        num_new = new[0].shape[-2]
        if num_new > 1 and self.length:
            raise ValueError(f"a cache with tokens takes one new token at a time, got {num_new}")
        if self._next_slot == len(self._slots):
            if self.length:
                raise RuntimeError(
                    f"a pass used the cache more often than the first one, {len(self._slots)} times: "
                    "the cache needs a fixed number of evaluations"
                )
            self._slots.append(tuple(t.new_empty(*t.shape[:-2], self.context_length, t.shape[-1]) for t in new))
        slot = self._slots[self._next_slot]
        self._next_slot += 1
        end = self.length + num_new
        for stored, t in zip(slot, new, strict=True):
            stored[..., self.length : end, :] = t
        return tuple(stored[..., :end, :] for stored in slot)

    def bind(self, f: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        """`f(z, x)` whose evaluations use the slots of the cache in turn."""
        return lambda z, x: f(z, x, self)

    def end_pass(self, num_new: int) -> None:
        """Count the tokens of this pass as seen."""
        if self._next_slot != len(self._slots):
            raise RuntimeError(
                f"a pass used the cache {self._next_slot} times, the first one {len(self._slots)} times: "
                "the cache needs a fixed number of evaluations"
            )
        self._next_slot = 0
        self.length += num_new


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """`(B, T, D) -> (B, H, T, K)`."""
    return x_BTD.view(*x_BTD.shape[:-1], num_heads, -1).transpose(-3, -2)


def rms_norm(x: Tensor) -> Tensor:
    """Normalize to root mean square 1 over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=MODERN_NORM_EPS)


def attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, cache: KeyValueCache | None, is_causal: bool = True
) -> Tensor:
    """Attend to all tokens, or, if causal, to this and earlier tokens, including cached ones; `(B, T, D)`."""
    if cache is not None:
        k_BHTK, v_BHTK = cache.extend(k_BHTK, v_BHTK)
    # A single new token may attend to all; only complete sequences, with an empty cache, need the mask.
    is_causal = is_causal and q_BHTK.shape[-2] > 1
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=is_causal).transpose(-3, -2).flatten(-2)


class PaperAttention(nn.Module):
    """Multi-head attention; with `double_projection` the projected q, k, v are projected once more, without bias."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.num_heads = config.num_heads
        self.query, self.key, self.value = (Linear(d, d) for _ in range(3))
        self.inner = nn.ModuleList(Linear(d, d, bias=False) for _ in range(3)) if config.double_projection else None
        self.output = Linear(d, d, bias=False)

    def forward(self, h_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        qkv = [self.query(h_BTD), self.key(h_BTD), self.value(h_BTD)]
        if self.inner is not None:
            qkv = [project(t_BTD) for project, t_BTD in zip(self.inner, qkv, strict=True)]
        q_BHTK, k_BHTK, v_BHTK = (split_heads(t_BTD, self.num_heads) for t_BTD in qkv)
        return cast(Tensor, self.output(attention(q_BHTK, k_BHTK, v_BHTK, cache)))


class PaperBlock(nn.Module):
    """`h = z + attention(norm1(z + x));  f(z, x) = h + mlp(norm2(h))`: nothing bounds the state.

    Source: github.com/sammccallum/reversible-deq, experiments/language.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, d_mlp = config.d_model, config.mlp_width
        self.norm1, self.norm2 = nn.LayerNorm(d, PAPER_NORM_EPS), nn.LayerNorm(d, PAPER_NORM_EPS)
        self.attention = PaperAttention(config)
        self.mlp = nn.Sequential(
            Linear(d, d_mlp), nn.GELU("tanh"), Linear(d_mlp, d_mlp), nn.GELU("tanh"), Linear(d_mlp, d)
        )

    def forward(self, z_BTD: Tensor, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        h_BTD = z_BTD + self.attention(self.norm1(z_BTD + x_BTD), cache)
        return cast(Tensor, h_BTD + self.mlp(self.norm2(h_BTD)))


class ModernAttention(nn.Module):
    """Attention with normalized, rotated queries and keys, no biases, and an output initialized to zero."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, config: TransformerConfig, is_causal: bool) -> None:
        super().__init__()
        d = config.d_model
        self.num_heads, self.is_causal = config.num_heads, is_causal
        self.query, self.key, self.value, self.output = (Linear(d, d, bias=False) for _ in range(4))
        wavelengths = config.rope_base ** torch.linspace(0, 1, config.head_size // 2 + 1, dtype=torch.float64)[:-1]
        angles_TK = torch.arange(config.context_length)[:, None] / wavelengths
        self.register_buffer("cos_TK", angles_TK.cos().float(), persistent=False)
        self.register_buffer("sin_TK", angles_TK.sin().float(), persistent=False)

    def forward(self, h_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            split_heads(project(h_BTD), self.num_heads) for project in (self.query, self.key, self.value)
        )
        start = 0 if cache is None else cache.length
        q_BHTK, k_BHTK = (self.rotate(rms_norm(t), start).to(v_BHTK) for t in (q_BHTK, k_BHTK))
        return cast(Tensor, self.output(attention(q_BHTK, k_BHTK, v_BHTK, cache, self.is_causal)))

    def rotate(self, t_BHTK: Tensor, start: int) -> Tensor:
        """Rotate pairs of channels by angles proportional to the position, so that products depend on distances."""
        positions = slice(start, start + t_BHTK.shape[-2])
        cos_TK, sin_TK = self.cos_TK[positions], self.sin_TK[positions]
        a, b = t_BHTK.chunk(2, dim=-1)
        return torch.cat([a * cos_TK - b * sin_TK, a * sin_TK + b * cos_TK], dim=-1)


class GatedMLP(nn.Module):
    """`down(silu(gate(h)) * up(h))`, zero at initialization."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, d_mlp = config.d_model, config.mlp_width
        self.gate, self.up = Linear(d, d_mlp, bias=False), Linear(d, d_mlp, bias=False)
        self.down = Linear(d_mlp, d, bias=False)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.silu(self.gate(h_BTD)) * self.up(h_BTD)))


class ModernLayer(nn.Module):
    """`h = h + attention(norm1(h));  h = h + mlp(norm2(h))`."""

    def __init__(self, config: TransformerConfig, is_causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(config.d_model, MODERN_NORM_EPS) for _ in range(2))
        self.attention = ModernAttention(config, is_causal)
        self.mlp = GatedMLP(config)

    def forward(self, h_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        h_BTD = h_BTD + self.attention(self.norm1(h_BTD), cache)
        return cast(Tensor, h_BTD + self.mlp(self.norm2(h_BTD)))


class ModernBlock(nn.Module):
    """`f(z, x) = norm(layers(z + x))`: the norm keeps the state at unit scale, so that it contracts."""

    def __init__(self, config: TransformerConfig, is_causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ModernLayer(config, is_causal) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, MODERN_NORM_EPS)
        for name, parameter in self.named_parameters():
            if name.endswith(("output.weight", "down.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(self, z_BTD: Tensor, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        h_BTD = z_BTD + x_BTD
        for layer in self.layers:
            h_BTD = layer(h_BTD, cache)
        return cast(Tensor, self.norm(h_BTD))


def make_block(config: TransformerConfig) -> nn.Module:
    """Build f as selected by `config.block`."""
    if config.block == "paper":
        return PaperBlock(config)
    if config.block == "modern":
        return ModernBlock(config)
    return own_block(config.block, config.d_model, config.block_options)
