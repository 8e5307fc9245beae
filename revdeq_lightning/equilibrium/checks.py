"""Checks of numbers that the device may still be computing.

On a CPU they are made at once. On a GPU to look at a number is to wait for all that comes before it: there the numbers
are copied to the host behind the computation, and read where the host may wait,

    settle_checks()        # once a training step, before the optimizer moves the weights: one wait for all

or, without waiting, by the next solve for which they have arrived. What fails raises there. Until then a value that
failed its check is NaN. While a CUDA graph is captured nothing is copied: NaN, and `stats` after a replay, must do.
"""

import atexit
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Judge = Callable[[list[Any]], None]
"""Given the numbers; raises, warns, or notes the error in a list of its own."""


def host_must_wait(device: torch.device) -> bool:
    """Whether looking at a number on this device means waiting for the device."""
    return device.type != "cpu"


def is_capturing(device: torch.device) -> bool:
    """Whether the operations on this device are recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Checks:
    """Numbers that were not looked at yet, oldest first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, torch.Event | None, Judge]] = deque()

    def later(self, numbers: Tensor, judge: Judge) -> None:
        """Call `judge(numbers.tolist())`, now on a CPU, otherwise as soon as the numbers are known."""
        if not host_must_wait(numbers.device):
            judge(numbers.tolist())
        elif not is_capturing(numbers.device):
            on_host = numbers.detach().to("cpu", non_blocking=True)  # into pinned memory
            ready = None if numbers.device.type == "cpu" else torch.Event(numbers.device)
            if ready is not None:
                ready.record()
            self._waiting.append((on_host, ready, judge))

    def settle(self, *, wait: bool = True) -> None:
        """Judge all numbers, those not known yet after waiting for them; if one raises, the next call goes on there."""
        for _, ready, _ in reversed(self._waiting) if wait else ():
            if ready is not None and not ready.query():
                ready.synchronize()  # the newest first: then the others are there
        while self._waiting and (wait or _is_known(self._waiting[0][1])):
            on_host, _, judge = self._waiting.popleft()
            judge(on_host.tolist())


def _is_known(ready: torch.Event | None) -> bool:
    return ready is not None and not is_capturing(ready.device) and ready.query()


class _Own(threading.local):
    def __init__(self) -> None:
        self.checks = Checks()


_own = _Own()


def own_checks() -> Checks:
    """Those of this thread. A backward pass runs in another one on a GPU: it is given those of its forward pass."""
    return _own.checks


def check_later(numbers: Tensor, judge: Judge) -> None:
    """Call `judge` with the numbers, flat: at once on a CPU, otherwise when `settle_checks` reads them with all others.

    So that whoever trains needs no wait of its own for its loss and gradient.
    """
    own_checks().later(numbers.flatten(), judge)


def settle_checks() -> None:
    """Read everything that this thread's solves left to be checked, after one wait for the device; nothing on a CPU.

    Raises:
        DivergenceError: If the state of a solve diverged; within `deferred_divergence` it is appended there instead.
        ReconstructionError: If a gradient was not exact, and the adjoint's policy is to raise.
    """
    own_checks().settle()


atexit.register(settle_checks)
