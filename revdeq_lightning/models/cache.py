"""Keys and values of earlier tokens, kept for every evaluation of f.

A solve with a fixed number of steps is a deep causal network with shared weights: after each evaluation, the state of a
token depends only on earlier tokens, through their keys and values in the same evaluation. A cache with one slot per
attention and evaluation is therefore exact, and a new token costs a solve over one token, for any length of the prompt.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class KeyValueCache:
    """Keys, values, and other cached tensors of the tokens so far, one slot per call of `extend` in a pass.

    A pass is one run of the model over new tokens. Every pass makes the same calls in the same order (the layers of
    evaluation 1, those of evaluation 2, ...), so slots need no names. Memory for `context_length` tokens is
    allocated at the start, so nothing is copied as the text grows.

    Attributes:
        length: Number of tokens in the cache: the position of the next one.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.length = 0
        self._slots: list[tuple[Tensor, ...]] = []
        self._next_slot = 0

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append to the next slot along dimension -2 and return views of its contents."""
        num_new = new[0].shape[-2]
        if num_new > 1 and self.length:
            raise ValueError(f"a cache with tokens takes one new token at a time, got {num_new}")
        if self._next_slot == len(self._slots):
            if self.length:
                raise RuntimeError(
                    f"a pass used the cache more often than the first one, {len(self._slots)} times: "
                    "the cache needs a fixed number of evaluations"
                )
            self._slots.append(tuple(t.new_empty(*t.shape[:-2], self.context_length, t.shape[-1]) for t in new))
        slot = self._slots[self._next_slot]
        self._next_slot += 1
        end = self.length + num_new
        for stored, t in zip(slot, new, strict=True):
            stored[..., self.length : end, :] = t
        return tuple(stored[..., :end, :] for stored in slot)

    def bind(self, f: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        """`f(z, x)` whose evaluations use the slots of the cache in turn."""
        return lambda z, x: f(z, x, self)

    def end_pass(self, num_new: int) -> None:
        """Count the tokens of this pass as seen."""
        if self._next_slot != len(self._slots):
            raise RuntimeError(
                f"a pass used the cache {self._next_slot} times, the first one {len(self._slots)} times: "
                "the cache needs a fixed number of evaluations"
            )
        self._next_slot = 0
        self.length += num_new
