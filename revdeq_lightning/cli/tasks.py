"""The command lines of the tasks; `image predict` and `reasoning predict` are in `inference.py`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LightningArgumentParser

from revdeq_lightning.callbacks.samples import ImageSamples, TextSamples
from revdeq_lightning.cli.errors import fail, setting_errors
from revdeq_lightning.cli.inference import check_output, load_language_model, writing
from revdeq_lightning.cli.trainer import AbstractCommandLine
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.data.puzzles.module import PuzzleDataModule
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.models.generation import continue_text
from revdeq_lightning.program import printable
from revdeq_lightning.report.classification import ClassificationReport
from revdeq_lightning.report.reasoning import ReasoningReport
from revdeq_lightning.runs.folder import ImageRunConfig, LanguageRunConfig, ReasoningRunConfig
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.reasoning import ReasoningTask


class LanguageCommandLine(AbstractCommandLine):
    """`fit`, `validate`, `test` and `predict` of the language model."""

    task_class, data_class = LanguageModelingTask, TextDataModule
    run_class = LanguageRunConfig
    figures: ClassVar[dict[str, str]] = {
        "bits_per_byte": "{:.4f} bits per byte",
        "loss": "{:.4f} nats per token",
        "token_perplexity": "perplexity {:,.2f} per token",
        "word_perplexity": "{:,.1f} per word",
    }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", type=str | None, help="file to write (default: beside the checkpoint)")
        return parser

    def task_callbacks(self) -> list[Any]:
        run, every = cast(LanguageRunConfig, self.run_config), self.diagnostics.samples_every_n_validations
        if self._name != "fit" or not run.sample_tokens:
            return []
        sampling: Any = {"max_new_tokens": run.sample_tokens, "temperature": run.sample_temperature}
        try:
            self.datamodule.tokenizer.encode(run.sample_prompt)
        except ValueError as error:
            fail(f"run.sample_prompt={run.sample_prompt!r}: {error}: set another, or run.sample_tokens=0")
        if not every:
            return []
        return [TextSamples([run.sample_prompt], folder=run.path, every_n_validations=every, **sampling)]

    def show(self, checkpoint: str) -> None:
        run = cast(LanguageRunConfig, self.run_config)
        if run.sample_tokens:
            model, tokenizer = load_language_model(checkpoint)
            sampling: Any = {"max_new_tokens": run.sample_tokens, "temperature": run.sample_temperature}
            text = continue_text(model, tokenizer, run.sample_prompt, **sampling)
            print(f"\nSample ({run.sample_tokens} tokens, temperature {run.sample_temperature}):\n\n{printable(text)}")

    def predict(self, **kwargs: Any) -> None:
        """Write the nats of every token of the test text, in order, to a file."""
        import numpy as np

        with setting_errors():
            given = kwargs["ckpt_path"]
            path = check_output(self.config["predict"].output or Path(given).with_suffix(".nats.npy"), given)
        if self.trainer.world_size > 1:
            fail(f"predict needs one process, got {self.trainer.world_size}: set --trainer.devices=1")
        with self._run_errors("the prediction"):
            nats = torch.cat(self.trainer.predict(**kwargs | {"return_predictions": True})).numpy()  # type: ignore[arg-type]
        with setting_errors(), writing(path), path.open("wb") as file:
            np.save(file, nats)
        print(f"{nats.size:,} tokens, {nats.mean():.4f} nats per token, in {path}")


class ImageCommandLine(AbstractCommandLine):
    """`fit`, `validate` and `test` of the image classifiers."""

    task_class, data_class = ClassificationTask, ImageDataModule
    run_class = ImageRunConfig
    figures: ClassVar[dict[str, str]] = {
        "accuracy": "accuracy {:.2%}",
        "top5_accuracy": "{:.2%} in the first five",
        "loss": "{:.4f} nats per image",
    }

    def task_callbacks(self) -> list[Any]:
        every = self.diagnostics.samples_every_n_validations
        samples = [ImageSamples(folder=self.run_config.path, every_n_validations=every)] if every else []
        return [ClassificationReport(self.results), *samples]

    def closing_split(self) -> str | None:
        # Without test images, use the validation images, so that every run has image samples and a depth sweep.
        return next((split for split in ("test", "validation") if split in self.datamodule.splits), None)


class ReasoningCommandLine(AbstractCommandLine):
    """`fit`, `validate` and `test` of the reasoners."""

    task_class, data_class = ReasoningTask, PuzzleDataModule
    run_class = ReasoningRunConfig
    figures: ClassVar[dict[str, str]] = {
        "solved": "{:.2%} solved",
        "cell_accuracy": "{:.3%} of the cells right",
        "evaluations": "{:.1f} evaluations of f per puzzle",
    }

    def task_callbacks(self) -> list[Any]:
        return [ReasoningReport(self.results)]

    def details(self, figures: Mapping[str, float]) -> list[str]:
        """The figures of each size of the test."""
        lines = []
        for size in (key.removeprefix("test/solved_") for key in figures if re.fullmatch(r"test/solved_[\dx]+", key)):
            texts = [form.format(figures[f"test/{key}_{size}"]) for key, form in self.figures.items()]
            if f"test/solved_from_random_{size}" in figures:
                texts.append(f"{figures[f'test/solved_from_random_{size}']:.2%} from random states (first batch)")
            lines.append(f"{size:>9}: {', '.join(texts)}")
        return lines
