"""Class probabilities from a checkpoint alone: it holds settings, class names and the preparation of images."""

import csv
from pathlib import Path
from typing import Any, Literal

import torch

from revdeq_lightning.cli.language_inference import read_trained
from revdeq_lightning.models import AbstractClassifier, ClassifierConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier


def load_classifier(ckpt_path: str | Path, device: str = "cpu") -> tuple[AbstractClassifier, dict[str, Any]]:
    """Model of a checkpoint and the preparation of its images; errors as of `read_trained`."""
    settings, weights, state = read_trained(ckpt_path, "preprocessing", "an image classifier", "runs/image")
    model = build_image_classifier(ClassifierConfig(**settings["network"]), SolverConfig(**settings["solver"]))
    model.load_state_dict(weights)
    return model.to(device).eval(), state


@torch.no_grad()
def predict_images(
    ckpt_path: str,
    images: str,
    output: str = "predictions.csv",
    batch_size: int = 64,
    undecodable: Literal["raise", "skip"] = "raise",
    device: str = "cpu",
) -> str:
    """Write the class probabilities of image files to a CSV file: path, most likely class, one column a class.

    Args:
        ckpt_path: Checkpoint of a training run.
        images: Image file, or folder, searched with its subfolders.
        output: CSV file to write.
        batch_size: Images at a time.
        undecodable: What to do with a file that cannot be decoded: raise, or skip with a warning.
        device: cpu, cuda, ...

    Returns:
        One line for the user.
    """
    from revdeq_lightning.data.images.module import find_images, preprocess_files

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    model, state = load_classifier(ckpt_path, device)
    names = state["class_names"]
    paths = find_images(images)
    num_written = 0
    with Path(output).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "prediction", *names])
        for start in range(0, len(paths), batch_size):
            files, images_BCHW = preprocess_files(paths[start : start + batch_size], state, undecodable=undecodable)
            if not files:
                continue
            probabilities_BV = model(images_BCHW.to(device)).logits_BV.float().softmax(-1).cpu()
            for path, row in zip(files, probabilities_BV, strict=True):
                writer.writerow([path, names[int(row.argmax())], *(f"{p:.6f}" for p in row.tolist())])
            num_written += len(files)
    if not num_written:
        raise ValueError(f"none of the {len(paths)} files in {images} could be decoded")
    return f"{num_written:,} images, class probabilities in {output}"
