"""Programs in processes of their own, and groups of them."""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

QUICK_PATH = os.pathsep.join((str(Path(__file__).with_name("quick_start")), os.getcwd()))
"""For PYTHONPATH: a process imports Lightning in half the time."""

# Groups of processes as torchrun makes them, forked: a script imports Lightning once for all of them.


def run_group(world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 120) -> None:
    """Call `function(*args)` in so many processes, with the environment that torchrun gives.

    Raises:
        RuntimeError: If one of them fails, or takes too long; all are ended.
    """
    context = multiprocessing.get_context("fork")
    (port,) = free_ports(1)
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


# Programs in processes of their own, which see what the tests see; imports that take seconds are made once.


class Output(NamedTuple):
    """What a program wrote."""

    out: str
    err: str


def run_apart(
    function: Callable[..., object], *args: object, seconds: float = 300, code: int = 0, cwd: object = "."
) -> Output:
    """Call `function(*args)` in a process with one thread, where it must end with this code; what it wrote.

    The process is a fork of one that has imported PyTorch, Lightning, and the command line. It has ended when this
    returns, and so have all processes that it started. `function` must be a module's own.
    """
    server, pipes = _server(), [os.pipe(), os.pipe()]
    request = pickle.dumps((os.path.abspath(str(cwd)), _environment(), function, args))
    socket.send_fds(server, [request], [theirs for _, theirs in pipes])
    for _, theirs in pipes:
        os.close(theirs)
    pid = int(server.recv(100))
    written = {ours: b"" for ours, _ in pipes}
    open_, end = [*written], time.monotonic() + seconds
    while open_ and (ready := select.select(open_, [], [], max(0.0, end - time.monotonic()))[0]):
        for pipe in ready:
            written[pipe] += (more := os.read(pipe, 1 << 16))
            if not more:  # nobody is left who could write
                open_.remove(pipe)
    if open_:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    ended = int(server.recv(100))
    for pipe in written:
        os.close(pipe)
    output = Output(*(text.decode(errors="replace") for text in written.values()))
    if open_ or ended != code:
        how = f"did not end within {seconds} s" if open_ else f"ended with {ended}"
        raise AssertionError(f"{function.__name__}{args} {how}:\n{output.out[-3000:]}\n{output.err[-4000:]}")
    return output


def run_python(*words: object, **settings: Any) -> Output:
    """Run `python WORDS` (see `run_apart`)."""
    return run_apart(_python, *map(str, words), **settings)


def run_on_ranks(
    worker: Callable[..., Any], world_size: int, folder: Path, *args: Any, seconds: float = 100
) -> list[Any]:
    """What `worker(rank, *args)` returns on every rank of a gloo group; `worker` must be a module's own function."""
    run_apart(run_group, world_size, _save_result, folder, worker, args, seconds=seconds)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _save_result(folder: Path, worker: Callable[..., Any], args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo")
    result = worker(dist.get_rank(), *args)
    dist.barrier()
    torch.save(result, folder / f"{dist.get_rank()}.pt")


def _python(first: str, *rest: str) -> None:
    if first == "-m":
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of W&B in this process
    return own | {"PYTHONPATH": os.pathsep.join((QUICK_PATH, *filter(None, sys.path))), "OMP_NUM_THREADS": "1"}


@functools.cache
def _server() -> socket.socket:
    """The connection to the process that forks; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    code = f"from {__name__} import _serve; _serve({theirs.fileno()})"
    os.posix_spawn(sys.executable, [sys.executable, "-W", "ignore", "-c", code], _environment())
    theirs.close()
    return ours


def _serve(descriptor: int) -> None:
    """Fork for each request, and tell the process and how it ended."""
    import revdeq_lightning.cli.tasks  # noqa: F401

    control = socket.socket(fileno=descriptor)
    gc.freeze()  # no search through all of that, in each process
    while message := (received := socket.recv_fds(control, 1 << 20, 2))[0]:
        pid = os.fork()
        if not pid:
            os.setsid()
            control.close()
            for pipe, number in zip(received[1], (1, 2), strict=True):
                os.dup2(pipe, number)
                os.close(pipe)
            folder, environment, function, args = pickle.loads(message)
            os.environ.clear()
            os.environ |= environment
            os.chdir(folder)
            try:
                function(*args)
            finally:
                gc.unfreeze()  # the exit frees everything then: nanobind (in Triton) reports what stays as a leak
            return
        for pipe in received[1]:
            os.close(pipe)
        control.send(str(pid).encode())
        control.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def pids_with(*words: str) -> list[int]:
    """Of the Python processes whose command holds these words; none of one that ended, and is not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:  # it ended just now
            continue
        if "python" in command.split("\0")[0] and all(word in command for word in words):
            found.append(int(path.parent.name))
    return sorted(found)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
