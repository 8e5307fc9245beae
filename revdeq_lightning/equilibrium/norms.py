"""The residual: one definition for every solver, per sample."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-5
"""Keeps the relative residual finite where f vanishes (value of the paper's released code)."""


class Residual(NamedTuple):
    """How far each sample is from its fixed point.

    Attributes:
        relative: `norm(f - z) / (norm(f) + EPSILON)`, shape `(batch,)`; of several leaves the largest.
        converged: Whether `norm(f - z) <= atol + rtol * (norm(f) + EPSILON)` holds in every leaf, shape `(batch,)`.
    """

    relative: Tensor
    converged: Tensor


@torch.no_grad()
def residual(value: Sequence[Tensor], state: Sequence[Tensor], rtol: float = 0.0, atol: float = 0.0) -> Residual:
    """Compare `value = f(state)` with `state`, sample by sample (L2 norm over all but the first dimension)."""
    relatives, converged = [], []
    for f, z in zip(value, state, strict=True):
        difference = torch.linalg.vector_norm((f - z).reshape(len(f), -1), dim=1)
        scale = torch.linalg.vector_norm(f.reshape(len(f), -1), dim=1) + EPSILON
        relatives.append(difference / scale)
        # An infinite f would be within any share of itself.
        converged.append((difference <= atol + rtol * scale) & difference.isfinite())
    return Residual(torch.stack(relatives).amax(0), torch.stack(converged).all(0))


def broadcast_to_leaf(mask: Tensor, leaf: Tensor) -> Tensor:
    """View of a per-sample mask `(batch,)` that broadcasts over `leaf`, `(batch, ...)`."""
    return mask.view(-1, *(1,) * (leaf.ndim - 1))
