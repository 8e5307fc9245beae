"""Programs in processes of their own, which see what the tests see; imports that take seconds are made once."""

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Output(NamedTuple):
    """What a program wrote."""

    out: str
    err: str


def run_python(*words: object, seconds: float = 300, code: int = 0, cwd: object = ".") -> Output:
    """Run `python WORDS` with one thread, where it must end with this code, and all processes that it started.

    It is a fork of a process that has imported PyTorch, Lightning, and the command line.
    """
    command = [*map(str, words)]
    server, pipes = _server(), [os.pipe(), os.pipe()]
    request = json.dumps([command, _environment(), os.path.abspath(str(cwd))])
    socket.send_fds(server, [request.encode()], [theirs for _, theirs in pipes])
    for _, theirs in pipes:
        os.close(theirs)
    pid = int(server.recv(100))
    written = {ours: b"" for ours, _ in pipes}
    open_, end = [*written], time.monotonic() + seconds
    while open_ and (ready := select.select(open_, [], [], max(0.0, end - time.monotonic()))[0]):
        for pipe in ready:
            written[pipe] += (more := os.read(pipe, 1 << 16))
            if not more:  # the program has ended, and all processes that it started
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
        raise AssertionError(f"{command} {how}:\n{output.out[-3000:]}\n{output.err[-4000:]}")
    return output


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


@functools.cache
def _server() -> socket.socket:
    """The connection to the process that forks; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    command = [sys.executable, "-W", "ignore", __file__, str(theirs.fileno())]
    os.posix_spawn(sys.executable, command, _environment())
    theirs.close()
    return ours


def _fork_for_requests(control: socket.socket) -> list[str]:
    """Return the words to run, in a process for each request."""
    import revdeq_lightning.cli.image
    import revdeq_lightning.cli.language  # noqa: F401

    gc.freeze()  # no search through all of that, in each process
    while message := (received := socket.recv_fds(control, 1 << 20, 2))[0]:
        pid = os.fork()
        if not pid:
            words, environment, folder = json.loads(message)
            os.setsid()
            control.close()
            for pipe, number in zip(received[1], (1, 2), strict=True):
                os.dup2(pipe, number)
                os.close(pipe)
            os.environ.clear()
            os.environ |= environment
            os.chdir(folder)
            return words
        for pipe in received[1]:
            os.close(pipe)
        control.send(str(pid).encode())
        control.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    sys.exit()


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


if __name__ == "__main__":
    first, *rest = _fork_for_requests(socket.socket(fileno=int(sys.argv[1])))
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")
