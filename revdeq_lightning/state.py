"""What modules and tensors hold: exchanged for a while, and changes of it noticed."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Place = tuple[dict[str, Any], str]
"""A namespace, such as the parameters of a module, and a name in it."""
_NOTHING = object()


@contextlib.contextmanager
def exchanged(exchanges: Iterable[tuple[Place, Any]]) -> Iterator[None]:
    """Within, the places have these values; afterwards what they had, if anything."""
    before = []
    try:
        for (space, name), value in exchanges:
            # Not `get`, which the parameters of TorchScript lack.
            before.append((space, name, space[name] if name in space else _NOTHING))  # noqa: SIM401
            space[name] = value
        yield
    finally:
        for space, name, value in before:
            space[name] = value
            if value is _NOTHING:
                del space[name]
        if not parametrize._cache_enabled:  # another thread has left `parametrize.cached()`
            parametrize._cache = {}


def parameter_places(modules: Iterable[nn.Module]) -> list[tuple[Tensor, list[Place]]]:
    """Their parameters, and where they keep them: tied ones in several places."""
    found: dict[int, tuple[Tensor, list[Place]]] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, []))[1].append((module._parameters, name))
    return list(found.values())


def versions(leaves: Iterable[Any]) -> list[int]:
    """How often each tensor was changed in place; see `counting`."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def counting(leaves: list[Any]) -> list[Any]:
    """In inference mode, the same memory as tensors that count their changes in place, as those made there do not."""
    if not torch.is_inference_mode_enabled():
        return leaves
    with torch.inference_mode(False):
        return [_alias(leaf) if isinstance(leaf, Tensor) and leaf.is_inference() else leaf for leaf in leaves]


def _alias(leaf: Tensor) -> Tensor:
    if type(leaf) is not Tensor or leaf.layout != torch.strided or leaf.is_conj() or leaf.is_neg():
        return leaf
    alias = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
    return alias.set_(leaf)  # type: ignore[call-overload,no-any-return]


class Turns:
    """A lock whose holder lends its turn to what was begun within it, in whatever thread that goes on.

    Autograd runs the backward pass in a thread of the device: where f takes a gradient through an equilibrium, that
    thread evaluates on behalf of the one that waits for it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: object = None
        self._of_this_thread: ContextVar[object] = ContextVar("turn", default=None)

    def current(self) -> object:
        """The turn that this thread has, to be given to `turn` by what is begun now."""
        return self._of_this_thread.get()

    @contextlib.contextmanager
    def turn(self, within: object) -> Iterator[None]:
        """Within the turn of this thread or `within`, if one of them lasts; otherwise wait for an own one."""
        running = self._running
        is_lent = running is not None and any(own is running for own in (within, self.current()))
        with contextlib.nullcontext() if is_lent else self._lock:
            if not is_lent:
                self._running = running = object()
            reset = self._of_this_thread.set(running)
            try:
                yield
            finally:
                self._of_this_thread.reset(reset)
                if not is_lent:
                    self._running = None
