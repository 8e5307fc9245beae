"""f as the solvers see it: on leaves instead of pytrees, checked, counted, and the same function at every call."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .norms import Leaves, Map
from .weights import ComputedWeights


class EquilibriumFunction:
    """`f(z, x)` as a function of the leaves of z, the same in every call of a solve.

    * One random state: every call draws the same numbers (one dropout mask), in the backward pass too.
    * The autocast state of the forward pass holds in every call. Under autocast the result may be of lower precision
      than the state, and is cast back; otherwise a changed shape, dtype or device is an error.
    * Weights that f computes from its parameters are computed once (in a compiled f, with every call).
    * `nfe` counts the calls.
    """

    def __init__(self, f: Map, z_leaves: Sequence[Tensor], z_spec: TreeSpec, x: Any) -> None:
        self.f, self.z_spec = f, z_spec
        self.x, self.x_spec = tree_flatten(x)
        self.expected = [_kind(z) for z in z_leaves]
        device = z_leaves[0].device
        self.device_type = device.type
        self.autocast_enabled = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)
        self.randomness = _Randomness(device)
        self.weights = ComputedWeights(None if is_compiled(f) else f)
        self.nfe = 0

    def __call__(self, z: Leaves) -> Leaves:
        """Evaluate f once."""
        self.nfe += 1
        z_tree, x_tree = tree_unflatten(z, self.z_spec), tree_unflatten(self.x, self.x_spec)
        with self._autocast(), self.weights.in_place(), self.randomness.same_draws():
            value = self.f(z_tree, x_tree)
        leaves, spec = tree_flatten(value)
        if spec != self.z_spec:
            raise ValueError(f"f must return the structure of the state, {self.z_spec}; it returned {spec}")
        return [self._checked(leaf, i) for i, leaf in enumerate(leaves)]

    def run_with(self, x: list[Any], parameters: dict[str, Tensor], weights: Leaves, run: Callable[[], Any]) -> Any:
        """`run()` with these leaves of x, parameters of f, and weights that f computes, in place of its own."""
        own = self.x, self.weights.values
        self.x, self.weights.values = x, weights
        try:
            return call_with_parameters(self.f, parameters, run)
        finally:
            self.x, self.weights.values = own

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

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        # Without the cache: a weight cast under no_grad would be handed to a later call that needs its gradient.
        if not self.autocast_enabled and not torch.is_autocast_enabled(self.device_type):
            return contextlib.nullcontext()
        cache = torch.is_grad_enabled() and torch.is_autocast_cache_enabled()
        return torch.autocast(self.device_type, self.autocast_dtype, self.autocast_enabled, cache_enabled=cache)


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "device": tensor.device}


class _Randomness:
    """Gives every call of f the random numbers of the first one."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.start: list[Tensor] | None = None
        self.is_drawn = False

    def _states(self) -> list[Tensor]:
        """Generator states of the CPU and of the state's device."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    @contextlib.contextmanager
    def same_draws(self) -> Iterator[None]:
        """Around a call of f: the first one shows whether f draws at all; only then are the later ones rewound."""
        if self.start is None:
            self.start = self._states()
            yield
            self.is_drawn = any(not torch.equal(a, b) for a, b in zip(self.start, self._states(), strict=True))
            return
        if self.is_drawn:
            torch.set_rng_state(self.start[0])
            for device, state in zip(self.devices, self.start[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
        yield

    def untouched(self) -> contextlib.AbstractContextManager[None]:
        """Around a backward pass: the generators are afterwards where they were."""
        return torch.random.fork_rng(self.devices, enabled=self.is_drawn)


def named_parameters(f: Map) -> dict[str, Tensor]:
    """Parameters of f by name; empty if f is no module."""
    return dict(f.named_parameters()) if isinstance(f, nn.Module) else {}


def is_compiled(f: Map) -> bool:
    """Whether torch.compile was applied to f or to a part of it."""
    if hasattr(f, "_torchdynamo_orig_callable"):
        return True
    return isinstance(f, nn.Module) and any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in f.modules()
    )


def call_with_parameters(f: Map, parameters: dict[str, Tensor], run: Callable[[], Any]) -> Any:
    """`run()` with these tensors in place of f's parameters."""
    if not parameters:
        return run()
    assert isinstance(f, nn.Module)
    around = nn.Module()  # `functional_call` runs a module: one that owns f, and runs
    around.f, around.forward = f, run
    return torch.func.functional_call(around, {f"f.{name}": tensor for name, tensor in parameters.items()}, ())


def evaluate_recorded(f: EquilibriumFunction, z: Leaves) -> tuple[Leaves, Leaves]:
    """Fresh leaves with the values of z, and f of them with autograd recording."""
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in z]
        return leaves, f(leaves)


def vector_jacobian_products(
    value: Leaves, sources: Leaves, weights: Leaves, *, retain_graph: bool = False, create_graph: bool = False
) -> list[Tensor | None]:
    """`weights^T d(value)/d(source)` for every source; None for one that does not enter."""
    outputs = [(v, w) for v, w in zip(value, weights, strict=True) if v.requires_grad]
    if not outputs:
        return [None] * len(sources)
    tensors, weights = (list(column) for column in zip(*outputs, strict=True))
    retain_graph |= create_graph
    settings = {"retain_graph": retain_graph, "create_graph": create_graph, "allow_unused": True}
    return list(torch.autograd.grad(tensors, sources, weights, **settings))


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
