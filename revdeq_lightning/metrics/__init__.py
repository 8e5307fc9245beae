"""Figures of the sums over a split, in which every item must be seen once; named with their units.

Of a text, with `S` nats for the complete split and its numbers of tokens, words, and bytes (of text and tokenizer):

    loss             = S / num_tokens                nats per token
    token_perplexity = exp(S / num_tokens)           per token: comparable between models of one tokenizer only
    word_perplexity  = exp(S / num_words)            per word, end of line counted as one: comparable between tokenizers
    bits_per_byte    = S / (num_bytes * ln 2)        comparable between tokenizers and languages
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ClassificationMetrics", "LanguageMetrics", "ReasoningMetrics"]


class AbstractSums(Metric):
    """Sums over a split, in float64 and over all processes."""

    names: ClassVar[tuple[str, ...]]
    is_differentiable = full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **sums: Tensor | float) -> None:
        """Add the sums over a batch, by `names`."""
        to = self.sums
        self.sums += torch.stack([torch.as_tensor(sums[name], dtype=to.dtype, device=to.device) for name in self.names])


class LanguageMetrics(AbstractSums):
    """Keys: `loss` (nats per token), `token_perplexity`, `word_perplexity`, `bits_per_byte`.

    If only a part of the split was seen (a limit on batches, a sanity check), words and bytes are scaled in proportion
    to the tokens; seeing a split more than once (a sampler that wraps around) is an error.

    Example:
        metrics = LanguageMetrics()
        for tokens, targets in batches:
            output = model.loss(tokens, targets)
            metrics.update(nats=output.loss.double() * output.num_targets, tokens=output.num_targets)
        figures = metrics.compute(data.split_statistics("validation"))
    """

    names = ("nats", "tokens")

    def __init__(self, **kwargs: Any) -> None:
        # A cached result would ignore a change of the statistics passed to compute().
        super().__init__(compute_with_cache=False, **kwargs)

    def compute(self, statistics: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the four figures, 0-dim float64.

        Args:
            statistics: `num_tokens`, `num_words` and `num_bytes` of the whole split; None: only the figures per token.

        Raises:
            ValueError: If no token was seen, more were seen than the split holds, or the split has no words or bytes.
        """
        nats, tokens = self.sums
        if tokens < 1:
            raise ValueError("no target token was seen: the split is empty or every target is ignored")
        loss = nats / tokens
        figures = {"loss": loss, "token_perplexity": loss.exp()}
        if statistics is None:
            return figures
        num_tokens, num_words, num_bytes = statistics.num_tokens, statistics.num_words, statistics.num_bytes
        if tokens > num_tokens:
            raise ValueError(
                f"{int(tokens)} target tokens were seen, but the split holds {num_tokens}: "
                "some were counted twice (a sampler that pads or wraps around?)"
            )
        if num_words < 1 or num_bytes < 1:
            raise ValueError(f"the split must hold words and bytes, got {num_words} and {num_bytes}")
        return figures | {
            "word_perplexity": (loss * (num_tokens / num_words)).exp(),
            "bits_per_byte": loss * (num_tokens / num_bytes / math.log(2)),
        }


class ClassificationMetrics(AbstractSums):
    """Keys: `loss` (nats per image), `accuracy` and, with more than 5 classes, `top5_accuracy`."""

    names = ("nats", "right", "right_in_five", "images")

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def compute(self) -> dict[str, Tensor]:
        """The figures; NaN if nothing was added."""
        nats, right, right_in_five, images = self.sums.float()
        figures = {"loss": nats / images, "accuracy": right / images}
        return figures | ({"top5_accuracy": right_in_five / images} if self.num_classes > 5 else {})


class ReasoningMetrics(AbstractSums):
    """Keys: `loss` (nats per cell), `cell_accuracy`, `solved` (fraction with every cell right), `evaluations` of f."""

    names = ("nats", "right_cells", "cells", "solved", "evaluations", "puzzles")

    def compute(self) -> dict[str, Tensor]:
        """The figures; NaN if nothing was added."""
        nats, right, cells, solved, evaluations, puzzles = self.sums.float()
        per_puzzle = {"solved": solved / puzzles, "evaluations": evaluations / puzzles}
        return {"loss": nats / cells, "cell_accuracy": right / cells} | per_puzzle
