"""Instruments: bytes held by tensors, peak of a process, interleaved timing, and provenance of a result."""

import csv
import gc
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revdeq_lightning.runs.environment import cpu_name

Row = Mapping[str, Any]

MEASURED_PATHS = (
    "revdeq_lightning/equilibrium",
    "revdeq_lightning/models",
    "benchmarks/*.py",
    "tests/helpers/equilibrium.py",
)
"""Paths that results depend on; changes elsewhere do not affect them."""


def peak_tensor_bytes(run: Callable[[], Any]) -> int:
    """Peak bytes of the storages that `run` creates, each counted once.

    The number is the same in every repetition. It includes neither existing tensors nor the working memory inside an
    operator, which does not depend on how many operators run.
    """
    gc.collect()
    with _StorageTracker() as tracker:
        run()
    return int(tracker.peak_bytes)


class _StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the storage of every operator's result, also in backward passes, until it is released."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held_bytes: int = 0
        self.peak_bytes: int = 0
        self._tracked = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage in self._tracked or not storage.nbytes():
                continue
            if given is None:
                given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            if storage.data_ptr() not in given:
                self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        self._tracked.add(storage)
        self.held_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def process_peak_bytes(function: Callable[..., Callable[[], Any]], *arguments: Any, threads: int = 1) -> int:
    """Growth of the resident memory of a fresh process while it runs `function(*arguments)()`.

    The base is the peak after `function(*arguments)` has created its tensors; `function` must be importable. Blocks of
    64 KiB and more are returned to the system immediately (glibc): otherwise its heap fragments, which would dominate
    the result.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read when the fork server starts
    context = multiprocessing.get_context("forkserver")
    # Import once: each process is a fork of one that has not computed anything yet.
    context.set_forkserver_preload(["torch", function.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, function, arguments, threads))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def _report_peak(
    sender: Any, function: Callable[..., Callable[[], Any]], arguments: Sequence[Any], threads: int
) -> None:
    torch.set_num_threads(threads)
    run = function(*arguments)
    base = _peak_resident_bytes()
    run()
    sender.send(_peak_resident_bytes() - base)


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Timing(NamedTuple):
    """Seconds of every repetition of one competitor, in order of the rounds."""

    process_seconds: list[float]
    wall_seconds: list[float]


def interleaved(
    competitors: Mapping[str, Callable[[], tuple[float, float]]], num_rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """Ask all competitors for their CPU and wall seconds once per round, in a new random order, after the warm-up."""
    generator = random.Random(0)
    timings = {name: Timing([], []) for name in competitors}
    for i in range(warmup + num_rounds):
        for name in generator.sample(list(competitors), len(competitors)):
            process, wall = competitors[name]()
            if i >= warmup:
                timings[name].process_seconds.append(process)
                timings[name].wall_seconds.append(wall)
    return timings


def time_interleaved(
    competitors: Mapping[str, Callable[[], Any]],
    num_rounds: int,
    warmup: int = 1,
    synchronize: Callable[[], Any] = lambda: None,
) -> dict[str, Timing]:
    """Time all competitors in turn; `synchronize` waits for a device, so that its work counts.

    `process_seconds` is CPU time of this process, which other processes affect only through shared caches.
    """

    def timed(run: Callable[[], Any]) -> tuple[float, float]:
        gc.collect()
        synchronize()
        process, wall = time.process_time(), time.perf_counter()
        run()
        synchronize()
        return time.process_time() - process, time.perf_counter() - wall

    return interleaved({name: partial(timed, run) for name, run in competitors.items()}, num_rounds, warmup)


class Quartiles(NamedTuple):
    """Lower quartile, median, and upper quartile."""

    lower: float
    median: float
    upper: float


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Quartiles:
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Quartiles(*quantiles(ratios, n=4, method="inclusive")) if len(ratios) > 1 else Quartiles(*ratios * 3)


def provenance(command: str) -> dict[str, Any]:
    """Information needed to judge or repeat a measurement."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *MEASURED_PATHS)),
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write one line per row, with the keys of the first row as header."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
