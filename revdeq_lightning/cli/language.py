"""The language model's command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LightningArgumentParser

from revdeq_lightning.callbacks.samples import TextSamples
from revdeq_lightning.cli.command_line import AbstractCommandLine, run_command_line
from revdeq_lightning.cli.language_inference import load_language_model
from revdeq_lightning.cli.main import fail
from revdeq_lightning.cli.messages import readable_checkpoint
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.models.generation import continue_text
from revdeq_lightning.runs.folder import LanguageRunConfig
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask


class LanguageCommandLine(AbstractCommandLine):
    """`fit`, `validate`, `test` and `predict` of the language model."""

    run_class = LanguageRunConfig
    figures: ClassVar[dict[str, str]] = {
        "bits_per_byte": "{:.4f} bits per byte",
        "loss": "{:.4f} nats per token",
        "token_perplexity": "perplexity {:,.2f} per token",
        "word_perplexity": "{:,.1f} per word",
    }

    def link_sizes(self, parser: LightningArgumentParser) -> None:
        """Context length and vocabulary."""
        parser.link_arguments("data.context_length", "model.network.context_length")
        parser.link_arguments("data", "model.network.vocab_size", compute_fn=vocab_size, apply_on="instantiate")

    def task_callbacks(self) -> list[Any]:
        """Text at validations."""
        run, every = cast(LanguageRunConfig, self.run_config), self.diagnostics.samples_every_n_validations
        if not (run.sample_tokens and every):
            return []
        length, temperature = run.sample_tokens, run.sample_temperature
        return [
            TextSamples(
                [run.sample_prompt],
                max_new_tokens=length,
                temperature=temperature,
                folder=run.path,
                every_n_validations=every,
            )
        ]

    def show(self, checkpoint: str) -> None:
        """Print a sample."""
        run = cast(LanguageRunConfig, self.run_config)
        if run.sample_tokens:
            text = sample(checkpoint, run)
            print(f"\nSample ({run.sample_tokens} tokens, temperature {run.sample_temperature}):\n\n{text}")

    def predict(self, **kwargs: Any) -> None:
        """Write the nats of every predicted token of the test text, in its order, beside the checkpoint."""
        import numpy as np

        if self.trainer.world_size > 1:
            fail(f"predict needs one process, got {self.trainer.world_size}: --trainer.devices=1")
        with readable_checkpoint():
            nats = torch.cat(self.trainer.predict(**kwargs)).numpy()  # type: ignore[arg-type]
        path = Path(kwargs["ckpt_path"]).with_suffix(".nats.npy")
        np.save(path, nats)
        print(f"{nats.size:,} tokens, {nats.mean():.4f} nats per token, in {path}")


def run(subcommand: str, options: Sequence[str]) -> None:
    """Parse and run one command."""
    run_command_line(LanguageCommandLine, LanguageModelingTask, TextDataModule, subcommand, options)


def vocab_size(data: TextDataModule) -> int:
    """Vocabulary of the data, for the link."""
    return data.vocab_size


def sample(checkpoint: str, config: LanguageRunConfig) -> str:
    """A text from the checkpoint, as `generate` makes it."""
    model, tokenizer = load_language_model(checkpoint)
    temperature, length = config.sample_temperature, config.sample_tokens
    return continue_text(model, tokenizer, config.sample_prompt, max_new_tokens=length, temperature=temperature)
