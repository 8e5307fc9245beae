"""One-line errors for what the user can fix. PyTorch and Lightning are imported only where a command needs them."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from revdeq_lightning.errors import CheckpointError, DivergenceError, ParallelismError


def fail(message: str, code: int = 2) -> NoReturn:
    """Print a one-line error and exit."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def nearest(word: str, words: Iterable[str]) -> str:
    """Suggest the valid word that is most similar, if there is one."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


@contextmanager
def setting_errors() -> Iterator[None]:
    """Report wrong settings and missing data in one line."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # the parser wraps the original error
            reason = reason.__cause__
        fail(" ".join(str(reason).split()))


@contextmanager
def run_errors(what: str, lost_peer: Callable[[Exception], str | None] = lambda _: None) -> Iterator[None]:
    """Report causes outside the program in one line: checkpoints, memory, lost processes, files or workers.

    `what` is what they end, such as "training"; `lost_peer` describes the loss of another process, if that is
    the cause. Other errors are bugs and keep their traceback.
    """
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities import rank_zero_only

    from revdeq_lightning.cli.process_end import end_process_group
    from revdeq_lightning.runs.divergence import DivergedError

    rank = cast(Any, rank_zero_only).rank
    try:
        yield
    except (CheckpointError, MisconfigurationException, DivergenceError) as error:
        fail(" ".join(str(error).split()), code=1 if isinstance(error, DivergenceError) else 2)
    except (ParallelismError, DivergedError) as error:  # raised on all processes
        end_process_group()  # Lightning kills the first one, which prints the error, once another one has failed
        code = 2 if isinstance(error, ParallelismError) else 1
        if rank:
            sys.exit(code)
        fail(str(error), code)
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        fail(
            f"process {rank} ran out of GPU memory{f' (it requested {wanted[1]} more)' if wanted else ''}: lower"
            " data.batch_size and raise trainer.accumulate_grad_batches accordingly, use trainer.precision=bf16-mixed,"
            " or shard with trainer.strategy=fsdp2 (the number of solver steps does not matter)",
            code=1,
        )
    except (OSError, EOFError, RuntimeError) as error:
        line = lost_peer(error) or lost_resource(error, what)
        if line is None:
            raise
        fail(line, code=1)


def lost_resource(error: Exception, what: str) -> str | None:
    """Describe the loss of a file, disk or worker in one line; None for other errors."""
    *_, text = str(error).strip().splitlines() or [type(error).__name__]  # a worker's message starts with its traceback
    if caught := re.match(r"Caught (\w+) in DataLoader worker", str(error)):
        # Exceptions of network libraries cannot be recreated in this process, and arrive as another class.
        is_resource = isinstance(error, OSError) or caught[1] != type(error).__name__
        return f"{what} cannot continue: {text}" if is_resource else None
    if "DataLoader timed out" in text:
        return f"{what} cannot continue: a data-loading process does not respond: {text}"
    # A worker that dies while it sends a batch causes a connection error.
    if isinstance(error, ConnectionError | EOFError) or re.search(r"DataLoader worker \(pid", text):
        return f"{what} cannot continue: a data-loading process ended: {text} If memory is low, reduce data.num_workers"
    if isinstance(error, OSError):
        return f"{what} cannot continue: {text}"
    return None
