"""Recorded evaluations of f: what autograd is asked of them, in one place for every adjoint."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .function import EquilibriumFunction, Leaves


def evaluate_recorded(f: EquilibriumFunction, z: Leaves, x: Sequence[Any]) -> tuple[Leaves, Leaves]:
    """Fresh leaves with the values of z, and f of them with autograd recording."""
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in z]
        return leaves, f(leaves, x)


def vector_jacobian_products(
    value: Leaves, sources: Leaves, weights: Leaves, *, retain_graph: bool = False, create_graph: bool = False
) -> list[Tensor | None]:
    """`weights^T d(value)/d(source)` for every source; None for one that does not enter."""
    outputs = [(v, w) for v, w in zip(value, weights, strict=True) if v.requires_grad]
    if not outputs:
        return [None] * len(sources)
    tensors, weights = (list(column) for column in zip(*outputs, strict=True))
    return list(
        torch.autograd.grad(
            tensors,
            sources,
            weights,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    )


def graph_leaves(value: Leaves) -> Iterator[Tensor]:
    """The tensors in which the graph of `value` ends: parameters and inputs that need a gradient."""
    seen: set[Any] = set()
    stack = [v.grad_fn for v in value if v.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
