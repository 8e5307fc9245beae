"""Groups of processes as torchrun makes them, forked: a script imports Lightning once for all of them.

As a script, `process_groups.py RANKS ARGUMENTS`: the command line on so many processes.
"""

import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch


def run_group(world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 120) -> None:
    """Call `function(*args)` in so many processes, with the environment that torchrun gives.

    Raises:
        RuntimeError: If one of them fails, or takes too long; all are ended.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    processes = [
        context.Process(target=_member, args=(rank, world_size, port, function, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"{function}{args} ended with {codes}")


def _member(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from revdeq_lightning.cli.main import main

    run_group(int(sys.argv[1]), main, sys.argv[2:])
