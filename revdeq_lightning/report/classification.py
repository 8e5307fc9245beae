"""A classifier's confusion matrix and its most confident mistakes."""

import csv
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from revdeq_lightning.loggers.endurance import Survives
from revdeq_lightning.loggers.pictures import ClassifiedImage, classified_images, draw_matrix, draw_sheet

MAX_CLASSES = 1000
"""With more classes there is no matrix, as it could be larger than the model."""


class ClassificationReport(Callback):
    """Writes `confusion_matrix.csv`, `confusion_matrix.png` and `wrong_images.png` after a test.

    A validation outside training (`trainer.validate`) counts as a test. Rows of the matrix are true classes, columns
    predictions. The sheet shows the wrongly classified images with the highest probability, of the first process. Logs
    no keys.

    Assumes that `test_step` and `validation_step` return the logits of a batch with `images` and `labels`, negative for
    what is no image, and that the data has `class_names` and `preprocessing_state()`.

    Args:
        folder: Where to write.
        num_images: Images on the sheet.
    """

    def __init__(self, folder: str | Path, num_images: int = 40) -> None:
        self.folder, self.num_images = Path(folder), num_images
        self.matrix: MulticlassConfusionMatrix | None = None
        self.wrong: list[ClassifiedImage] = []
        self._survives = Survives("drawing the predictions")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        needed = ("num_classes", "class_names", "preprocessing_state")
        if missing := [name for name in needed if not hasattr(data, name)]:
            raise ValueError(
                f"ClassificationReport needs a data module with {missing[0]}, got {type(data).__name__}: use"
                " ImageDataModule, or remove the callback"
            )
        num_classes: int = data.num_classes
        self.wrong = []
        self.matrix = None
        if num_classes <= MAX_CLASSES:
            self.matrix = MulticlassConfusionMatrix(num_classes, ignore_index=-100).to(pl_module.device)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        logits_BV: Tensor = outputs
        if self.matrix is not None:
            self.matrix.update(logits_BV, batch.labels)
        probabilities_B, predictions_B = logits_BV.softmax(-1).max(-1)
        wrong = ((predictions_B != batch.labels) & (batch.labels >= 0)).nonzero().flatten()
        surest = wrong[probabilities_B[wrong].argsort(descending=True, stable=True)[: self.num_images]]
        found = [*self.wrong, *classified_images(batch, logits_BV, surest)]
        self.wrong = sorted(found, key=lambda image: -image.probability)[: self.num_images]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *step: Any) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, *step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = None if self.matrix is None else self.matrix.compute().cpu().numpy()
        if trainer.is_global_zero:
            with self._survives:
                self._draw(trainer.datamodule, counts)  # type: ignore[attr-defined]

    def _draw(self, data: Any, counts: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if counts is not None:
            with (self.folder / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["true class", *data.class_names])
                writer.writerows([name, *row.tolist()] for name, row in zip(data.class_names, counts, strict=True))
            draw_matrix(counts, data.class_names, self.folder / "confusion_matrix.png")
        if self.wrong:
            title = "wrongly classified: true class, predicted class and its probability"
            draw_sheet(self.wrong, data, self.folder / "wrong_images.png", title)
