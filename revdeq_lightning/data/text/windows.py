"""Windows of tokens: their selection in an epoch, and batches of them."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from revdeq_lightning.data.loading.array_cache import StoredArray
from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX, PADDING

WINDOW_ORDERS = ("shuffled", "random")


class TextBatch(NamedTuple):
    """Tokens and, for each, the token that follows (or `IGNORE_INDEX`): both int64, shape `(batch, context_length)`."""

    tokens: Tensor
    targets: Tensor


class TokenWindows(Dataset[TextBatch]):
    """Map a list of start positions to a batch of windows; positions outside the text are not predicted."""

    def __init__(self, tokens: StoredArray, context_length: int) -> None:
        self.tokens, self.context_length = tokens, context_length

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1)

    def __getitem__(self, starts: list[int]) -> TextBatch:
        first = np.asarray(starts, dtype=np.int64)[:, None]
        positions = first + np.arange(self.context_length + 1)
        exists = (first != PADDING) & (positions < len(self.tokens))
        window = self.tokens.array[np.where(exists, positions, 0)].astype(np.int64)
        tokens = np.where(exists, window, 0)[:, :-1]
        targets = np.where(exists, window, IGNORE_INDEX)[:, 1:]
        return TextBatch(torch.from_numpy(tokens), torch.from_numpy(np.ascontiguousarray(targets)))


def count_windows(num_tokens: int, context_length: int) -> int:
    """Number of training windows per epoch: as many as fit after any offset up to `context_length`, at least one."""
    return max(1, (num_tokens - context_length) // context_length)


def window_starts(epoch: int, *, num_tokens: int, context_length: int, seed: int, order: str) -> NDArray[np.int64]:
    """Start positions of the training windows of one epoch, a pure function of the arguments.

    "shuffled": windows whose targets do not overlap, from a random offset, shuffled. "random": independent uniform
    positions, as in nanoGPT.
    """
    draws, count = Draws(seed, epoch), count_windows(num_tokens, context_length)
    if order == "random":
        return draws.integers(num_tokens - context_length, count)
    windows = draws.permutation(count)
    offset = draws.integers(num_tokens - count * context_length, 1)  # all offsets that leave room for the windows
    return offset + context_length * windows
