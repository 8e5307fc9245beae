"""Peak memory of one training step by depth: of the tensors, and of a fresh process."""

from collections.abc import Callable, Iterator
from math import ceil, log2
from typing import Any, NamedTuple

import torch

from benchmarks.core.problems import Member, attention_problem, bptt_step, momentum, revdeq, reversible_step
from benchmarks.measure import peak_tensor_bytes, process_peak_bytes

BASE_STEPS = 4
STEPS = (2, 4, 8, 16, 22, 32, 34, 52, 64, 96, 128)


class Shape(NamedTuple):
    """Size of the block and of its state."""

    tokens: int
    dim: int

    @property
    def num_elements(self) -> int:
        return self.tokens * self.dim


class Promise(NamedTuple):
    """Memory grows by the remainders alone, digits in radix `radix`."""

    member: Member
    radix: int

    @property
    def bits(self) -> float:
        """Bits per element and evaluation that exactness requires."""
        return log2(self.radix)

    def digit_bytes(self, evaluations: int) -> int:
        """Bytes of an element that the digits of so many evaluations take."""
        return ceil(evaluations * ceil(self.bits) / 8)


PROMISES = (Promise(revdeq(0.8), 5), Promise(revdeq(0.5), 2), Promise(momentum(1 / 8), 8))


def measure(quick: bool) -> list[dict[str, Any]]:
    """All rows; `growth_bits`: bytes above those at N = 4, in bits per state element and evaluation."""
    shape = Shape(32, 16) if quick else Shape(1024, 128)
    steps = (4, 8) if quick else STEPS
    rows: list[dict[str, Any]] = []
    for promise in PROMISES[: 1 if quick else None]:
        rows += _curve(promise.member, "reversible exact", steps, shape)
    rows += _curve(revdeq(0.8), "stored BPTT", steps, shape)
    if not quick:
        rows += _curve(revdeq(0.8), "checkpointed BPTT", steps, shape)
    return rows


def _curve(member: Member, method: str, steps: tuple[int, ...], shape: Shape) -> Iterator[dict[str, Any]]:
    peaks = {}
    for n in steps:
        training_step(member, method, BASE_STEPS, shape)()  # exclude what torch allocates once and keeps
        peaks[n] = peak_tensor_bytes(training_step(member, method, n, shape))
    process_peaks = {
        n: process_peak_bytes(warm_training_step, member, method, n, shape, threads=torch.get_num_threads())
        for n in steps
    }
    base = max(process_peaks[BASE_STEPS], 1)  # a process in the tiny sizes of a smoke run may not grow at all
    for n in steps:
        evaluations = n * member.evaluations_per_step
        growth_bits = 8 * (peaks[n] - peaks[BASE_STEPS]) / shape.num_elements / evaluations
        yield {
            "method": method,
            "solver": member.label,
            "steps": n,
            "evaluations": evaluations,
            "tensor_bytes": peaks[n],
            "tensor_ratio": round(peaks[n] / peaks[BASE_STEPS], 4),
            "growth_bits": round(growth_bits, 3),
            "process_bytes": process_peaks[n],
            "process_ratio": round(process_peaks[n] / base, 4),
            "state_elements": shape.num_elements,
        }


def training_step(member: Member, method: str, num_steps: int, shape: Shape) -> Callable[[], Any]:
    """Create the measured step and its inputs, before the measurement starts."""
    problem = attention_problem(1, shape.tokens, shape.dim, 4)
    if method == "reversible exact":
        return reversible_step(problem, member, num_steps, "exact")
    return bptt_step(problem, member, num_steps, checkpoint=method == "checkpointed BPTT")


def warm_training_step(member: Member, method: str, num_steps: int, shape: Shape) -> Callable[[], Any]:
    """The same in a fresh process; a tiny step loads the libraries first, so that they do not count."""
    training_step(member, method, 1, Shape(8, shape.dim))()
    return training_step(member, method, num_steps, shape)
