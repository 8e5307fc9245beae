"""The reversible adjoint: runs the solver backwards, so that no iterate is stored.

For the two-step family, from g_cur = dL/du_K, g_prev = 0, and for k = K-1 .. 0 with (u_k, u_{k+1}) at hand:

    v = f(u_k, x), evaluated once, with grad: it gives u_{k-1} by the inverse and the products with b * g_cur
    g_cur, g_prev = g_prev + c * g_cur + b * (df/du)^T g_cur,   a * g_cur

and the products for x and the parameters are added up. At the end dL/dz_0 = g_cur + g_prev, as u_0 and u_{-1} both are
z_0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...state import exchanged
from ...transforms import is_functorch, is_transformed, outside_of_compilers
from ..checks import Waiting, check_later, own_checks
from ..function import (
    Edges,
    EquilibriumFunction,
    edges_of,
    evaluate_recorded,
    is_compiled,
    vector_jacobian_products,
)
from ..loop import Iteration, iterate_to_fixed_point
from ..norms import Leaves, select
from ..solution import SolverStats
from ..solvers.base import AbstractSolver
from ..solvers.reversible import AbstractTwoStepSolver, TwoStepState
from ..validation import require_choice, require_count
from .backprop import BackpropAdjoint
from .base import AbstractAdjoint, Policy, report
from .checksum import checksum
from .refusals import refuse_foreign_leaves, refuse_unsuitable

Mismatch = Policy | Literal["trace"]


class ReconstructionWarning(UserWarning):
    """The backward pass did not come back to the initial state: its gradient is not that of the forward pass."""


class ReconstructionError(RuntimeError):
    """Raised instead of `ReconstructionWarning` if the policy is "raise"."""


@dataclass(frozen=True, kw_only=True)
class ReversibleAdjoint(AbstractAdjoint):
    """Gradient by reconstruction: exact with arithmetic "exact", without stored activations.

    Supports `ReversibleSolver` and `MomentumSolver`. f must be the same function in both passes: after each backward
    pass the reconstructed initial state is compared with the true one, bit for bit, and the elements that differ are
    counted in `stats.reconstruction_mismatch`. With arithmetic "exact" a difference means that f was not the same
    function (dropout outside torch's generators, data changed in place, another kernel); with "float64" and "float32"
    there always is one. Every tensor that f uses and that needs a gradient must be a parameter of f, in x, or z0.
    Within `torch.func` and in forward mode it is `BackpropAdjoint`, with the same gradient and its memory.

    `stored_evaluations` is a dial between memory and time. What an evaluation stores need not be reconstructed: the
    certificate then is about the others. Each takes one more evaluation of f off the backward pass and keeps its
    activations until then. With all of them stored this is `BackpropAdjoint()`, whose memory may be less by a state for
    each evaluation.

    Args:
        mismatch: With arithmetic "exact", what to do when elements differ: "warn", "raise" or "ignore"; or "trace", to
            compare checksums of every evaluation too, of 8 bytes each. It raises with the number of the evaluation
            that differed first, also where differences cancel, and counts such evaluations as mismatches.
        forward_with_grad: Whether the forward pass records f for autograd too (and drops the record), so that both
            passes run the same kernels. None: where these are known to depend on it, which is on GPUs, under autocast,
            and where torch.compile is found in f.
        stored_evaluations: How many of the last evaluations keep their activations, at least 0; all if there are fewer.
            Needs a solver without a tolerance.
    """

    mismatch: Mismatch = "warn"
    forward_with_grad: bool | None = None
    stored_evaluations: int = 0

    def __post_init__(self) -> None:
        require_choice("mismatch", self.mismatch, (*get_args(Policy), "trace"))
        require_count("stored_evaluations", self.stored_evaluations, at_least=0)

    def check(self, solver: AbstractSolver) -> None:
        if not isinstance(solver, AbstractTwoStepSolver):
            raise ValueError(
                f"ReversibleAdjoint cannot run {type(solver).__name__} backwards: use ReversibleSolver or"
                " MomentumSolver, or BackpropAdjoint, ImplicitAdjoint or PhantomAdjoint"
            )
        if self.stored_evaluations and solver.has_tolerance:
            raise ValueError(
                f"stored_evaluations={self.stored_evaluations} needs a solver without a tolerance, got {solver}: which"
                " evaluation is the last would not be known. Set it, or rtol and atol, to 0"
            )

    def solve(self, f: EquilibriumFunction, z0: Leaves, solver: AbstractSolver) -> tuple[Leaves, SolverStats]:
        assert isinstance(solver, AbstractTwoStepSolver)
        refuse_unsuitable(f.f)
        if is_transformed():
            return BackpropAdjoint().solve(f, z0, solver)
        of_x = {i: leaf for i, leaf in enumerate(f.x) if isinstance(leaf, Tensor)}
        inputs = (*z0, *of_x.values(), *(own for own, _ in f.places), *f.weights)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
            iteration = iterate_to_fixed_point(solver, f, z0)
            refuse_foreign_leaves(f, iteration.value, [], iteration.value)
            return iteration.value, iteration.stats
        if f.device_type == "cuda" and torch.backends.cudnn.benchmark and solver.is_exact:
            raise ValueError(
                "torch.backends.cudnn.benchmark=True may choose other kernels in the backward pass, whose gradient"
                " would not be exact: set it to False (trainer.benchmark=false), or use arithmetic='float64'"
            )
        f.x = [None if i in of_x else leaf for i, leaf in enumerate(f.x)]
        solve = _Solve(self, f, solver, len(z0), list(of_x))
        return list(_ReversibleFunction.apply(solve, *inputs)), solve.iteration.stats


class _Evaluation(NamedTuple):
    """`value = f(z)` as autograd recorded it (of a stored one the edges), and the inputs that it was recorded with."""

    z: Leaves
    value: Leaves | Edges
    inputs: Leaves


@dataclass
class _Solve:
    """What a solve hands from its forward to its backward pass, besides the tensors that autograd saves."""

    adjoint: ReversibleAdjoint
    f: EquilibriumFunction  # without the tensors in x: they are among the inputs
    solver: AbstractTwoStepSolver
    num_leaves: int
    positions: list[int]  # of the tensors among the leaves of x
    checks: Waiting = field(default_factory=own_checks)  # of this thread: the backward pass may run in another
    iteration: Iteration = field(init=False)  # without its value and its state, of which autograd saves the tensors
    stored: list["_Evaluation"] = field(default_factory=list)  # the last ones, oldest first
    trace: list[Tensor] = field(default_factory=list)  # checksums of the others

    def leaves(self, inputs: Sequence[Tensor], needs_grad: Sequence[bool]) -> Leaves:
        """The inputs cut off from the graph that made them. Parameters that f still has stay in place if possible."""
        first = len(inputs) - len(self.f.places) - len(self.f.weights)
        leaves = [t.detach().requires_grad_(needed) for t, needed in zip(inputs, needs_grad, strict=True)]
        for i, (own, places) in enumerate(self.f.places, first):
            is_there = inputs[i] is own and all(name in space and space[name] is own for space, name in places)
            if is_there and own.is_leaf and not own._backward_hooks and own.requires_grad == needs_grad[i]:
                leaves[i] = own
        return leaves

    def run_with(self, inputs: Sequence[Tensor], run: Callable[[], Any]) -> Any:
        """`run()` with x, the parameters and the computed weights from the flat inputs."""
        rest = iter(inputs[self.num_leaves :])
        x = [next(rest) if i in self.positions else leaf for i, leaf in enumerate(self.f.x)]
        pairs = [(own, places, next(rest)) for own, places in self.f.places]
        parameters = [(place, tensor) for own, places, tensor in pairs if tensor is not own for place in places]
        new = {"x": x, "parameters": parameters, "weights": list(rest)}
        with exchanged(((vars(self.f), name), value) for name, value in new.items()), self.f.casts_kept():
            return run()


class _ReversibleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: _Solve, *inputs: Tensor) -> tuple[Tensor, ...]:
        f, z0, adjoint = solve.f, list(inputs[: solve.num_leaves]), solve.adjoint
        num_stored = min(adjoint.stored_evaluations, solve.solver.num_evaluations)
        chooses_kernels = is_compiled(f.f) or f.autocast_enabled or f.device_type != "cpu"
        recorded = chooses_kernels if adjoint.forward_with_grad is None else adjoint.forward_with_grad
        leaves = solve.leaves(inputs, ctx.needs_input_grad[1:]) if recorded or num_stored else list(inputs)

        def evaluate(z: Leaves) -> Leaves:
            is_stored = f.nfe >= solve.solver.num_evaluations - num_stored
            if recorded or is_stored:
                iterate, value = evaluate_recorded(f, z)  # as in the backward pass
                if is_stored:
                    solve.stored.append(_Evaluation(iterate, edges_of(value), leaves))
                value = [v.detach() for v in value]
            else:
                value = f(z)
            if adjoint.mismatch == "trace" and not is_stored:
                solve.trace.append(checksum(value))
            return value

        iteration = solve.run_with(
            leaves,
            lambda: iterate_to_fixed_point(solve.solver, evaluate, z0, reversible=True, num_kept=num_stored),
        )
        # There may be none to undo.
        unsaved: dict[str, Any] = {"dtypes": [], "extremes": [], "decoded": [], "decoded_before": []}
        state = iteration.state._replace(**unsaved) if iteration.num_evaluations else ()
        state_tensors, ctx.state_spec = tree_flatten(state)
        ctx.solve = solve
        solve.iteration = iteration._replace(state=None, value=[])
        # By autograd's own saving: so hooks (checkpoint, offloading) see it, and changes of an input are noticed.
        ctx.save_for_backward(*inputs, *state_tensors)
        return tuple(iteration.value)

    @staticmethod
    @outside_of_compilers
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        solve: _Solve = ctx.solve
        solve.adjoint.refuse_double_backward()
        solve.adjoint.refuse_transforms(is_functorch())
        if solve.iteration.factor is not None:
            grads = tuple(g * solve.iteration.factor for g in grads)
        saved = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[1:]
        inputs, state_tensors = solve.leaves(saved[: len(needs_grad)], needs_grad), list(saved[len(needs_grad) :])
        if keep_graph := torch._C._autograd._get_current_graph_task_keep_graph():
            state_tensors = [t if t is None else t.clone() for t in state_tensors]  # they are overwritten
        state = tree_unflatten(state_tensors, ctx.state_spec)
        state = state and state._replace(dtypes=[z.dtype for z in inputs[: solve.num_leaves]])
        return None, *solve.run_with(inputs, _BackwardPass(solve, state, inputs, grads, keep_graph).run)


class _BackwardPass:
    """Undoes every evaluation, newest first, and adds up the gradients of x and the parameters."""

    def __init__(
        self, solve: _Solve, state: TwoStepState, inputs: Leaves, grads: Sequence[Tensor], keep_graph: bool
    ) -> None:
        self.solve, self.solver, self.f, self.state, self.inputs = solve, solve.solver, solve.f, state, inputs
        self.stored, self.keep_graph = list(solve.stored) if keep_graph else solve.stored, keep_graph
        # Both are carried times b, so that they are the products' weights as they stand, in float32 at least.
        self.g_current = [self.solver.recurrence.b * g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
        self.g_previous = [torch.zeros_like(g) for g in self.g_current]
        self.differentiated = [i for i, leaf in enumerate(inputs) if i >= solve.num_leaves and leaf.requires_grad]
        self.sums: dict[int, Tensor] = {}
        self.nfe, self.is_known = 0, False
        self.differs: list[Tensor] = []  # by the trace, newest evaluation first

    def run(self) -> list[Tensor | None]:
        """The gradients of the inputs."""
        if self.solver.has_tolerance:
            self._undo_the_steps_of_each_sample()
        else:
            self._undo_all_steps()
        self.solve.iteration.stats.backward_nfe = self.nfe
        self._certify()
        for i, (g, h) in enumerate(zip(self.g_current, self.g_previous, strict=True)):
            self.sums[i] = (g + h).div_(self.solver.recurrence.b)
        return [
            self.sums[i].to(leaf.dtype) if leaf.requires_grad and i in self.sums else None
            for i, leaf in enumerate(self.inputs)
        ]

    def _undo_all_steps(self) -> None:
        while self.stored:  # newest first, each freed when its gradient is known
            self._carry(self._differentiate(self.stored.pop(), self.g_current, self.keep_graph))
        for k in reversed(range(self.solve.iteration.num_evaluations)):
            self._undo(k)

    # A call for each evaluation, so that its tensors are released before the next one.

    def _undo(self, k: int) -> None:
        value, products = self._evaluate(k, self.solver.iterate_before(self.state, None), self.g_current)
        self.state = self.solver.invert_step(self.state, value, None)
        self._carry(products)

    def _carry(self, products: list[Tensor | None]) -> None:
        self.g_current, self.g_previous = self.solver.carry_(self.g_previous, self.g_current, products)

    def _undo_the_steps_of_each_sample(self) -> None:
        """With a tolerance: each sample waits, its gradient held, until the evaluation at which it stopped."""
        solver, num_steps = self.solver, self.solve.iteration.stats.num_steps
        num_evaluations = int(num_steps.max()) * solver.evaluations_per_step
        nobody = torch.zeros_like(num_steps, dtype=torch.bool)
        # The host looks only every few steps: after the last sample's stop there may be evaluations that moved nothing.
        for _ in range(num_evaluations, self.solve.iteration.num_evaluations):
            self.state = solver.invert_step(self.state, solver.iterate_before(self.state, nobody), nobody)
        for k in reversed(range(num_evaluations)):
            self._undo_of_active(k, num_steps > k // solver.evaluations_per_step)

    def _undo_of_active(self, k: int, active: Tensor) -> None:
        solver, previous, current = self.solver, self.g_previous, self.g_current
        weights = select(active, current, [torch.zeros_like(g) for g in current])
        value, products = self._evaluate(k, solver.iterate_before(self.state, active), weights)
        self.state = solver.invert_step(self.state, value, active)
        carried = solver.carry_([g.clone() for g in previous], [g.clone() for g in current], products)
        # A sample that had stopped still entered the evaluation, and the others' results if f mixes samples.
        held = [
            g if product is None else g.add(product, alpha=solver.recurrence.b)
            for g, product in zip(current, products, strict=True)
        ]
        self.g_current, self.g_previous = select(active, carried[0], held), select(active, carried[1], previous)

    def _evaluate(self, k: int, iterate: Leaves, g: Leaves) -> tuple[Leaves, list[Tensor | None]]:
        """Evaluation k again, `v = f(iterate, x)`, and `(dv/du)^T g`; the products for everything else go to `sums`."""
        self.nfe += 1
        iterate, value = evaluate_recorded(self.f, iterate)
        products = self._differentiate(_Evaluation(iterate, value, self.inputs), g)
        if self.solve.trace:
            self.differs.append(checksum(value) != self.solve.trace[k])
        return [v.detach() for v in value], products

    def _differentiate(self, evaluation: _Evaluation, g: Leaves, keep_graph: bool = False) -> list[Tensor | None]:
        z, value, inputs = evaluation
        sources = [*z, *(inputs[i] for i in self.differentiated)]
        if not self.is_known:
            refuse_foreign_leaves(self.f, value, sources, z)
            self.is_known = True
        weights = [w.to(u.dtype) for w, u in zip(g, z, strict=True)]
        products = vector_jacobian_products(value, sources, weights, retain_graph=keep_graph)
        for i, product in zip(self.differentiated, products[len(z) :], strict=True):
            if product is not None and i in self.sums:
                self.sums[i].add_(product)
            elif product is not None:
                # float32 at least: sums of many small contributions lose them in fewer bits.
                self.sums[i] = product.to(torch.promote_types(product.dtype, torch.float32), copy=True)
        return products[: len(z)]

    def _certify(self) -> None:
        """Compare the reconstructed initial state with the true one."""
        z0, policy = self.inputs[: self.solve.num_leaves], self.solve.adjoint.mismatch
        nothing = torch.zeros((), dtype=torch.int64, device=z0[0].device)
        mismatch = self.solver.reconstruction_mismatch(self.state, z0) if self.state else nothing
        counts = torch.stack([mismatch, *self.differs])
        self.solve.iteration.stats.reconstruction_mismatch = counts.sum()
        # Floating-point states never come back exactly, whatever f does; nor do those that diverged.
        if policy == "ignore" or not self.solver.is_exact:
            return
        if (factor := self.solve.iteration.factor) is not None:
            counts = counts.masked_fill(factor.isnan(), 0)
        total = 2 * sum(z.numel() for z in z0)
        check_later(counts, partial(_report, policy, total), self.solve.checks)


def _report(policy: Mismatch, total: int, counts: list[int]) -> None:
    count, *differs = counts
    if count or any(differs):
        first = f" (first in evaluation {len(differs) - differs.index(1)})" if any(differs) else ""
        message = (
            f"this gradient is not exact: {count} of {total} elements of the reconstructed initial state differ, so f"
            f" was not the same function in the forward and the backward pass{first}. Look for random numbers that"
            " torch's generators do not make, buffers that f updates, data changed in place, and kernels chosen again"
            " (a part of f under torch.compile: ReversibleAdjoint(forward_with_grad=True))"
        )
        report("raise" if policy == "trace" else policy, message, ReconstructionWarning, ReconstructionError)
