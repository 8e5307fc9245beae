"""Storage for the remainders of the exact state: as many digits in radix q as evaluations were made."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .norms import broadcast_to_leaf

_PACKED_BYTES = 7


class Remainders:
    """A stack of digits in [0, radix) for every element of a state.

    The digits of even and of odd pushes go to one word each, `word' = radix * word + digit`, a float64 that holds them
    as a whole number. While the words last (22 digits each for radix 5, 52 for radix 2, 17 for radix 8) the memory does
    not grow; a full word is put aside as 7 bytes an element, within 1.25x of the log2(radix) bits a digit that
    exactness needs.
    """

    def __init__(self, words: Iterable[Tensor], spilled: Iterable[Tensor], radix: int, count: int) -> None:
        self.words = list(words)
        self.scratch = torch.empty_like(self.words[0])
        """Working memory for the update, kept so that no evaluation allocates."""
        self.spilled = list(spilled)
        self.radix = radix
        self.count = count
        self.digits_per_word = digits_per_word(radix)

    @classmethod
    def empty(cls, state: Tensor, radix: int) -> "Remainders":
        """An empty stack for a state of this shape."""
        return cls([torch.zeros_like(state), torch.zeros_like(state)], [], radix, 0)

    def push_(self, digits: Tensor, active: Tensor | None = None) -> None:
        """Put one digit on every element's stack; with `active`, shape `(batch,)`, on the active samples' only."""
        index, depth = self.count % 2, self.count // 2
        word = self.words[index]
        if depth and depth % self.digits_per_word == 0:
            self.spilled.append(_take_bytes_(word))
        if active is None:
            torch.add(digits, word, alpha=self.radix, out=word)
        else:
            torch.where(broadcast_to_leaf(active, word), digits.add(word, alpha=self.radix), word, out=word)
        self.count += 1

    def pop_(self, active: Tensor | None = None) -> Tensor:
        """Take the newest digit of every element off its stack; inactive samples have none, and return 0."""
        self.count -= 1
        index, depth = self.count % 2, self.count // 2
        word = self.words[index]
        num_spilled = (len(self.spilled) + 1 - index) // 2  # of this word: the two take turns
        if num_spilled > depth // self.digits_per_word:
            _put_bytes_(word, self.spilled.pop())
        shifted = torch.div(word, divisor(self.radix, word), out=self.scratch).floor_()
        if active is None:
            digits = word.sub_(shifted, alpha=self.radix)
            self.words[index], self.scratch = shifted, word
        else:
            mask = broadcast_to_leaf(active, word)
            digits = torch.where(mask, word.sub(shifted, alpha=self.radix), 0.0)
            self.words[index] = torch.where(mask, shifted, word)
        return digits


def divisor(number: int, dividend: Tensor) -> Tensor:
    """The number beside `dividend`: by a plain one CUDA multiplies with its rounded inverse, and 49 * (1 / 49) < 1."""
    return dividend.new_full((), number)


def digits_per_word(radix: int) -> int:
    """How many digits one word holds: `radix ** digits <= 2^52`."""
    digits = 1
    while radix ** (digits + 1) <= 2**52:
        digits += 1
    return digits


def _take_bytes_(word: Tensor) -> Tensor:
    """The low 7 bytes of each whole number, `(numel, 7)`; the word is zero afterwards. In place but for the result."""
    memory = _memory(word)
    memory.view(torch.int64).copy_(memory)
    taken = memory.view(torch.uint8).view(-1, 8)[:, :_PACKED_BYTES].clone()  # little-endian, as PyTorch's platforms are
    word.zero_()
    return taken


def _put_bytes_(word: Tensor, taken: Tensor) -> None:
    """Inverse of `_take_bytes_` on a word that is zero."""
    memory = _memory(word)
    memory.view(torch.uint8).view(-1, 8)[:, :_PACKED_BYTES] = taken
    memory.copy_(memory.view(torch.int64))


def _memory(word: Tensor) -> Tensor:
    """The elements in the order in which they lie in memory, whatever the layout."""
    return word.as_strided((word.numel(),), (1,))
