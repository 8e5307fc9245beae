"""Storage for the remainders of the exact state: for every element a stack of digits, as fields of bits."""

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node


class Remainders:
    """A stack of digits in [0, radix) for every element of a state.

    A digit is a field of `ceil(log2(radix))` bits, at most 1.29 times what it holds. The fields of an element follow
    each other without gaps: number `k` begins at bit `width * k` of its row of bytes, of which a new one is added when
    the last is full. Masks are not needed: a sample that has stopped has meaningless digits, and nobody uses them.
    """

    def __init__(self, rows: list[Tensor], width: int, count: int) -> None:
        self.rows, self.width, self.count = list(rows), width, count

    @classmethod
    def empty(cls, radix: int) -> "Remainders":
        """An empty stack."""
        return cls([], (radix - 1).bit_length(), 0)

    def place(self, bit: int) -> tuple[int, int]:
        """Row and first bit in it of bit `bit` of the next digit."""
        return divmod(self.width * self.count + bit, 8)

    def push(self, digits: Tensor) -> None:
        """Put one digit on every element's stack: the last `width` bits of whole numbers."""
        for bit in range(0, self.width, 8):  # a wider digit is several fields
            field = (digits if self.width <= 8 else digits.to(torch.int32) >> bit).to(torch.uint8)
            if self.width - bit < 8:
                field.bitwise_and_(2 ** (self.width - bit) - 1)
            index, offset = self.place(bit)
            if offset == 0:
                self.rows.append(field)
                continue
            self.rows[index].add_(field, alpha=2**offset)  # what is beyond the byte drops out
            if offset + min(8, self.width - bit) > 8:
                self.rows.append(field.bitwise_right_shift_(8 - offset))
        self.count += 1

    def pop(self) -> Tensor:
        """Take the newest digit off every element's stack: small integers."""
        self.count -= 1
        digits: Tensor | None = None
        for bit in range(0, self.width, 8):
            width = min(8, self.width - bit)
            index, offset = self.place(bit)
            field = self.rows[index] >> offset
            if offset + width > 8:
                field.add_(self.rows[index + 1], alpha=2 ** (8 - offset))
            if width < 8:
                field.bitwise_and_(2**width - 1)
            digits = field if digits is None else digits.to(torch.int32) + (field.to(torch.int32) << bit)
        self.forget()
        assert digits is not None
        return digits

    def forget(self) -> None:
        """Release the rows without a digit."""
        index, offset = self.place(0)
        del self.rows[index + (offset > 0) :]


register_pytree_node(
    Remainders,
    lambda remainders: (remainders.rows, (remainders.width, remainders.count)),
    lambda rows, context: Remainders(list(rows), *context),
)
