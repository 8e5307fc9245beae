"""What a classifier confuses: its confusion matrix, and the images that it is most sure of and wrong about."""

import csv
import heapq
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

MAX_CLASSES = 1000
"""With more classes no matrix: it would be larger than the model."""


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

    Example:
        `Trainer(callbacks=[ClassificationReport("runs/mine")]).test(task, data)`
    """

    def __init__(self, folder: str | Path, num_images: int = 40) -> None:
        self.folder, self.num_images = Path(folder), num_images
        self.matrix: MulticlassConfusionMatrix | None = None
        self.wrong: list[tuple[float, int, Tensor, int, int]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with an empty matrix."""
        num_classes: int = trainer.datamodule.num_classes  # type: ignore[attr-defined]
        self.wrong = []
        self.matrix = None
        if num_classes <= MAX_CLASSES:
            self.matrix = MulticlassConfusionMatrix(num_classes, ignore_index=-100).to(pl_module.device)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Count, and keep the images that are most surely wrong."""
        logits_BV: Tensor = outputs
        if self.matrix is not None:
            self.matrix.update(logits_BV, batch.labels)
        confidence_B, predictions_B = logits_BV.softmax(-1).max(-1)
        wrong_B = (predictions_B != batch.labels) & (batch.labels >= 0)
        for i in wrong_B.nonzero().flatten().tolist():
            item = (float(confidence_B[i]), -len(self.wrong) - batch_idx * len(wrong_B) - i)
            if len(self.wrong) < self.num_images or item[0] > self.wrong[0][0]:
                entry = (*item, batch.images[i].float().cpu(), int(batch.labels[i]), int(predictions_B[i]))
                push = heapq.heappush if len(self.wrong) < self.num_images else heapq.heapreplace
                push(self.wrong, entry)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, outside training."""
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *step: Any) -> None:
        """Count, outside training."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, *step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, outside training."""
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts = None if self.matrix is None else self.matrix.compute().cpu().numpy()
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if counts is not None:
            with (self.folder / "confusion_matrix.csv").open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["true class", *data.class_names])
                writer.writerows([name, *row.tolist()] for name, row in zip(data.class_names, counts, strict=True))
            draw_matrix(counts, data.class_names, self.folder / "confusion_matrix.png")
        if self.wrong:
            state = data.preprocessing_state()
            images = sorted(self.wrong, key=lambda entry: entry[:2], reverse=True)
            draw_sheet(images, data.class_names, state["mean"], state["std"], self.folder / "wrong_images.png")


def draw_matrix(counts: Any, names: list[str], path: Path) -> None:
    """Fractions of each true class; numbers where they can be read."""
    from matplotlib.figure import Figure

    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(14.0, 3 + 0.45 * len(names))
    canvas = Figure(figsize=(size, size), layout="constrained")
    axis = canvas.subplots()
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="predicted class", ylabel="true class", title="fraction of each true class")
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for (i, j), fraction in np.ndenumerate(fractions):
            if counts[i, j]:
                color = "white" if fraction > 0.5 else "black"
                axis.text(j, i, f"{fraction:.2f}", ha="center", va="center", color=color, fontsize="small")
    canvas.savefig(path, dpi=120)


def draw_sheet(
    entries: list[Any],
    names: list[str],
    mean: list[float],
    std: list[float],
    path: Path,
    title: str = "wrongly classified: true class, predicted class and its probability",
) -> None:
    """Images with their true class, the prediction and its probability; what is wrong stands in bold."""
    from matplotlib.figure import Figure

    columns = 8
    rows = -(-len(entries) // columns)
    canvas = Figure(figsize=(1.5 * columns, 1.9 * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).flat
    shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    for axis, (confidence, _, image_CHW, label, prediction) in zip(axes, entries, strict=False):
        pixels = (image_CHW * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
        axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray")
        weight = "normal" if label == prediction else "bold"
        text = f"{names[label]}\n{names[prediction]} {confidence:.0%}"
        axis.set_title(text, fontsize="x-small", fontweight=weight)
    for axis in axes:
        axis.set_axis_off()
    for axis in canvas.axes:
        axis.set_axis_off()
    canvas.suptitle(title, fontsize="small")
    canvas.savefig(path, dpi=120)
