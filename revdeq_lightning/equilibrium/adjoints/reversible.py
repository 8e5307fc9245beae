"""The reversible adjoint: runs the solver backwards, so that no iterate is stored.

For the two-step family, from g_cur = dL/du_K, g_prev = 0, and for k = K-1 .. 0 with (u_k, u_{k+1}) at hand:

    v = f(u_k, x), evaluated once, with grad: it gives u_{k-1} by the inverse and the products with b * g_cur
    g_cur, g_prev = g_prev + c * g_cur + b * (df/du)^T g_cur,   a * g_cur

and the products for x and the parameters are added up. At the end dL/dz_0 = g_cur + g_prev, as u_0 and u_{-1} both are
z_0.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..exact import kernels
from ..function import (
    EquilibriumFunction,
    call_with_parameters,
    evaluate_recorded,
    graph_leaves,
    is_compiled,
    named_parameters,
    vector_jacobian_products,
)
from ..loop import iterate_to_fixed_point
from ..norms import Leaves, select
from ..solution import SolverStats
from ..solvers.base import AbstractSolver
from ..solvers.reversible import AbstractTwoStepSolver, TwoStepState
from ..validation import require_choice
from .base import AbstractAdjoint

Policy = Literal["warn", "raise", "ignore"]


class ReconstructionWarning(UserWarning):
    """The backward pass did not come back to the initial state: its gradient is not that of the forward pass."""


class ReconstructionError(RuntimeError):
    """As `ReconstructionWarning`, where asked to raise."""


@dataclass(frozen=True, kw_only=True)
class ReversibleAdjoint(AbstractAdjoint):
    """Gradient by reconstruction: exact with arithmetic "exact", with no memory in the number of steps.

    Supports `ReversibleSolver` and `MomentumSolver`. f must be the same function in both passes: after each backward
    pass the reconstructed initial state is compared with the true one, bit for bit, and the elements that differ are
    counted in `stats.reconstruction_mismatch`. With arithmetic "exact" a difference means that f was not the same
    function (dropout outside torch's generators, data changed in place, another kernel); with "float64" and "float32"
    there always is one.

    Every tensor that f uses and that needs a gradient must be a parameter of the module f, or in x, or the state.

    Args:
        mismatch: With arithmetic "exact", what to do when elements differ: "warn", "raise" or "ignore".
        forward_with_grad: Whether the forward pass records f for autograd too (and drops the record), so that a
            compiled f runs the same program in both passes. None: only where torch.compile is found in f.
    """

    mismatch: Policy = "warn"
    forward_with_grad: bool | None = None

    def __post_init__(self) -> None:
        require_choice("mismatch", self.mismatch, get_args(Policy))

    def check(self, solver: AbstractSolver) -> None:
        if not isinstance(solver, AbstractTwoStepSolver):
            raise ValueError(
                f"ReversibleAdjoint cannot run {type(solver).__name__} backwards: use ReversibleSolver or"
                " MomentumSolver, or BackpropAdjoint, ImplicitAdjoint or PhantomAdjoint"
            )

    def solve(
        self, f: EquilibriumFunction, z0: Leaves, x: Sequence[Any], solver: AbstractSolver
    ) -> tuple[Leaves, SolverStats]:
        assert isinstance(solver, AbstractTwoStepSolver)
        refuse_unsuitable(f.f)
        parameters = named_parameters(f.f)
        x_tensors, x_rest = _separated(x)
        inputs = (*z0, *x_tensors, *parameters.values(), *f.weights.values)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
            iteration = iterate_to_fixed_point(solver, f, z0, x)
            _refuse_foreign_leaves(iteration.value, [])
            return iteration.value, iteration.stats
        with_grad = is_compiled(f.f) if self.forward_with_grad is None else self.forward_with_grad
        solve = _Solve(f, solver, self.mismatch, with_grad, len(z0), x_rest, list(parameters))
        value = _ReversibleFunction.apply(solve, *inputs)
        return list(value), solve.stats


@dataclass
class _Solve:
    """What a solve hands from its forward to its backward pass, besides the tensors that autograd saves."""

    f: EquilibriumFunction
    solver: AbstractTwoStepSolver
    mismatch: Policy
    forward_with_grad: bool
    num_leaves: int
    x_rest: list[Any]
    names: list[str]
    stats: SolverStats = field(init=False)
    num_evaluations: int = 0
    state_rest: list[Any] = field(default_factory=list)
    state_spec: TreeSpec | None = None
    is_consumed: bool = False

    def split(self, inputs: Sequence[Tensor]) -> tuple[Leaves, list[Any], dict[str, Tensor], Leaves]:
        """z0, x, the parameters and the computed weights from the autograd Function's flat inputs."""
        rest = iter(inputs)
        z0 = [next(rest) for _ in range(self.num_leaves)]
        x = _joined(rest, self.x_rest)
        return z0, x, {name: next(rest) for name in self.names}, list(rest)

    def with_parameters(self, inputs: Sequence[Tensor], run: Callable[[], Any]) -> Any:
        """`run()` with these inputs in place of the parameters and the computed weights of f."""
        _, _, parameters, weights = self.split(inputs)
        with self.f.weights.exchanged(weights):
            return call_with_parameters(self.f.f, parameters, run)


_TENSOR = object()
"""Takes the place of a tensor among leaves that are none."""


def _separated(leaves: Sequence[Any]) -> tuple[Leaves, list[Any]]:
    """Tensors, which pass through autograd, and the other leaves."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _joined(tensors: Iterator[Tensor], rest: Sequence[Any]) -> list[Any]:
    return [next(tensors) if leaf is _TENSOR else leaf for leaf in rest]


class _ReversibleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: _Solve, *inputs: Tensor) -> tuple[Tensor, ...]:
        z0, x, _, _ = solve.split(inputs)
        run = partial(iterate_to_fixed_point, solve.solver, reversible=True)
        if solve.forward_with_grad:
            leaves = _as_leaves(inputs, ctx.needs_input_grad[1:])
            iteration = solve.with_parameters(leaves, lambda: run(_Recorded(solve.f), z0, solve.split(leaves)[1]))
        else:
            iteration = run(solve.f, z0, x)
        solve.stats, solve.num_evaluations = iteration.stats, iteration.num_evaluations
        ctx.solve = solve
        state, solve.state_spec = tree_flatten(iteration.state)
        state_tensors, solve.state_rest = _separated(state)
        # Everything large goes through autograd's own saving: so saved-tensor hooks (checkpoint, offloading) see it,
        # and an input that is changed in place before the backward pass is noticed.
        ctx.save_for_backward(*inputs, *state_tensors)
        return tuple(iteration.value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        solve: _Solve = ctx.solve
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ReversibleAdjoint has no double backward, and create_graph=True was asked for: use"
                " BackpropAdjoint() for second derivatives"
            )
        if solve.is_consumed:
            raise RuntimeError(
                "second backward through one solve: its states were consumed by the first. Add the losses up and"
                " call backward once, or solve again, or use BackpropAdjoint()"
            )
        saved = ctx.saved_tensors
        solve.is_consumed = True
        needs_grad = ctx.needs_input_grad[1:]
        inputs = _as_leaves(saved[: len(needs_grad)], needs_grad)
        assert solve.state_spec is not None
        state = tree_unflatten(_joined(iter(saved[len(needs_grad) :]), solve.state_rest), solve.state_spec)
        with solve.f.randomness.untouched():
            gradients = solve.with_parameters(inputs, lambda: _run_backwards(solve, state, inputs, needs_grad, grads))
        return None, *gradients


class _Recorded:
    """Evaluates f in the forward pass as the backward pass will: with autograd recording, the record dropped."""

    def __init__(self, f: EquilibriumFunction) -> None:
        self.f = f

    @property
    def nfe(self) -> int:
        return self.f.nfe

    def __call__(self, z: Leaves, x: Sequence[Any]) -> Leaves:
        return [v.detach() for v in evaluate_recorded(self.f, z, x)[1]]


def _run_backwards(
    solve: _Solve, state: TwoStepState, inputs: Leaves, needs_grad: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Undo every evaluation, newest first, and return the gradients of the inputs."""
    solver, stats = solve.solver, solve.stats
    b = solver.recurrence.b
    backward = _BackwardPass(solve, inputs, needs_grad)
    # Both are carried times b, so that they are the products' weights as they stand, and as precisely as the state:
    # their rounding errors add up over the evaluations just as the state's do.
    g_current = [b * g.to(torch.promote_types(g.dtype, solver.state_arithmetic.dtype)) for g in grads]
    g_previous = [torch.zeros_like(g) for g in g_current]
    undo = _undo_the_steps_of_each_sample if solver.has_tolerance else _undo_all_steps
    state, g_current, g_previous = undo(solve, backward, state, g_current, g_previous)
    z0 = inputs[: solve.num_leaves]
    stats.backward_nfe = backward.nfe
    stats.reconstruction_mismatch = solver.reconstruction_mismatch(state, z0)
    _report_mismatch(solve, stats.reconstruction_mismatch, sum(z.numel() for z in z0))
    sums = backward.sums | {i: (g + h).div_(b) for i, (g, h) in enumerate(zip(g_current, g_previous, strict=True))}
    return [sums[i].to(inputs[i].dtype) if needed and i in sums else None for i, needed in enumerate(needs_grad)]


def _undo_all_steps(
    solve: _Solve, backward: "_BackwardPass", state: TwoStepState, g_current: Leaves, g_previous: Leaves
) -> tuple[TwoStepState, Leaves, Leaves]:
    for _ in range(solve.num_evaluations):
        value, products = backward.evaluate(solve.solver.iterate_before(state, None), g_current)
        state = solve.solver.invert_step(state, value, None)
        for i, product in enumerate(products):
            g_current[i], g_previous[i] = _carry_(g_previous[i], g_current[i], product, solve.solver)
    return state, g_current, g_previous


def _undo_the_steps_of_each_sample(
    solve: _Solve, backward: "_BackwardPass", state: TwoStepState, g_current: Leaves, g_previous: Leaves
) -> tuple[TwoStepState, Leaves, Leaves]:
    """With a tolerance: each sample waits, its gradient held, until the evaluation at which it stopped is undone."""
    solver, stats = solve.solver, solve.stats
    num_evaluations = int(stats.num_steps.max()) * solver.evaluations_per_step
    nobody = torch.zeros_like(stats.num_steps, dtype=torch.bool)
    # The host looks only every few steps: after the last sample's stop there may be evaluations that moved nothing.
    for _ in range(num_evaluations, solve.num_evaluations):
        state = solver.invert_step(state, solver.iterate_before(state, nobody), nobody)
    for k in reversed(range(num_evaluations)):
        active = stats.num_steps > k // solver.evaluations_per_step
        weights = select(active, g_current, [torch.zeros_like(g) for g in g_current])
        value, products = backward.evaluate(solver.iterate_before(state, active), weights)
        state = solver.invert_step(state, value, active)
        for i, product in enumerate(products):
            carried = _carry_(g_previous[i].clone(), g_current[i].clone(), product, solver)
            # A sample that had stopped still entered the evaluation, and the others' results if f mixes samples.
            held = g_current[i] if product is None else g_current[i].add(product, alpha=solver.recurrence.b)
            g_current[i], g_previous[i] = select(active, list(carried), [held, g_previous[i]])
    return state, g_current, g_previous


def _carry_(
    g_previous: Tensor, g_current: Tensor, product: Tensor | None, solver: AbstractTwoStepSolver
) -> tuple[Tensor, Tensor]:
    """From the gradients in u_k and u_{k+1}, in their memory, those in u_{k-1} and u_k: the new current one first."""
    a, c, b = float(solver.recurrence.a), solver.recurrence.c, solver.recurrence.b
    if solver.compiled and not solver.has_tolerance and product is not None:
        kernels.run(kernels.carry_, g_previous, g_current, product, a, c, b)
        return g_previous, g_current
    if product is not None:
        g_previous.add_(product, alpha=b)
    if c:
        g_previous.add_(g_current, alpha=c)
    return g_previous, g_current.mul_(a)


class _BackwardPass:
    """Evaluates f with autograd recording and adds up the gradients of x and the parameters."""

    def __init__(self, solve: _Solve, inputs: Leaves, needs_grad: Sequence[bool]) -> None:
        self.f, self.x, self.num_leaves = solve.f, solve.split(inputs)[1], solve.num_leaves
        self.nfe_before = solve.f.nfe
        self.differentiated = {
            i: leaf
            for i, (leaf, needed) in enumerate(zip(inputs, needs_grad, strict=True))
            if needed and i >= solve.num_leaves
        }
        self.sums: dict[int, Tensor] = {}

    @property
    def nfe(self) -> int:
        return self.f.nfe - self.nfe_before

    def evaluate(self, iterate: Leaves, g: Leaves) -> tuple[Leaves, list[Tensor | None]]:
        """`v = f(iterate, x)` and `(dv/du)^T g`; the products for everything else go to `sums`."""
        z, value = evaluate_recorded(self.f, iterate, self.x)
        sources = [*z, *self.differentiated.values()]
        if self.nfe == 1:
            _refuse_foreign_leaves(value, sources)
        weights = [w.to(v.dtype, copy=True) for w, v in zip(g, value, strict=True)]  # a product may be its weight
        products = vector_jacobian_products(value, sources, weights)
        for i, product in zip(self.differentiated, products[self.num_leaves :], strict=True):
            if product is not None and i in self.sums:
                self.sums[i].add_(product)
            elif product is not None:
                self.sums[i] = product.to(_accumulation_dtype(product), copy=True)
        return [v.detach() for v in value], products[: self.num_leaves]


def _as_leaves(inputs: Sequence[Tensor], needs_grad: Sequence[bool]) -> Leaves:
    """The inputs cut off from the graph that made them."""
    return [t.detach().requires_grad_(needed) for t, needed in zip(inputs, needs_grad, strict=True)]


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32 at least: sums of many small contributions lose them in fewer bits."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _report_mismatch(solve: _Solve, mismatch: Tensor, num_elements: int) -> None:
    # Floating-point states never come back exactly, whatever f does: there the count says nothing of f.
    if solve.mismatch == "ignore" or solve.solver.arithmetic != "exact" or not (count := int(mismatch)):
        return
    message = (
        f"this gradient is not exact: {count} of {2 * num_elements} elements of the reconstructed initial state"
        " differ, so f was not the same function in the forward and the backward pass. Look for random numbers that"
        " torch's generators do not make, buffers that f updates, data changed in place, and kernels chosen anew (a"
        " part of f under torch.compile: ReversibleAdjoint(forward_with_grad=True))"
    )
    if solve.mismatch == "raise":
        raise ReconstructionError(message)
    warnings.warn(message, ReconstructionWarning, stacklevel=2)


def _refuse_foreign_leaves(value: Leaves, sources: Leaves) -> None:
    """Raise if the graph of `value` ends in a tensor that is not among `sources`: its gradient would vanish."""
    known = {id(source) for source in sources}
    for variable in graph_leaves(value):
        if id(variable) not in known:
            raise RuntimeError(
                f"f uses a tensor of shape {tuple(variable.shape)} ({variable.dtype}) that needs a gradient, or"
                " comes from one that does, but is neither in x nor a parameter of f: its gradient would be lost. Pass"
                " it in x, make f an nn.Module that owns it, or detach it"
            )


def refuse_unsuitable(f: Callable[[Any, Any], Any]) -> None:
    """Raise ValueError for modules that are not the same function in both passes, or whose gradient would be lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported where anything is sharded
    for name, module in f.named_modules() if isinstance(f, nn.Module) else ():
        # The common base of BatchNorm and InstanceNorm; batch statistics are also not the samples' own.
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if batch_norm or module.track_running_stats:
                raise ValueError(
                    f"f contains {type(module).__name__} in training mode (module {name!r}): every evaluation would"
                    " update its statistics. Use GroupNorm or LayerNorm inside the equilibrium, or put this module"
                    " into eval mode"
                )
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            raise ValueError(
                f"a part of f is a sharding unit of FSDP2 (module {name!r}, {type(module).__name__}): it would be"
                " gathered for every evaluation, and its gradient lost. Shard the module that owns f and the"
                " solver (fully_shard(equilibrium_layer)), or a parent of it"
            )
