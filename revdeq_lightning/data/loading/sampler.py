"""Batches in an order that is a function of seed and epoch, starting at any position."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from revdeq_lightning.equilibrium.validation import require_count, require_in_range

PADDING = -1
"""Index of a padding item, which losses and metrics ignore."""

IGNORE_INDEX = -100
"""Target of positions or items without a target; losses and metrics ignore it."""


class ResumableBatchSampler(Sampler[list[int]]):
    """Yield this rank's share of the batches `b, b + 1, ...` of one epoch as lists of indices.

    Global batch b is `order(epoch)[b * G : (b + 1) * G]` with `G = batch_size * world_size`; the ranks take
    consecutive shares of it. The ranks never share an item, and one process with batch size G sees the same batches.
    `order` is a pure function of the epoch; None: `0 ... num_items - 1`. With `drop_last` (training) there are only
    complete global batches; otherwise (evaluation) every item occurs exactly once, and the last batch may be smaller
    and is padded with `PADDING` to a multiple of the number of ranks. Never wraps around.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        order: Callable[[int], NDArray[np.int64]] | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        require_count("batch_size", batch_size)
        require_count("the number of items", num_items)
        require_in_range("rank", rank, f"[0, {world_size})")
        if drop_last and num_items < batch_size * world_size:
            raise ValueError(
                f"batch_size {batch_size} on {world_size} rank(s) needs {batch_size * world_size} items, the data has "
                f"{num_items}: lower batch_size to at most {num_items // world_size}, or use more data."
            )
        self.num_items, self.batch_size, self.order = num_items, batch_size, order
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch, self.start_batch = 0, 0

    def set_position(self, epoch: int, batch: int) -> None:
        self.epoch, self.start_batch = epoch, batch

    def __len__(self) -> int:
        """Number of batches of a complete epoch, also if the next iteration starts later, as Lightning expects."""
        size = self.batch_size * self.world_size
        return self.num_items // size if self.drop_last else -(-self.num_items // size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.num_items) if self.order is None else self.order(self.epoch)
        size = self.batch_size * self.world_size
        for batch in range(self.start_batch, len(self)):
            indices = order[batch * size : (batch + 1) * size]
            indices = np.pad(indices, (0, -len(indices) % self.world_size), constant_values=PADDING)
            share = len(indices) // self.world_size
            yield indices[self.rank * share : (self.rank + 1) * share].tolist()


def training_position(trainer: Any) -> tuple[int, int]:
    """(epoch, batch) of the first batch that `trainer.fit` has not trained yet.

    Derived from Lightning's count of all trained batches, which excludes prefetched batches and one whose step
    failed. Lightning's epoch counter skips an epoch when a run with `max_steps` resumes from a checkpoint
    saved in `on_train_epoch_end`.
    """
    num_trained = trainer.fit_loop.epoch_loop.batch_progress.total.processed
    epoch, batch = divmod(num_trained, max(1, trainer.num_training_batches))
    return int(epoch), int(batch)


class ResumableLoader:
    """A DataLoader whose next iteration starts at a saved position.

    Not a `DataLoader` itself, so that Lightning neither replaces its sampler under DDP nor calls `set_epoch`.

    During `trainer.fit`, the position follows from Lightning's counters (`training_position`), so that it always agrees
    with them. Otherwise, each complete iteration advances the epoch by one.

    Iterations do not draw from the global random state, so restoring that state in the middle of an epoch is exact.
    `dataset[list of indices]` is a batch; the indices may include `PADDING`. The workers run until `close`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: ResumableBatchSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        trainer: Any = None,
    ) -> None:
        self.dataset, self.batch_sampler, self.trainer = dataset, batch_sampler, trainer
        self.epoch, self.start_batch, self.next_batch = 0, 0, 0
        self._loader = DataLoader(
            dataset,
            sampler=batch_sampler,
            batch_size=None,  # pass the sampler's lists of indices to the dataset unchanged
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_main_process,
        )

    @property
    def fitting(self) -> bool:
        """Whether Lightning is training with this loader, or was last (an interrupted fit still saves checkpoints)."""
        return self.trainer is not None and self.trainer.state.fn == "fit"

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator runs at the first `next`, when Lightning's counters are where training (re)starts. Lightning
        # itself calls `iter` earlier than that.
        if self.fitting:
            self.epoch, self.start_batch = training_position(self.trainer)
            if self.trainer.overfit_batches > 0:
                self.epoch = 0
        self.next_batch, self.start_batch = self.start_batch, 0
        self.batch_sampler.set_position(self.epoch, self.next_batch)
        for batch in self._loader:
            self.next_batch += 1
            yield batch
        self.epoch, self.next_batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Position of the first batch not yet used (trained, during `trainer.fit`)."""
        epoch, batch = training_position(self.trainer) if self.fitting else (self.epoch, self.next_batch)
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        whole_epochs, self.start_batch = divmod(state["batch"], len(self))
        self.epoch, self.next_batch = state["epoch"] + whole_epochs, self.start_batch

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        # As Lightning does for a DataLoader at the end of a fit; PyTorch has no public API for it.
        iterator: Any = self._loader._iterator
        self._loader._iterator = None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _leave_signals_to_main_process(worker: int) -> None:
    """Ignore signals that a scheduler or Ctrl-C sends to every process, because the last step still needs data.

    A worker ends when the training process ends it, including by SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it: there SIGTERM ends a worker immediately
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
