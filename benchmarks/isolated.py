"""Competitors in separate processes, pinned to the same core, one running at a time."""

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.measure import Timing, interleaved

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}
MEASURED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Return large blocks to the system immediately, as in `measure.process_peak_bytes`; for memory, not for times."""


class AbstractCompetitor(Protocol):
    """Interface of what a builder returns."""

    def step(self) -> None:
        """Run the forward and backward pass to completion."""

    def results(self) -> Any:
        """Results of the step, as plain numbers and NumPy arrays."""


class Isolated:
    """A fresh process, pinned to one core, for one competitor after another.

    Args:
        builder: `module:function` that returns a competitor; the module is imported only in the process.
        environment: Variables added to the process's environment.
    """

    def __init__(self, builder: str, *, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, builder), daemon=True)
        with _environment({**ONE_THREAD, **(environment or {})}):
            self.process.start()
        child.close()

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(("stop",))
        self.process.join(10)
        self.process.terminate()

    def ask(self, question: str, *arguments: Any) -> Any:
        """Ask for `build` with the builder's arguments, then `step` (CPU and wall seconds), `peak_bytes`, `results`."""
        self.connection.send((question, *arguments))
        try:
            kind, answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the competitor's process ended with exit code {self.process.exitcode}") from None
        if kind == "error":
            raise RuntimeError(f"in the competitor's process:\n{answer}")
        return answer


def time_alternating(competitors: Mapping[str, Isolated], num_rounds: int) -> dict[str, Timing]:
    """Run one step of each competitor per round, in a new random order, after a warm-up round; never two at a time."""
    return interleaved({name: partial(c.ask, "step") for name, c in competitors.items()}, num_rounds)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Any, builder: str) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    module, _, function = builder.partition(":")
    competitor: Any = None
    questions = {"step": _time, "peak_bytes": _peak_bytes, "results": lambda competitor: competitor.results()}
    with contextlib.suppress(EOFError):  # the parent has ended
        while (message := connection.recv()) != ("stop",):
            question, *arguments = message
            try:
                answer = None
                if question == "build":
                    competitor = None
                    competitor = getattr(importlib.import_module(module), function)(*arguments)
                else:
                    answer = questions[question](competitor)
                connection.send(("answer", answer))
            except Exception:
                connection.send(("error", traceback.format_exc()))


def _time(competitor: AbstractCompetitor) -> tuple[float, float]:
    gc.collect()
    process, wall = time.process_time(), time.perf_counter()
    competitor.step()
    return time.process_time() - process, time.perf_counter() - wall


def _peak_bytes(competitor: AbstractCompetitor) -> int:
    """Growth of the resident memory in a step other than the process's first, which compiles and loads libraries."""
    competitor.step()
    gc.collect()
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"the peak of one step is read from /proc, which {sys.platform} lacks")
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    base = _resident_bytes("VmRSS")
    competitor.step()
    return _resident_bytes("VmHWM") - base


def _resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
