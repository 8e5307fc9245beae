"""Several gloo processes on this machine."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(
    worker: Callable[..., Any], world_size: int, folder: Path, *args: Any, seconds: float = 100
) -> list[Any]:
    """What `worker(rank, *args)` returns on every rank of a gloo group; `worker` must be a module's own function."""
    context = mp.spawn(_main, (world_size, folder, worker, args), nprocs=world_size, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise TimeoutError(f"{worker.__name__} took more than {seconds} s on {world_size} processes")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _main(rank: int, world_size: int, folder: Path, worker: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # A file, not a port: nobody else can take it.
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        result = worker(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    torch.save(result, folder / f"{rank}.pt")
