"""Diagnostics of a map and of a gradient.

Jacobian penalty     norm(df/dz)_F^2 / dim, by Hutchinson's estimate, to be added to the loss
spectral radius      rho(df/dz): plain iteration converges near the fixed point where it is below 1
gradient error       norm(grad - reference) / norm(reference)
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .adjoints.backprop import BackpropAdjoint
from .adjoints.base import AbstractAdjoint
from .function import EquilibriumFunction, evaluate_recorded, modules, vector_jacobian_products
from .norms import Leaves, Map, join, scaled
from .solve import solve_fixed_point
from .solvers.base import AbstractSolver
from .validation import require_count


def jacobian_regularization(
    f: Map, z: Any, x: Any, *, num_samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate `norm(df/dz)_F^2 / dim` at z, the mean over the batch, differentiably.

    Hutchinson: the mean of `norm(J^T v)^2` over random signs v is the squared Frobenius norm of J. Added to the loss,
    it keeps f contracting, so that solvers and the implicit gradient converge. It costs one evaluation of f with a
    double backward; attention uses PyTorch's "math" kernel, because the fast ones have no double backward.

    Args:
        f: Map `(z, x) -> z`.
        z: Where, usually `solution.value`; a constant here: the gradient goes to x and the parameters of f.
        x: Injected input, any pytree.
        num_samples: Random vectors, with one product each.
        generator: Source of the signs, on the device of z; by default PyTorch's own.

    Source: Bai et al. 2021, arXiv:2106.14342, section 4.
    """
    require_count("num_samples", num_samples)
    with sdpa_kernel(SDPBackend.MATH):
        state, value = _recorded(f, z, x)
        squares = []
        for _ in range(num_samples):
            bits = [torch.randint(0, 2, v.shape, generator=generator, device=v.device) for v in value]
            signs = [(b * 2 - 1).to(v.dtype) for b, v in zip(bits, value, strict=True)]
            create_graph = torch.is_grad_enabled()
            products = vector_jacobian_products(value, state, signs, retain_graph=True, create_graph=create_graph)
            squares += [join([p]).square().sum() for p in products if p is not None]
    if not squares:  # f does not depend on z
        return torch.zeros((), device=state[0].device)
    return torch.stack(squares).sum() / (num_samples * sum(leaf.numel() for leaf in state))


