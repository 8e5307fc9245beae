"""How a training process ends: by a signal, after the loss of another process, or together with all of them."""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from subprocess import Popen
from typing import Any, NoReturn, cast

import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from revdeq_lightning.loggers.wandb_logger import finish_wandb
from revdeq_lightning.runs.signals import STOP, Stopped

NETWORK = (
    r"pair closure|pair is not connected|socket closed|peer (disconnected|closed)|broken pipe"
    r"|connection (closed|reset|refused)|(socket|connect) timeout|timed out|unreachable|no route to host"
)
# gloo raises plain RuntimeErrors; NCCL and the store raise those of torch.distributed.
LOST = re.compile(f"gloo|nccl|{NETWORK}", re.IGNORECASE)
SOURCE_LINE = re.compile(r"^\[[^]]*\]\s*|(?<=NCCL error) in: [^,]*")
NO_PEER = re.compile("invalid (usage|argument)|unhandled (system|cuda) error|internal error")
"""NCCL's messages about faults of this process or machine."""


@contextmanager
def orderly_end(notes_signals: bool) -> Iterator[None]:
    """Context of a command that ends its W&B runs, its child processes, and the process group."""
    with children_ended():
        with stop_signals_noted() if notes_signals else nullcontext(), finished_wandb(), children_ended():
            yield
        end_process_group()


@contextmanager
def stop_signals_noted() -> Iterator[None]:
    """Context that records signals; if the program already records them, they are ignored afterwards."""
    took = STOP.take()
    try:
        yield
    finally:
        if took:
            STOP.give_back()
        else:
            STOP.ignore()


def let_sigterm_end_the_wait(trainer: Trainer) -> None:
    """Let SIGTERM end the process until `StopSignal.setup`, if it may have to wait long for other machines."""
    if (trainer.num_nodes > 1 or "TORCHELASTIC_RUN_ID" in os.environ) and not dist.is_initialized():
        launcher = trainer.strategy.launcher
        STOP.end_while_waiting(lambda: launcher.kill(signal.SIGKILL) if launcher else None)


@contextmanager
def finished_wandb() -> Iterator[None]:
    """Finish the W&B runs of the command with its exit code; a later run in this process would continue them."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        finish_wandb(code)


@contextmanager
def children_ended() -> Iterator[None]:
    """If this process ends by an error, end the processes that Lightning started from it.

    They would wait for it and keep their GPUs, with NCCL for the strategy's `timeout_seconds`.
    """
    try:
        yield
    except BaseException:
        for child in released_children():
            child.kill()  # SIGTERM is only noted
        raise


def end_after_interrupt(trainer: Trainer, stop: SystemExit) -> NoReturn:
    """Exit in place of Lightning, whose exit code after an interrupt is 1."""
    if isinstance(stop, Stopped):
        end_process_group()
        sys.exit(STOP.exit_code)
    sys.exit(130 if trainer.interrupted else 1)


def lost_peer(error: Exception, trainer: Trainer) -> str | None:
    """Describe in one line an error that means that the processes can no longer exchange data; None for other errors.

    Either another process ended or does not respond, or NCCL failed on this machine and would fail again.
    """
    if trainer.world_size == 1 or loading(error):
        return None
    if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
        return None
    text, _, last = str(error).partition("Last error:")  # the informative line of NCCL's message
    reason, last = SOURCE_LINE.sub("", (text.splitlines() or [""])[0]), " ".join(last.split())
    told = f"{reason}: {last}" if last else reason
    if isinstance(error, dist.DistBackendError) and NO_PEER.search(reason) and not re.search(NETWORK, last, re.I):
        return f"rank {trainer.global_rank} cannot exchange data with the other processes: {told}"
    return (
        f"rank {trainer.global_rank} lost another process, which ended or does not respond ({told}). Its own log "
        "says why; the same command with --run.resume=auto continues from the newest checkpoint."
    )


def loading(error: Exception) -> bool:
    """Whether the error comes from a DataLoader, whose connections are to this process's own workers."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.utils.data.dataloader" for frame, _ in frames)


def end_process_group() -> None:
    """Leave the process group when all processes are done.

    They wait for the first one, which has more to do, because schedulers end all processes soon after one has ended.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        released_children()
        dist.destroy_process_group()


def released_children() -> list[Popen[bytes]]:
    """Return the processes that Lightning started from this one, which it no longer watches.

    Otherwise Lightning kills this process seconds after one of them ends with a nonzero code, even if all end for the
    same reason and this one has not sent its last figures to W&B yet.
    """
    watches = [cast(Any, t)._child_processes for t in threading.enumerate() if isinstance(t, _ChildProcessObserver)]
    children = [child for watched in watches for child in watched]
    for watched in watches:
        watched.clear()
    return children
