"""A checksum of what f returned, to compare the evaluations of both passes one by one."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(leaves: Sequence[Tensor]) -> Tensor:
    """`sum_i w_i * bits_i` modulo 2^64 over all elements, 0-dim int64; each w_i is a product of random odd numbers.

    If one element changes, but for the sign of a zero, so does the checksum. Changes of several are missed by about 1
    in 2^60 choices of the random numbers, by 1 in 2^16 at the very worst (of signs alone); the choice is made once, and
    knows nothing of f.
    """
    total: Tensor | int = 0
    for number, leaf in enumerate(leaves):
        bits = (leaf.detach() + 0.0).view(_INTEGERS[leaf.element_size()])
        # Two changes of the highest of 64 bits would always cancel.
        halves = [bits] if leaf.element_size() < 8 else [bits >> 32, bits & 0xFFFFFFFF]
        for half, part in enumerate(halves):
            for dim in reversed(range(leaf.ndim)):  # of any layout, without a copy
                part = (part * _odd_numbers(part.shape[-1], dim, leaf.device)).sum(-1)
            total = total + part * _odd_numbers(2 * number + 2, 2**31, leaf.device)[2 * number + half]
    assert isinstance(total, Tensor)
    return total


@functools.lru_cache(maxsize=64)
def _odd_numbers(count: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) | 1).to(device)
