"""The command line with something wrong in one of its processes: `faulty_command.py FAULT ARGUMENTS`.

Lightning starts this script again, with the same arguments, for the other processes of a run.
"""

import itertools
import os
import sys
import time

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from revdeq_lightning.cli import process_end
from revdeq_lightning.cli.main import main
from revdeq_lightning.runs.divergence import DivergenceGuard
from revdeq_lightning.runs.signals import STOP
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def in_step(fault):
    """Let a fault take the place of the third training step's outputs."""
    step, numbers = LanguageModelingTask.training_step, itertools.count(1)

    def faulty(self, batch, batch_idx):
        outputs = step(self, batch, batch_idx)
        return fault(outputs) if next(numbers) == 3 else outputs

    LanguageModelingTask.training_step = faulty


def slow_end():
    """W&B that sends for as long as Lightning needs to see the code with which the other process ended."""
    process_end.finish_wandb = lambda code: time.sleep(2 * (RANK == 0))
    _ChildProcessObserver.__init__.__defaults__ = (0.3,)  # how often Lightning looks: else every 5 s


def no_memory(outputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ...")


def waits(outputs):
    """As for NCCL: whatever becomes of the others, it hears of it after half an hour."""
    time.sleep(1800)


def error_of_first():
    slow_end()
    in_step(waits if RANK else no_memory)


def slow_step():
    in_step(waits)


def not_a_number_of_second():
    slow_end()
    if RANK:
        in_step(lambda outputs: outputs | {"loss": outputs["loss"] * float("nan")})
    else:  # the first process reports the error later than the other one could end
        DivergenceGuard.on_exception = lambda *_: time.sleep(2)


FAULTS = {function.__name__: function for function in (slow_end, slow_step, error_of_first, not_a_number_of_second)}


if __name__ == "__main__":
    STOP.take()
    FAULTS[sys.argv[1]]()
    main(sys.argv[2:])
