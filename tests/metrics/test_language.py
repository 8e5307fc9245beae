import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from revdeq_lightning.metrics import LanguageMetrics


class Counts(NamedTuple):
    num_tokens: int
    num_bytes: int
    num_words: int


def test_closed_forms():
    metrics = LanguageMetrics()
    metrics.update(nats=6 * math.log(2), tokens=3)
    metrics.update(nats=torch.tensor(10 * math.log(2), dtype=torch.float64), tokens=torch.tensor(5))
    figures = metrics.compute(Counts(num_tokens=8, num_bytes=32, num_words=4))
    assert figures["loss"].item() == pytest.approx(2 * math.log(2), rel=1e-12)
    assert figures["token_perplexity"].item() == pytest.approx(4, rel=1e-12)
    assert figures["word_perplexity"].item() == pytest.approx(16, rel=1e-12)
    assert figures["bits_per_byte"].item() == pytest.approx(0.5, rel=1e-12)
    half = metrics.compute(Counts(num_tokens=16, num_bytes=64, num_words=8))  # the split was seen in part
    assert {key: value.item() for key, value in half.items()} == {key: value.item() for key, value in figures.items()}
    metrics.update(nats=1e6, tokens=1)
    assert metrics.compute(Counts(9, 1, 1))["word_perplexity"].item() == math.inf


def test_published_conversion_on_wikitext103():
    """23.2 per GPT-2 token on the test split (286,654 tokens, 245,570 words) is about 39 per word."""
    metrics = LanguageMetrics()
    metrics.update(nats=286_654 * math.log(23.2), tokens=286_654)
    figures = metrics.compute(Counts(num_tokens=286_654, num_bytes=1_290_590, num_words=245_570))
    assert figures["token_perplexity"].item() == pytest.approx(23.2)
    assert figures["word_perplexity"].item() == pytest.approx(39.3, abs=0.1)


def test_token_perplexity_equals_torchmetrics_on_batches_of_unequal_size():
    """Weighted by token: a mean of batch means would give another number."""
    from torchmetrics.text import Perplexity

    generator = torch.Generator().manual_seed(0)
    oracle, metrics, batch_means, total = Perplexity(ignore_index=-100), LanguageMetrics(), [], 0
    for num_ignored in (0, 3, 9):
        logits = 3 * torch.randn(2, 6, 11, generator=generator)
        targets = torch.randint(11, (2, 6), generator=generator)
        targets.view(-1)[:num_ignored] = -100
        loss, num_targets = F.cross_entropy(logits.flatten(0, 1), targets.flatten()), (targets != -100).sum()
        metrics.update(nats=loss.double() * num_targets, tokens=num_targets)
        oracle.update(logits, targets)
        batch_means.append(loss)
        total += int(num_targets)
    figures = metrics.compute(Counts(total, 100, 10))
    assert figures["token_perplexity"].item() == pytest.approx(
        oracle.compute().item(), rel=1e-5
    )  # torchmetrics sums in float32
    assert figures["loss"].item() != pytest.approx(torch.stack(batch_means).mean().item(), rel=1e-3)


def test_sums_in_float64():
    metrics = LanguageMetrics()
    metrics.update(nats=2.0**30, tokens=1)
    for _ in range(1000):
        metrics.update(nats=0.25, tokens=1)  # lost in float32, where 2**30 + 0.25 == 2**30
    assert metrics.compute(Counts(1001, 1, 1))["loss"].item() == (2.0**30 + 250) / 1001


def test_computes_anew_for_other_statistics_and_after_reset():
    metrics = LanguageMetrics()
    metrics.update(nats=math.log(2), tokens=1)
    assert metrics.compute(Counts(1, 1, 1))["bits_per_byte"].item() == pytest.approx(1)
    assert metrics.compute(Counts(1, 2, 1))["bits_per_byte"].item() == pytest.approx(0.5)
    metrics.reset()
    metrics.update(nats=2 * math.log(2), tokens=1)
    assert metrics.compute(Counts(1, 1, 1))["bits_per_byte"].item() == pytest.approx(2)


def test_an_empty_split_and_a_token_counted_twice_are_errors():
    metrics = LanguageMetrics()
    metrics.update(nats=0.0, tokens=0)
    with pytest.raises(ValueError, match="no target token was seen"):
        metrics.compute(Counts(8, 32, 4))
    metrics.update(nats=1.0, tokens=1)
    with pytest.raises(ValueError, match="must hold words and bytes, got 0 and 32"):
        metrics.compute(Counts(8, 32, 0))
    metrics.update(nats=1.0, tokens=8)
    with pytest.raises(ValueError, match="9 target tokens were seen, but the split holds 8"):
        metrics.compute(Counts(8, 32, 4))


def test_sums_over_processes():
    """Two ranks in one process: each gathers the states of both."""
    ranks = [
        LanguageMetrics(
            dist_sync_fn=lambda state, group: [metrics.sums for metrics in ranks],
            distributed_available_fn=lambda: True,
        )
        for _ in range(2)
    ]
    ranks[0].update(nats=6 * math.log(2), tokens=3)
    ranks[1].update(nats=10 * math.log(2), tokens=5)
    for metrics, own in zip(ranks, (3, 5), strict=True):
        figures = metrics.compute(Counts(num_tokens=8, num_bytes=32, num_words=4))
        assert figures["token_perplexity"].item() == pytest.approx(4, rel=1e-12)
        assert metrics.sums[1].item() == own  # nothing is counted twice later
