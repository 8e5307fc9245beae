"""Storage for the remainders of the exact state: as many digits in radix q as evaluations were made."""

from collections.abc import Iterable
from functools import cached_property
from itertools import count
from math import log2

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..norms import Mask, broadcast_to_leaf

WORD_LIMIT = 2**52
_GROUP_TYPES = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))


class Remainders:
    """A stack of digits in [0, radix) for every element of a state.

    The digits of even and of odd pushes go to one word each, `word' = radix * word + digit`, a float64 that holds them
    as a whole number. While the words last (22 digits each for radix 5, 52 for radix 2, 17 for radix 8) the memory does
    not grow. When a word is full, its oldest digits are put aside as a small integer: three to a byte for radix 5,
    eight for radix 2, five to two bytes for radix 8, within 1.25x of log2(radix) bits a digit.
    """

    def __init__(self, words: Iterable[Tensor], spilled: Iterable[Tensor], radix: int, count: int) -> None:
        self.words, self.spilled, self.radix, self.count = list(words), list(spilled), radix, count
        self.digits_per_word = most_digits(radix, WORD_LIMIT)
        self.digits_per_group, self.group_type = digits_per_group(radix)
        self.group_unit = radix ** (self.digits_per_word - self.digits_per_group)
        """Weight in a full word of the youngest digit of the group that is put aside."""

    @classmethod
    def empty(cls, state: Tensor, radix: int) -> "Remainders":
        """An empty stack for a state of this shape."""
        return cls([torch.zeros_like(state), torch.zeros_like(state)], [], radix, 0)

    @cached_property
    def scratch(self) -> Tensor:
        """Working memory for the update, kept so that no evaluation allocates."""
        return torch.empty_like(self.words[0])

    def begin_push(self) -> Tensor:
        """The word on which the next digit goes, with room for it."""
        word, depth = self.words[self.count % 2], self.count // 2
        if self._word_is_full(depth):
            oldest = torch.div(word, divisor(self.group_unit, word)).floor_()
            word.sub_(oldest, alpha=self.group_unit)
            self.spilled.append(oldest.to(self.group_type))
        self.count += 1
        return word

    def begin_pop(self) -> int:
        """Index of the word on which the newest digit lies; `end_pop` follows when it is off."""
        self.count -= 1
        return self.count % 2

    def end_pop(self) -> None:
        """Fill the word up with what was put aside for this digit."""
        index, depth = self.count % 2, self.count // 2
        if self._word_is_full(depth):
            self.words[index].add_(self.spilled.pop(), alpha=self.group_unit)

    def push_(self, digits: Tensor, active: Mask = None) -> None:
        """Put one digit on the stack of every element of the active samples."""
        word = self.begin_push()
        if active is None:
            torch.add(digits, word, alpha=self.radix, out=word)
        else:
            torch.where(broadcast_to_leaf(active, word), digits.add(word, alpha=self.radix), word, out=word)

    def pop_(self, active: Mask = None) -> Tensor:
        """Take the newest digit of every element off its stack; inactive samples have none, and return 0."""
        index = self.begin_pop()
        word = self.words[index]
        shifted = torch.div(word, divisor(self.radix, word), out=self.scratch).floor_()
        if active is None:
            digits = word.sub_(shifted, alpha=self.radix)
            self.words[index], self.scratch = shifted, word
        else:
            mask = broadcast_to_leaf(active, word)
            digits = torch.where(mask, word.sub(shifted, alpha=self.radix), 0.0)
            self.words[index] = torch.where(mask, shifted, word)
        self.end_pop()
        return digits

    def _word_is_full(self, depth: int) -> bool:
        """Whether the word was full when its digit number `depth` was pushed."""
        return depth >= self.digits_per_word and (depth - self.digits_per_word) % self.digits_per_group == 0


def divisor(number: int, dividend: Tensor) -> Tensor:
    """The number beside `dividend`: by a plain one CUDA multiplies with its rounded inverse, and 49 * (1 / 49) < 1."""
    return dividend.new_full((), number)


def digits_per_group(radix: int) -> tuple[int, torch.dtype]:
    """How many digits are put aside together, and as what: the smallest integer that wastes no more than a fifth."""
    groups = [(most_digits(radix, limit), dtype) for dtype, limit in _GROUP_TYPES if limit >= radix]
    wasteful = [8 * dtype.itemsize / (digits * log2(radix)) for digits, dtype in groups]
    frugal = [group for group, waste in zip(groups, wasteful, strict=True) if waste <= 1.25]
    return frugal[0] if frugal else groups[wasteful.index(min(wasteful))]


def most_digits(radix: int, limit: int) -> int:
    """How many digits a whole number up to `limit` holds: the largest power of the radix that is not above it."""
    return next(digits for digits in count(1) if radix ** (digits + 1) > limit)


register_pytree_node(
    Remainders,
    lambda r: ([*r.words, *r.spilled], (r.radix, r.count)),
    lambda tensors, context: Remainders((r := list(tensors))[:2], r[2:], *context),
)
