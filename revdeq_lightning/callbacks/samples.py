"""What the model makes of a prompt or of some images, at validations."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from revdeq_lightning.callbacks.abstract import AbstractAtValidations
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.loggers.pictures import ClassifiedImage, classified_images, draw_sheet
from revdeq_lightning.loggers.step_rows import append_rows, read_rows, rewind_rows
from revdeq_lightning.loggers.wandb_logger import log_picture, log_table, step_of
from revdeq_lightning.program import printable
from revdeq_lightning.runs.random_state import untouched_random_state


class AbstractSamples(AbstractAtValidations):
    """Samples in eval mode, with the weights that are validated."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due:  # on all processes, as the weights may be spread over them
            with untouched_random_state():
                self.make(trainer, pl_module)

    @abstractmethod
    def make(self, trainer: Trainer, pl_module: Any) -> None:
        """Make the samples, write and log them."""


class TextSamples(AbstractSamples):
    """Lets a language model continue the same prompts at validations, to read how it learns.

    Appends to `samples.jsonl` (objects with `step`, `prompt`, `text`: the continuation) and writes `samples.txt` for
    reading. Logs no numbers; on W&B a table of the newest samples, `samples/text`. Each time it draws the same random
    numbers, from its own generator: training is bit for bit the same without it. A token costs one evaluation of the
    model.

    Assumes that the module has `sample_text(prompt, max_new_tokens=..., temperature=...) -> str`, which returns the
    continuation.

    Args:
        prompts: What to continue.
        max_new_tokens: Length of each continuation.
        temperature: 0 for the most likely token; below 1 safer, above 1 wilder.
        folder: Where to write; None: the run's.
        every_n_validations: Validations from one time to the next.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        folder: str | Path | None = None,
        every_n_validations: int = 1,
    ) -> None:
        super().__init__(folder, every_n_validations)
        if not prompts or not all(prompts):
            raise ValueError(f"prompts must hold at least one text, none of them empty, got {list(prompts)}")
        self.prompts = list(prompts)
        self.sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}

    def make(self, trainer: Trainer, pl_module: Any) -> None:
        step = step_of(trainer)
        texts = [pl_module.sample_text(prompt, **self.sampling) for prompt in self.prompts]
        rows = [{"step": step, "prompt": p, "text": t} for p, t in zip(self.prompts, texts, strict=True)]
        if trainer.is_global_zero:
            path = self.where / "samples.jsonl"
            with self._survives:
                append_rows(path, rows)
                write_readably(read_rows(path), path.with_suffix(".txt"))
            log_table(trainer, "samples/text", rows)

    def rewind(self, step: int) -> None:
        path = self.where / "samples.jsonl"
        rewind_rows(path, step)
        write_readably(read_rows(path), path.with_suffix(".txt"))


class ImageSamples(AbstractSamples):
    """Draws the first images of the validation split with their classes, predictions and probabilities.

    Writes `samples/STEP.png`, in about a second. Logs no numbers; on W&B the picture, `samples/images`. Training is bit
    for bit the same without it.

    Assumes what `ClassificationReport` does.

    Args:
        num_images: Images on the sheet, at most a batch, of the first process.
        folder: Where to write; None: the run's.
        every_n_validations: Validations from one time to the next.
    """

    def __init__(self, *, num_images: int = 16, folder: str | Path | None = None, every_n_validations: int = 1) -> None:
        super().__init__(folder, every_n_validations)
        require_count("num_images", num_images)
        self.num_images = num_images
        self._images: list[ClassifiedImage] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._is_due and batch_idx == 0 and trainer.is_global_zero:
            real = (batch.labels >= 0).nonzero().flatten()[: self.num_images]
            self._images = classified_images(batch, outputs, real)

    def make(self, trainer: Trainer, pl_module: Any) -> None:
        if not (trainer.is_global_zero and self._images):
            return
        path = self.where / "samples" / f"{step_of(trainer):08}.png"
        with self._survives:
            path.parent.mkdir(parents=True, exist_ok=True)
            title = f"validation after step {trainer.global_step}: true class, predicted class and its probability"
            draw_sheet(self._images, trainer.datamodule, path, title)  # type: ignore[attr-defined]
            log_picture(trainer, "samples/images", path, title)
        self._images = []

    def rewind(self, step: int) -> None:
        for path in (self.where / "samples").glob("[0-9]*.png"):
            if int(path.stem) >= step:
                path.unlink()


def write_readably(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The samples as a text; no file where there are none."""
    texts = [f"--- after step {row['step'] + 1}\n{printable(row['prompt'] + row['text'])}\n" for row in rows]
    if texts:
        path.write_text("\n".join(texts), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
