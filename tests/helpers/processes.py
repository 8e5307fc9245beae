"""Several gloo processes on this machine; as a script, the inside of `run_on_ranks`."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from process_groups import run_group
from scripts import run_python


def run_on_ranks(
    worker: Callable[..., Any], world_size: int, folder: Path, *args: Any, seconds: float = 100
) -> list[Any]:
    """What `worker(rank, *args)` returns on every rank of a gloo group; `worker` must be a module's own function."""
    (folder / "worker.pickle").write_bytes(pickle.dumps((worker, args)))
    run_python(__file__, world_size, folder, seconds=seconds)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _main(folder: Path, worker: Callable[..., Any], args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo")
    result = worker(dist.get_rank(), *args)
    dist.barrier()
    torch.save(result, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    run_group(int(sys.argv[1]), _main, folder, *pickle.loads((folder / "worker.pickle").read_bytes()))
