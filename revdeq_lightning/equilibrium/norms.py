"""Per-sample norms: the residual, one definition for every solver, and the state as one vector per sample."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms import is_transformed

Leaves = list[Tensor]
Map = Callable[[Any, Any], Any]  # `f(z, x)`, on pytrees of tensors
Mask = Tensor | None  # the samples that still move, shape `(batch,)`; None: all

EPSILON = 1e-5
"""Keeps the relative residual finite where f vanishes (value of the paper's released code)."""


class Residual(NamedTuple):
    """How far each sample is from its fixed point, each of shape `(batch,)`."""

    relative: Tensor  # `norm(f - z) / (norm(f) + EPSILON)`; of several leaves the largest
    converged: Tensor  # whether `norm(f - z) <= atol + rtol * (norm(f) + EPSILON)` holds in every leaf


@torch.no_grad()
def residual(value: Sequence[Tensor], state: Sequence[Tensor], rtol: float = 0.0, atol: float = 0.0) -> Residual:
    """Compare `value = f(state)` with `state`, sample by sample (L2 norm over all but the first dimension)."""
    relatives, converged = [], []
    for f, z in zip(value, state, strict=True):
        difference, scale = _norm(f - z), _norm(f) + EPSILON
        relatives.append(difference / scale)
        # An infinite f would be within any share of itself.
        converged.append((difference <= atol + rtol * scale) & difference.isfinite())
    return Residual(torch.stack(relatives).amax(0), torch.stack(converged).all(0))


def _norm(leaf: Tensor) -> Tensor:
    return torch.linalg.vector_norm(leaf, dim=tuple(range(1, leaf.ndim))) if leaf.ndim > 1 else leaf.abs()


def in_memory_order(leaf: Tensor) -> Tensor:
    """A view with the dimensions as they lie in memory: a reduction of all elements would copy others first."""
    return leaf if leaf.is_contiguous() else leaf.permute(sorted(range(leaf.ndim), key=leaf.stride, reverse=True))


@torch.no_grad()
def extremes(leaves: Leaves, unit: float = 1.0) -> Leaves:
    """Smallest and largest element of each leaf, 0-dim, times `unit`; `vector_norm(inf)` is 20 times slower on CPUs."""
    if is_transformed():  # PyTorch 2.11 cannot transform `aminmax`
        found = [extreme for leaf in leaves for extreme in (leaf.amin(), leaf.amax())]
    else:
        found = [extreme for leaf in leaves for extreme in torch.aminmax(in_memory_order(leaf))]
    return found if unit == 1 else [extreme * unit for extreme in found]


def broadcast_to_leaf(mask: Tensor, leaf: Tensor) -> Tensor:
    """View of a per-sample mask `(batch,)` that broadcasts over `leaf`, `(batch, ...)`."""
    return mask.view(-1, *(1,) * (leaf.ndim - 1))


def scaled(leaves: Leaves, factors: Tensor) -> Leaves:
    """Each sample times its factor, `(batch,)`."""
    return [leaf * broadcast_to_leaf(factors.to(leaf.dtype), leaf) for leaf in leaves]


def select(active: Mask, new: Leaves, old: Leaves) -> Leaves:
    """The new values of the active samples, the old ones of the others."""
    if active is None:
        return new
    return [torch.where(broadcast_to_leaf(active, a), a, b) for a, b in zip(new, old, strict=True)]


def join(leaves: Leaves) -> Tensor:
    """All leaves as `(batch, elements)`, in float32 at least."""
    dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves], torch.float32)
    flat = [leaf.reshape(leaf.shape[0], -1).to(dtype) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def split(vector: Tensor, like: Leaves) -> Leaves:
    """Inverse of `join`: shapes and dtypes of `like`."""
    parts = vector.split([leaf[0].numel() for leaf in like], 1)
    return [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, like, strict=True)]


NOISE = 10.0  # rounding errors of f, in units of the last place of its norm, below which a residual says nothing


@torch.no_grad()
def rounding(value: Leaves) -> Tensor:
    """Norm of what rounding may have made of `value = f(z, x)`, shape `(batch,)`."""
    eps = max(torch.finfo(leaf.dtype).eps for leaf in value)
    norm: Tensor = torch.linalg.vector_norm(join(value), dim=1)
    return NOISE * eps * (norm + EPSILON)


# Products and sums instead of matrix products, which TF32 and autocast would round to 3 digits.


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, shape `(batch,)`."""
    return (a * b).sum(1)


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """`sum_i weights[i] * vectors[i]`, each weight of shape `(batch,)`."""
    total = vectors[0] * weights[0][:, None]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total = torch.addcmul(total, vector, weight[:, None])
    return total
