"""Images per second that one core decodes for training with `DecodedImages`, for `benchmarks.cluster.scaling`.

The images have ImageNet's mean size, 500 x 375 pixels and about 115 kB, and the amplitude spectrum of photographs, 1/f.
"""

import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from revdeq_lightning.data.images.augmentation import AugmentationConfig
from revdeq_lightning.data.images.module import ImageDataModule

IMAGES, PASSES = 64, 5
WIDTH, HEIGHT = 500, 375


class Decoded(NamedTuple):
    """Images per second of processor time, and bytes per file."""

    images_per_second: float
    file_bytes: float


def photograph(generator: np.random.Generator, file_bytes: float) -> bytes:
    """A JPEG file of 1/f noise, at the first quality that gives at least this size."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    noise = generator.normal(size=(3, HEIGHT, WIDTH))
    planes = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(HEIGHT, WIDTH))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    # Brightness varies three times as much as color.
    pixels = 128 + 45 * planes[:1] + 15 * planes
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    for quality in range(50, 96):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() >= file_bytes:
            break
    return buffer.getvalue()


def decode(file_bytes: float, image_size: int) -> Decoded:
    """Time the training split of a folder of such images: read, decode, crop at random, resize."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for index in range(IMAGES + 2):
            split = "train" if index < IMAGES else "val"
            path = Path(folder, split, str(index % 2), f"{index}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photograph(generator, file_bytes))
            sizes.append(path.stat().st_size)
        data = ImageDataModule(
            "folder",
            path=folder,
            image_size=image_size,
            in_memory=False,
            batch_size=IMAGES,
            num_workers=0,
            augmentation=AugmentationConfig(random_resized_crop=(0.08, 1.0)),
            cache_dir=str(Path(folder, "cache")),
        )
        data.setup("fit")
        loader = data.train_dataloader()
        threads, seconds = torch.get_num_threads(), []
        torch.set_num_threads(1)
        for _ in range(PASSES + 1):  # the first opens files and modules
            begin = time.process_time()
            for batch in loader:
                if batch.images.shape != (IMAGES, 3, image_size, image_size):
                    raise RuntimeError(f"unexpected batch shape {tuple(batch.images.shape)}")
            seconds.append(time.process_time() - begin)
        torch.set_num_threads(threads)
    return Decoded(IMAGES / statistics.median(seconds[1:]), statistics.fmean(sizes))
