"""What a user can mend, told in one line."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.cli.main import fail
from revdeq_lightning.errors import ParallelismError


@contextmanager
def readable_errors() -> Iterator[None]:
    """Tell wrong settings and missing data in one line; an error in training keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # what the parser wraps in the names of its functions
            reason = reason.__cause__
        fail(" ".join(str(reason).split()))


@contextmanager
def device_errors() -> Iterator[None]:
    """Tell in one line, in training too, what does not fit the devices."""
    rank = cast(Any, rank_zero_only).rank
    try:
        yield
    except ParallelismError as error:  # all processes find the same
        if rank:
            sys.exit(2)
        fail(str(error))
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        fail(
            f"process {rank} ran out of GPU memory{f' (it wanted {wanted[1]} more)' if wanted else ''}: lower"
            " data.batch_size and raise trainer.accumulate_grad_batches as much, use trainer.precision=bf16-mixed, or"
            " share parameters and optimizer state out with trainer.strategy=fsdp2 (more solver steps need no more)",
            code=1,
        )
