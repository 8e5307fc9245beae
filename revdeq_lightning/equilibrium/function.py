"""f as the solvers see it: on leaves instead of pytrees, checked, counted, and the same function at every call."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..state import Place, Turns, counting, exchanged, parameter_places, versions
from ..transforms import has_numbers, is_functorch
from .checks import is_capturing
from .norms import Leaves, Map

Edges = list[GradientEdge | None]
"""Where the graphs of tensors begin; None for one that needs no gradient."""


class EquilibriumFunction:
    """`f(z, x)` as a function of the leaves of z, the same in every call of a solve.

    * One random state: every call draws the same numbers (one dropout mask), in the backward pass too.
    * The autocast state of the forward pass holds in every call. Under autocast the result may be of lower precision
      than the state, and is cast back; otherwise a changed shape, dtype or device is an error.
    * Weights that f computes from its parameters are computed once (in a compiled f, with every call), which also keeps
      spectral normalization in training mode, whose estimate moves with every access, the same map.
    * f may work in place on z: it then gets copies. On x that is an error.
    * `nfe` counts the calls.
    """

    def __init__(self, f: Map, z_leaves: Sequence[Tensor], z_spec: TreeSpec, x: Any) -> None:
        self.f, self.z_spec = f, z_spec
        x_leaves, self.x_spec = tree_flatten(x)
        self.x = counting(x_leaves)
        if any(isinstance(module, LazyModuleMixin) and module.has_uninitialized_params() for module in modules(f)):
            with torch.no_grad():
                f(tree_unflatten(z_leaves, z_spec), x)  # gives them their shapes
        self.expected = [_kind(z) for z in z_leaves]
        device = z_leaves[0].device
        self.device_type = device.type
        self.autocast_enabled = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.randomness = _Randomness(f, device)
        self.parameters: list[tuple[Place, Tensor]] = []  # in place of f's own
        is_eager = not is_compiled(f)  # otherwise f would also be compiled for copies of z
        self.overwrites_z: bool | None = None if is_eager else False  # None: the first call shows
        self.computing = [m for m in modules(f) if is_eager and isinstance(m, parametrize.ParametrizationList)]
        self.within = _TURNS.current()
        with _TURNS.turn(self.within):  # while no other thread has its own tensors there
            self.places = parameter_places(modules(f))
            self.weights: list[Tensor] = [module() for module in self.computing]
        self.nfe = 0

    def __call__(self, z: Leaves) -> Leaves:
        """Evaluate f once."""
        self.nfe += 1
        x = self.x
        if is_uncounted := is_functorch():
            x = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in x]
        if is_uncounted or self.overwrites_z is not False:
            z = [leaf.clone() for leaf in z]
        z = counting(z)
        if self._keeps_casts:
            z = [leaf.view_as(leaf) for leaf in z]  # autocast would keep what it makes of a leaf, too
        before = versions(z), versions(x)
        exchanges = [*self.parameters, *self._weights_in_place()]
        may_interfere = exchanges or self.randomness.may_be_drawn or torch.is_grad_enabled()
        alone = _TURNS.turn(self.within) if may_interfere else contextlib.nullcontext()
        with self._autocast(), alone, exchanged(exchanges), self.randomness.same_draws():
            value = self.f(tree_unflatten(z, self.z_spec), tree_unflatten(x, self.x_spec))
        is_overwritten = not is_uncounted and versions(z) != before[0]
        if (is_overwritten and self.overwrites_z is False) or (not is_uncounted and versions(x) != before[1]):
            raise RuntimeError(
                f"f changes its {'z' if is_overwritten else 'x'} in place (evaluation {self.nfe}), which later ones"
                " need: use inplace=False in its modules, or let f work on a copy, x.clone()"
            )
        self.overwrites_z = is_overwritten or bool(self.overwrites_z)
        leaves, spec = tree_flatten(value)
        if spec != self.z_spec:
            raise ValueError(f"f must return the structure of the state, {self.z_spec}; it returned {spec}")
        return [self._checked(leaf, i) for i, leaf in enumerate(leaves)]

    def _weights_in_place(self) -> list[tuple[Place, Any]]:
        own = zip(self.computing, self.weights, strict=True)
        forwards = [((vars(m), "forward"), partial(_computed, get_ident(), m, weight)) for m, weight in own]
        # Under `parametrize.cached()` a weight made under no_grad would be handed to a later call.
        return [((vars(parametrize), "_cache"), {}), *forwards] if forwards else []

    def _checked(self, leaf: Any, i: int) -> Tensor:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"f must return tensors like the state; leaf {i} is a {type(leaf).__name__}")
        expected = self.expected[i]
        if self.autocast_enabled and leaf.is_floating_point():
            leaf = leaf.to(expected["dtype"])  # exact if the state is the wider one
        for name, received in _kind(leaf).items():
            if received != (wanted := expected[name]):
                raise ValueError(
                    f"f must keep the state's {name}: it received {wanted} and returned {received} (leaf {i});"
                    f" change f or the {name} of z0"
                )
        return leaf  # type: ignore[no-any-return]

    @property
    def _keeps_casts(self) -> bool:
        # Not without gradients: a weight cast there would be handed to a later call that needs its gradient.
        return self.autocast_enabled and self.autocast_cache and torch.is_grad_enabled()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.autocast_enabled and not torch.is_autocast_enabled(self.device_type):
            return contextlib.nullcontext()
        settings = self.autocast_dtype, self.autocast_enabled, self._keeps_casts
        return torch.autocast(self.device_type, *settings)

    def casts_kept(self) -> contextlib.AbstractContextManager[Any]:
        """Around many calls: autocast casts each weight once, as it forgets them only at the end of this."""
        if not self.autocast_enabled:
            return contextlib.nullcontext()
        settings = torch.get_autocast_dtype(self.device_type), torch.is_autocast_enabled(self.device_type)
        return torch.autocast(self.device_type, *settings, torch.is_autocast_cache_enabled())


_TURNS = Turns()
"""Threads may share f: where its weights are exchanged or random numbers rewound, they wait for one another."""


def _computed(thread: int, module: nn.Module, weight: Tensor) -> Tensor:
    """What a parametrized weight is: in other threads, as ever."""
    return weight if get_ident() == thread else type(module).forward(module)


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "device": tensor.device}


_DRAWING: WeakSet[Any] = WeakSet()
"""Modules that drew random numbers when they were last asked."""


class _Randomness:
    """Gives every call of f the random numbers of the first one."""

    def __init__(self, f: Map, device: torch.device) -> None:
        self.f, self.device = f, device
        self.devices = [device] if device.type == "cuda" else []
        self.start: list[Tensor] | None = None
        self.may_be_drawn = True

    def _states(self) -> list[Tensor]:
        """Generator states of the CPU and of the state's device."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    @contextlib.contextmanager
    def same_draws(self) -> Iterator[None]:
        """Around a call of f: the first shows whether f draws; if so, later ones are rewound, and leave no trace."""
        if self.start is None and is_capturing(self.device):  # when generators cannot be asked
            self.start, self.may_be_drawn = [], False
            if self.f in _DRAWING:
                raise RuntimeError("f draws random numbers (dropout): a CUDA graph of the solve would have other masks")
        if self.start is None:
            self.start = self._states()
            yield
            pairs = zip(self.start, self._states(), strict=True)
            self.may_be_drawn = has_numbers(torch.empty(0)) and any(not torch.equal(a, b) for a, b in pairs)
            if isinstance(self.f, nn.Module):
                (_DRAWING.add if self.may_be_drawn else _DRAWING.discard)(self.f)
            return
        with torch.random.fork_rng(self.devices) if self.may_be_drawn else contextlib.nullcontext():
            if self.may_be_drawn:
                torch.set_rng_state(self.start[0])
                for device, state in zip(self.devices, self.start[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            yield


def modules(f: Map) -> list[nn.Module]:
    """All modules of f; none if f is no module."""
    return list(f.modules()) if isinstance(f, nn.Module) else []


def is_compiled(f: Map) -> bool:
    """Whether torch.compile was applied to f or to a part of it."""
    return hasattr(f, "_torchdynamo_orig_callable") or any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules(f)
    )


def evaluate_recorded(f: EquilibriumFunction, z: Leaves) -> tuple[Leaves, Leaves]:
    """Fresh leaves with the values of z, and f of them with autograd recording."""
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in z]
        return leaves, f(leaves)


