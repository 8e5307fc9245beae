"""Pictures of a classifier's predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revdeq_lightning.loggers.plots import saved_figure


class ClassifiedImage(NamedTuple):
    """An image with its true class, the predicted class and its probability."""

    image_CHW: Tensor
    label: int
    prediction: int
    probability: float


def classified_images(batch: Any, logits_BV: Tensor, indices: Tensor) -> list[ClassifiedImage]:
    """Move the images at these indices to the CPU, with their predictions."""
    probabilities_B, predictions_B = logits_BV.softmax(-1).max(-1)
    return [
        ClassifiedImage(
            batch.images[i].float().cpu(), int(batch.labels[i]), int(predictions_B[i]), float(probabilities_B[i])
        )
        for i in indices.tolist()
    ]


def draw_matrix(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix as fractions of each true class, with numbers if there are few classes."""
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(14.0, 3 + 0.45 * len(names))
    with saved_figure(path, size, size) as (axis,):
        axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        axis.set(xlabel="predicted class", ylabel="true class", title="fraction of each true class")
        if len(names) <= 40:
            axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(names)), names)
        if len(names) <= 20:
            for i, j in np.argwhere(counts):
                color = "white" if fractions[i, j] > 0.5 else "black"
                axis.text(j, i, f"{fractions[i, j]:.2f}", ha="center", va="center", color=color, fontsize="small")


def draw_sheet(images: Sequence[ClassifiedImage], data: Any, path: Path, title: str) -> None:
    """Draw images, at least one, with their true class, the prediction and its probability; wrong ones are in bold.

    The data module has `class_names` and `preprocessing_state()`.
    """
    columns, names, state = 8, data.class_names, data.preprocessing_state()
    rows = -(-len(images) // columns)
    shift, scale = (torch.tensor(state[key])[:, None, None] for key in ("mean", "std"))
    with saved_figure(path, 1.5 * columns, 1.9 * rows, rows, columns) as axes:
        for axis, (image_CHW, label, prediction, probability) in zip(axes, images, strict=False):
            pixels = (image_CHW * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
            axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray")
            weight = "normal" if label == prediction else "bold"
            text = f"{names[label]}\n{names[prediction]} {probability:.0%}"
            axis.set_title(text, fontsize="x-small", fontweight=weight)
        for axis in axes:
            axis.set_axis_off()
        axes[0].figure.suptitle(title, fontsize="small")
