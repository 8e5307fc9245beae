"""The small runs of `benchmarks.cluster.faults`: data and configurations."""

from pathlib import Path
from typing import Any

import yaml

STEPS = 60
EVERY = 7
"""Maximum number of steps between two checkpoints."""


def write_language_config(folder: Path) -> Path:
    """Write a text of letters that follow a noisy rule, and its configuration."""
    text, value = [], 1
    for _ in range(4000):
        value = value * 1103515245 % 2**31 + 12345
        text.append(" " if value % 5 == 0 else chr(97 + value // 65536 % 16))
    (folder / "text.txt").write_text("".join(text))
    config = base_config(folder, "lm")
    config["model"]["network"] = {"d_model": 32, "num_heads": 2, "d_mlp": 64}
    config["data"] |= {"source": "files", "path": str(folder / "text.txt"), "tokenizer": "characters"}
    config["data"] |= {"context_length": 16}
    config["run"]["sample_tokens"] = 0
    return write(folder / "lm.yaml", config)


def write_image_config(folder: Path) -> Path:
    """Write JPEG files of noise around a color, read during training, and their configuration."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(24):
            pixels = generator.integers(0, 120, (20, 20, 3))
            pixels[..., channel] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"{i:02}.jpg")
    config = base_config(folder, "image")
    config["model"]["network"] = {"channels": [16, 16], "stem_stride": 2}
    config["data"] |= {"source": "folder", "path": str(folder / "images"), "image_size": 16, "in_memory": False}
    config["data"] |= {"validation_fraction": 0.25, "num_workers": 1}
    return write(folder / "image.yaml", config)


def base_config(folder: Path, name: str) -> dict[str, Any]:
    trainer = {"max_steps": STEPS, "val_check_interval": 15, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    return {
        "model": {
            "solver": {"max_steps": 3},
            "optimizer": {"optimizer": "muon", "lr": 0.01, "schedule": "cosine", "warmup_steps": 5, "ema_decay": 0.9},
        },
        "data": {"batch_size": 8, "cache_dir": str(folder / "cache" / name)},
        "trainer": trainer | {"accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0},
        "run": {"checkpoint_every_n_steps": EVERY},
    }


def write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path
