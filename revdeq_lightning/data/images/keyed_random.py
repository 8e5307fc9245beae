"""Random numbers that are a pure function of a key: stateless, identical on every device, worker, and rank."""

import zlib

import torch
from torch import Tensor

from revdeq_lightning.host import send


def uniform(keys: Tensor, seed: int, purpose: str, count: int, device: torch.device | None = None) -> Tensor:
    """`count` uniform numbers in [0, 1) for each key, float32 `(batch, count)`; sent to `device` if given.

    SplitMix64 seeded with (seed, key, purpose): the numbers of an item do not depend on the rest of the batch, and
    different purposes are independent.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    stream = torch.tensor(_signed(zlib.crc32(purpose.encode()) ^ (seed * _GOLDEN)), device=keys.device)
    state = _mix(keys + _mix(stream)).unsqueeze(1)
    steps = torch.arange(1, count + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _mix(state + steps)
    numbers = _shifted(bits, 40).to(torch.float32) * 2.0**-24  # exact
    return numbers if device is None else send(numbers, device)


def _signed(value: int) -> int:
    """The integer modulo 2^64 as a signed int64."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; the shift of int64 is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _FACTORS[0]
    value = (value ^ _shifted(value, 27)) * _FACTORS[1]
    return value ^ _shifted(value, 31)
