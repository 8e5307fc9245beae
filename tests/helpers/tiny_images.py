"""The image task's command line on tiny JPEG files, in this process."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = ("blue", "green", "red")


def image_folder(folder: Path, *, splits=("train", "test"), num_images=16, size=20) -> Path:
    """JPEG files of noise around one color a class: `SPLIT/CLASS/NN.jpg`."""
    root = folder / "images"
    if not root.exists():
        generator = np.random.default_rng(0)
        for split in splits:
            for channel, name in zip((2, 1, 0), CLASSES, strict=True):
                (root / split / name).mkdir(parents=True)
                for i in range(num_images):
                    pixels = generator.integers(0, 120, (size, size, 3))
                    pixels[..., channel] += 120
                    image = Image.fromarray(pixels.astype(np.uint8))
                    image.save(root / split / name / f"{i:02}.jpg", quality=90)
    return root


def tiny_image_config(folder: Path, *, network=None, solver=None, data=None, **trainer) -> Path:
    config = {
        "model": {
            "network": {"channels": [16, 16], "stem_stride": 2, **(network or {})},
            "solver": {"max_steps": 2, "mismatch": "raise", **(solver or {})},
            "optimizer": {"optimizer": "muon", "lr": 0.01, "ema_decay": 0.5},
        },
        "data": {
            "source": "folder",
            "path": str(image_folder(folder)),
            "image_size": 16,
            "batch_size": 8,
            "validation_fraction": 0.25,
            "augmentation": {"crop_padding": 2, "flip": True},
            "cache_dir": str(folder / "cache"),
            **(data or {}),
        },
        "trainer": {
            "max_steps": 12,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            **trainer,
        },
        "run": {"folder": str(folder / "runs")},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
