"""What modules and tensors hold: exchanged for a while, and changes of it noticed."""

import contextlib
from collections.abc import Iterable, Iterator
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
            before.append((space, name, space.get(name, _NOTHING)))
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
