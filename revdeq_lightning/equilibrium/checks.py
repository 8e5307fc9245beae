"""Checks of numbers that the device may still be computing.

On a CPU they are made at once. On a GPU to look at a number is to wait for all that comes before it: there the numbers
are copied to the host behind the computation, and read by `settle_checks()`, which a training step calls once before
its optimizer moves the weights, or without waiting by a later solve, once they have arrived. What fails raises there;
until then a value that failed its check is NaN. While a CUDA graph is captured nothing is copied: NaN must do.
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
Waiting = deque[tuple[Tensor, torch.Event | None, Judge]]
"""Numbers that were not looked at yet, oldest first, and what says that they have arrived."""
_own = threading.local()


def own_checks() -> Waiting:
    """Those of this thread. On a GPU a backward pass runs in another one: it is given those of its forward pass."""
    if not hasattr(_own, "waiting"):
        _own.waiting = deque()
    return _own.waiting  # type: ignore[no-any-return]


def host_must_wait(device: torch.device) -> bool:
    """Whether looking at a number on this device means waiting for the device."""
    return device.type != "cpu"


def is_capturing(device: torch.device) -> bool:
    """Whether the operations on this device are recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_later(numbers: Tensor, judge: Judge, waiting: Waiting | None = None) -> None:
    """Call `judge` with the numbers, flat: at once on a CPU, otherwise when `settle_checks` reads them with all others.

    So that whoever trains needs no wait of its own for its loss and gradient.
    """
    if not host_must_wait(numbers.device):
        judge(numbers.flatten().tolist())
    elif not is_capturing(numbers.device):
        on_host = numbers.detach().flatten().to("cpu", non_blocking=True)  # into pinned memory
        ready = None if numbers.device.type == "cpu" else torch.Event(numbers.device)
        if ready is not None:
            ready.record(torch.accelerator.current_stream(numbers.device))
        (own_checks() if waiting is None else waiting).append((on_host, ready, judge))


def settle_checks(*, wait: bool = True) -> None:
    """Read everything that this thread's solves left to be checked, after one wait for the device; nothing on a CPU.

    Raises:
        DivergenceError: If the state of a solve diverged; within `deferred_divergence` it is appended there instead.
        ReconstructionError: If a gradient was not exact, and the adjoint's policy is to raise.
    """
    waiting = own_checks()
    for _, ready, _ in reversed(waiting) if wait else ():
        if ready is not None and not ready.query():
            ready.synchronize()  # the newest first: then the others are there
    while waiting and (wait or _has_arrived(waiting[0][1])):
        on_host, _, judge = waiting.popleft()
        judge(on_host.tolist())


def _has_arrived(ready: torch.Event | None) -> bool:
    return ready is not None and not is_capturing(ready.device) and ready.query()


atexit.register(settle_checks)
