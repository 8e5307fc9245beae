"""Language modeling: training loss, and evaluation metrics with units."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revdeq_lightning.data.text.module import TextBatch
from revdeq_lightning.equilibrium.function import is_compiled
from revdeq_lightning.metrics import LanguageMetrics
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_language_model
from revdeq_lightning.models.generation import continue_text
from revdeq_lightning.tasks.base import AbstractTask, TrainingOutput
from revdeq_lightning.tasks.optimizers import OptimizerConfig

SPLITS = {"val": "validation", "test": "test"}


class LanguageModelingTask(AbstractTask):
    """Train and evaluate a language model.

    Logs `train/loss` (without the penalty) and, over whole splits, `val/` and `test/`: `loss` (nats per token),
    `token_perplexity`, `word_perplexity`, `bits_per_byte`. Checkpoints contain settings and
    tokenizer, and suffice to generate text. Any loader of pairs (tokens, targets) will do; without the statistics and
    the tokenizer of `TextDataModule`, only the figures per token are logged, and checkpoints do not generate text.

    Args:
        network: Sizes and block; vocabulary and context length come from the data.
        solver: How the equilibrium is found and differentiated.
        optimizer: Optimizer, schedule, averaging of the weights.
        compile: Compile f with torch.compile: worth its minutes on a GPU.
        jacobian_weight: Weight of the penalty on df/dz at the fixed point; 0 for none (see `AbstractTask`).
    """

    network_class = TransformerConfig
    batch_type = TextBatch

    def __init__(
        self,
        network: TransformerConfig,
        solver: SolverConfig,
        optimizer: OptimizerConfig,
        compile: bool = False,
        jacobian_weight: float = 0.0,
    ) -> None:
        super().__init__(
            network, solver, optimizer, build_language_model, compile=compile, jacobian_weight=jacobian_weight
        )
        self.metrics = nn.ModuleDict({name: LanguageMetrics() for name in SPLITS})

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        batch = self.as_batch(batch)
        with self.penalized() as penalties:
            output = self.model.loss(batch.tokens, batch.targets)
        self.log("train/loss", output.loss)
        stats = () if output.stats is None else (*output.earlier_stats, output.stats)
        loss = self.with_penalty(output.loss, penalties)
        return {"loss": loss, "step": TrainingOutput(stats, batch.tokens.numel(), "tokens")}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Nats of each target of the batch, in text order."""
        batch = self.as_batch(batch)
        logits_BTV = self.model(batch.tokens).logits_BTV
        nats_N = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), batch.targets.flatten(), reduction="none"
        )
        return nats_N[batch.targets.flatten() >= 0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if tokenizer_state := self.from_data("tokenizer_state"):
            checkpoint["tokenizer"] = tokenizer_state()

    def evaluation_sums(self, batch: Any) -> dict[str, Tensor]:
        """Sums over the predicted tokens of the batch, for `DepthSweep`."""
        batch = self.as_batch(batch)
        output = self.model.loss(batch.tokens, batch.targets)
        count = torch.as_tensor(output.num_targets)
        return {"loss": output.loss.double() * count, "count": count}

    def sample_text(self, prompt: str, *, max_new_tokens: int, temperature: float) -> str:
        """A continuation of the prompt, for `TextSamples`; the same random numbers each time."""
        if (tokenizer := self.from_data("tokenizer")) is None:
            raise ValueError("TextSamples needs data with a tokenizer, as TextDataModule has: remove the callback")
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        # Compiled for the shapes of training; those of generation would cause recompilation.
        with torch.compiler.set_stance("force_eager") if is_compiled(self.model) else nullcontext():
            return continue_text(self.model, tokenizer, prompt, **sampling)[len(prompt) :]

    def _add_to(self, name: str, batch: TextBatch) -> None:
        output = self.model.loss(batch.tokens, batch.targets)
        metric = self._metric(name)
        nats = output.loss.to(metric.sums.dtype) * output.num_targets
        metric.update(nats=nats, tokens=output.num_targets)

    def _log_figures(self, name: str) -> None:
        split_statistics = self.from_data("split_statistics")
        figures = self._take(name, split_statistics(SPLITS[name]) if split_statistics else None)
        # Already the same on all processes, but Lightning requires the flag.
        values = {f"{name}/{key}": value.to(torch.float32) for key, value in figures.items()}
        self.log_dict(values, sync_dist=True)