def edges_of(value: Leaves) -> Edges:
    """The tensors' gradient edges, which keep the graph alive but not the tensors."""
    return [get_gradient_edge(v) if v.requires_grad else None for v in value]


def vector_jacobian_products(
    value: Leaves | Edges, sources: Leaves, weights: Leaves, *, retain_graph: bool = False, create_graph: bool = False
) -> list[Tensor | None]:
    """`weights^T d(value)/d(source)` for every source; None for one that does not enter."""
    outputs = [(v, w) for v, w in zip(value, weights, strict=True) if _needs_gradient(v)]
    if not outputs:
        return [None] * len(sources)
    tensors, weights = (list(column) for column in zip(*outputs, strict=True))
    keep = {"retain_graph": retain_graph or create_graph, "create_graph": create_graph}
    return list(torch.autograd.grad(tensors, sources, weights, allow_unused=True, **keep))


def _needs_gradient(value: Tensor | GradientEdge | None) -> bool:
    return value.requires_grad if isinstance(value, Tensor) else value is not None


def graph_leaves(value: Leaves | Edges) -> Iterator[Tensor]:
    """The tensors in which the graph of `value` ends: parameters and inputs that need a gradient."""
    seen: set[Any] = {None}
    stack: list[Any] = [v.grad_fn if isinstance(v, Tensor) else v and v.node for v in value]
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            if (variable := getattr(node, "variable", None)) is not None:
                yield variable
            stack.extend(parent for parent, _ in node.next_functions)