def spectral_radius(
    f: Map, z: Any, x: Any, *, num_iterations: int = 50, per_sample: bool = True, seed: int = 0
) -> Tensor:
    """Estimate the spectral radius of df/dz at z by the power method: below 1, f contracts near z.

    The growth of `v <- J^T v` is averaged over the later half of the iterations, because it oscillates where the
    largest eigenvalues are complex. The estimate is from below, good to a few percent where the largest eigenvalues
    are apart. It costs one evaluation of f and `num_iterations` vector-Jacobian products, and leaves random state and
    buffers unchanged.

    Args:
        f: Map `(z, x) -> z`.
        z: Where, usually `solution.value`.
        x: Injected input, any pytree.
        num_iterations: Power iterations, at least 2.
        per_sample: One radius per sample, shape `(batch,)`, valid if f does not mix samples; else one, 0-dim.
        seed: Of the start vector.
    """
    require_count("num_iterations", num_iterations, at_least=2)
    with _aside(f, z):
        state, value = _recorded(f, tree_map(_constant, z), tree_map(_constant, x))
        vector, growths = _random_like(value, seed), []
        for _ in range(num_iterations):
            norm = _norm(vector, per_sample)
            unit = scaled(vector, torch.where(norm > 0, 1 / norm, 0.0))
            products = vector_jacobian_products(value, state, unit, retain_graph=True)
            vector = [torch.zeros_like(v) if p is None else p for v, p in zip(vector, products, strict=True)]
            growths.append(_norm(vector, per_sample))
        radius = torch.stack(growths[num_iterations // 2 :]).log().mean(0).exp()
    return radius if per_sample else radius[0]


class GradientComparison(NamedTuple):
    """How far one adjoint's gradient is from another's, in all tensors together and in each."""

    relative_l2: float
    cosine: float
    by_tensor: dict[str, float]
    """Relative L2 error of each parameter of f by name, of x as "x[0]", ...; not finite where the reference is 0."""


def gradient_error(
    f: Map,
    z0: Any,
    x: Any,
    *,
    solver: AbstractSolver,
    adjoint: AbstractAdjoint,
    reference: AbstractAdjoint | None = None,
    reference_dtype: torch.dtype | None = None,
    cotangent: Any = None,
) -> GradientComparison:
    """Compare the gradients of two adjoints for one solve, in the parameters of f and the leaves of x.

    Both runs draw the same random numbers. Random state, buffers and `.grad` are left unchanged.

    Args:
        f: Map `(z, x) -> z`.
        z0: Initial state.
        x: Injected input; its floating-point leaves are differentiated.
        solver: Of both runs.
        adjoint: The one to judge.
        reference: The one to compare with; `BackpropAdjoint()` by default, the exact gradient of the iteration.
        reference_dtype: For example float64: the reference then is a run of a copy of f in that precision, so the error
            includes what the lower precision changes in the iterates; f must be a module. None: the precision of f.
        cotangent: dL/dz, structure of z0; random by default, always the same.
    """
    if reference_dtype is not None and not isinstance(f, nn.Module):
        raise ValueError(f"reference_dtype={reference_dtype} needs an f that is an nn.Module, got {type(f).__name__}")
    upstream = _random_like(tree_leaves(z0), 0) if cotangent is None else tree_leaves(cotangent)
    ours = _gradient(f, z0, x, upstream, solver, adjoint, None)
    exact = _gradient(f, z0, x, upstream, solver, reference or BackpropAdjoint(), reference_dtype)
    if not exact:
        raise ValueError("nothing to differentiate: f has no parameter that needs a gradient, and x no floating point")
    by_tensor = {name: float((ours[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    a, b = torch.cat([ours[name] for name in exact]), torch.cat(list(exact.values()))
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    return GradientComparison(float((a - b).norm() / b.norm()), float(cosine), by_tensor)


def _gradient(
    f: Map, z0: Any, x: Any, upstream: Leaves, solver: AbstractSolver, adjoint: AbstractAdjoint, dtype: Any
) -> dict[str, Tensor]:
    """Flat float64 gradients by name; with a dtype, those of a copy of f in it, without autocast."""
    device_type = upstream[0].device.type
    is_autocast = dtype is None and torch.is_autocast_enabled(device_type)
    with _aside(f, z0), torch.autocast(device_type, enabled=is_autocast):
        z0, x = tree_map(_constant, z0), tree_map(_constant, x)
        if dtype is not None:
            f = copy.deepcopy(cast(nn.Module, f)).to(dtype)
            z0, x = (tree_map(lambda leaf: leaf.to(dtype) if _is_floating(leaf) else leaf, tree) for tree in (z0, x))
        leaves = {f"x[{i}]": leaf.requires_grad_() for i, leaf in enumerate(tree_leaves(x)) if _is_floating(leaf)}
        own = f.named_parameters() if isinstance(f, nn.Module) else ()
        sources = {name: p for name, p in own if p.requires_grad} | leaves
        if not sources:
            return {}
        value = tree_leaves(solve_fixed_point(f, z0, x, solver=solver, adjoint=adjoint).value)
        weights = [g.to(v.dtype) for v, g in zip(value, upstream, strict=True)]
        products = vector_jacobian_products(value, list(sources.values()), weights)
        return {
            name: (torch.zeros_like(source) if product is None else product).detach().flatten().double()
            for (name, source), product in zip(sources.items(), products, strict=True)
        }


def _recorded(f: Map, z: Any, x: Any) -> tuple[Leaves, Leaves]:
    """The leaves of z as constants, and f of them."""
    leaves, spec = tree_flatten(z)
    return evaluate_recorded(EquilibriumFunction(f, leaves, spec, x), leaves)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _constant(leaf: Any) -> Any:
    """A copy cut off from its graph, which autograd can use even if the tensor was made in inference mode."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _random_like(leaves: Leaves, seed: int) -> Leaves:
    """Normal numbers from a generator of their own, the same on every device."""
    generator = torch.Generator().manual_seed(int(seed))
    return [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in leaves]


def _norm(leaves: Leaves, per_sample: bool) -> Tensor:
    """L2 norms, `(batch,)`: each sample's own, or everywhere that of the whole."""
    vector = join(leaves)
    norms: Tensor = torch.linalg.vector_norm(vector, dim=1)
    return norms if per_sample else torch.linalg.vector_norm(norms).expand_as(norms)


@contextlib.contextmanager
def _aside(f: Map, z: Any) -> Iterator[None]:
    """Autograd records, wherever this is called; random state and buffers are afterwards what they were."""
    buffers = [(m, name, b, b.clone()) for m in modules(f) for name, b in m._buffers.items() if b is not None]
    devices = {leaf.device for leaf in tree_leaves(z) if leaf.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            with torch.no_grad():
                for module, name, buffer, content in buffers:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, content):  # a graph that saved it would notice the copy
                        buffer.copy_(content)
