"""Metrics of a language model on a split of a text, with units.

With `S` nats for the complete split, and its numbers of tokens, words, and bytes (properties of text and tokenizer):

    loss             = S / num_tokens                nats per token
    token_perplexity = exp(S / num_tokens)           per token: comparable between models of one tokenizer only
    word_perplexity  = exp(S / num_words)            per word, end of line counted as one: comparable between tokenizers
    bits_per_byte    = S / (num_bytes * ln 2)        comparable between tokenizers and languages
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric


class SplitCounts(Protocol):
    """Sizes of the text covered by the targets of a split."""

    num_tokens: int
    """Predicted tokens."""
    num_bytes: int
    """Bytes of their text in UTF-8."""
    num_words: int
    """Words of their text, including line ends."""


class LanguageMetrics(Metric):
    """Sums of nats and tokens over a split, in float64 and over all processes; every token has the same weight.

    Keys: `loss` (nats per token), `token_perplexity`, `word_perplexity`, `bits_per_byte`.

    Assumes that each target is seen once. If only a part of the split was seen (a limit on batches, a sanity check),
    words and bytes are scaled in proportion to the tokens; seeing a split more than once (a sampler that wraps around)
    is an error.

    Example:
        metrics = LanguageMetrics()
        for tokens, targets in batches:
            output = model.loss(tokens, targets)
            metrics.update(output.loss.double() * output.num_targets, output.num_targets)
        figures = metrics.compute(data.split_statistics("val"))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total_nats: Tensor
    num_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        # A cached result would ignore a change of the statistics passed to compute().
        super().__init__(compute_with_cache=False, **kwargs)
        self.add_state("total_nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total_nats: Tensor | float, num_tokens: Tensor | int) -> None:
        """Add a batch: the SUM of its losses in nats, and the number of targets in it."""
        self.total_nats += torch.as_tensor(total_nats, dtype=torch.float64, device=self.total_nats.device).detach()
        self.num_tokens += torch.as_tensor(num_tokens, device=self.num_tokens.device)

    def compute(self, statistics: SplitCounts | None) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the four figures, 0-dim float64.

        Args:
            statistics: Sizes of the whole split; None: unknown, only the two figures per token.

        Raises:
            ValueError: If no token was seen, more were seen than the split holds, or the split has no words or bytes.
        """
        num_tokens = int(self.num_tokens)
        if num_tokens < 1:
            raise ValueError("no target token was seen: the split is empty or every target is ignored")
        loss = self.total_nats / num_tokens
        figures = {"loss": loss, "token_perplexity": loss.exp()}
        if statistics is None:
            return figures
        if num_tokens > statistics.num_tokens:
            raise ValueError(
                f"{num_tokens} target tokens were seen, but the split holds {statistics.num_tokens}: "
                "some were counted twice (a sampler that pads or wraps around?)"
            )
        if statistics.num_words < 1 or statistics.num_bytes < 1:
            raise ValueError(
                f"the split must hold words and bytes, got {statistics.num_words} and {statistics.num_bytes}"
            )
        return figures | {
            "word_perplexity": (loss * (statistics.num_tokens / statistics.num_words)).exp(),
            "bits_per_byte": loss * (statistics.num_tokens / statistics.num_bytes / math.log(2)),
        }
