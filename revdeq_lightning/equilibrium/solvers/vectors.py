"""The state as one vector a sample, for solvers that take inner products: however many leaves it has, it is one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..function import Leaves
from ..norms import EPSILON


def join(leaves: Leaves) -> Tensor:
    """All leaves as `(batch, elements)`, in float32 at least."""
    dtype = torch.float32
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    flat = [leaf.reshape(len(leaf), -1).to(dtype) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def split(vector: Tensor, like: Leaves) -> Leaves:
    """Inverse of `join`: shapes and dtypes of `like`."""
    parts = vector.split([leaf[0].numel() for leaf in like], 1)
    return [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, like, strict=True)]


NOISE = 10.0
"""Rounding errors of f, in units of the last place of its norm, below which a residual says nothing."""


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
