"""Decode images to pixels, and resize and crop them for evaluation."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional as TF

from revdeq_lightning.data.loading.files import list_files
from revdeq_lightning.host import constant

UNDECODABLE = ("raise", "skip")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
INTERPOLATION, RESAMPLING = "bicubic", Image.Resampling.BICUBIC  # antialiased
_MODES = {1: "L", 3: "RGB"}


class UndecodableImageError(ValueError):
    """An image cannot be decoded; the message names it."""

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises a worker's error with the worker's traceback as its message; keep one line.
        super().__init__(message.strip().rpartition("\n")[2].rpartition(f"{type(self).__name__}: ")[2])


class ImageSizes(NamedTuple):
    """Target size: resize the shorter side to `resize`, crop to a square; gray (1 channel) or RGB (3)."""

    channels: int
    image_size: int
    resize: int


def skipped_message(names: Sequence[str]) -> str:
    """Warn with number and names of images that cannot be decoded."""
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{len(names)} image(s) that cannot be decoded are skipped: {listed}."


def decode_image(content: bytes | NDArray[np.uint8], name: str, channels: int) -> Image.Image:
    """Decode a file's bytes, or pixels `(height, width, 1 or 3)`, of any mode to gray (1 channel) or RGB (3).

    The EXIF orientation is applied. Gray is converted to RGB by repetition and RGB to gray by luma; palette and CMYK
    are converted; transparency is dropped; an animation keeps its first frame. 16-bit gray keeps the upper 8 bits, or
    those of 12 if no pixel of the file needs more (microscopes, X-ray). Pixels without a fixed range, and what is no
    image or damaged, raise UndecodableImageError, which names it.
    """
    try:
        if isinstance(content, np.ndarray):
            image = Image.fromarray(content.squeeze(-1) if content.shape[-1] == 1 else content)
        else:
            file = Image.open(io.BytesIO(content))
            is_deep = ";16" in str(file.tile)
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PPM"):
                # Pillow scales a graymap with any other range in its header to 16 bits, and colors to 8.
                pixels = np.asarray(image)
                bits = 12 if is_deep and pixels.max() < 1 << 12 else 16
                image = Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))
                if getattr(file, "tag_v2", {}).get(262) == 0:  # white is zero, which Pillow applies to 8 bits only
                    image = ImageOps.invert(image)
            elif is_deep and 0 < np.asarray(image.convert("RGB")).max() < 16:
                raise ValueError("colors of 12 bits or fewer in 16 are not supported: convert it to 8 bits")
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no fixed range: convert it to 8 or 16 bits")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert(_MODES[channels])
    except MemoryError:
        raise
    except Exception as error:  # whatever a codec raises
        reason = str(error).partition("\n")[0]
        if reason.startswith("cannot identify image file"):
            reason = "no image format that Pillow knows" if len(content) else "the file is empty"
        raise UndecodableImageError(
            f'cannot decode the image {name} ({reason}): repair or remove it, or set undecodable="skip".'
        ) from None


def evaluation_resize(image_size: int, crop_fraction: float | None) -> int:
    """Length of the shorter side before the center crop; `crop_fraction` None: 0.875 above 64 pixels, otherwise 1."""
    return round(image_size / (crop_fraction or (0.875 if image_size > 64 else 1.0)))


def evaluation_transform(image: Image.Image, image_size: int, resize: int) -> NDArray[np.uint8]:
    """Torchvision's `Resize` of the shorter side (bicubic, antialiased) and `CenterCrop`; `(channels, size, size)`."""
    return to_array(TF.center_crop(TF.resize(image, [resize], InterpolationMode.BICUBIC), [image_size]))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels with the channels first."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map uint8 images to float32 of about zero mean and unit variance; `mean` and `std` on the scale 0 ... 1."""
    scale = constant(tuple(1 / (255 * s) for s in std), images.device)
    offset = constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), images.device)
    return images.to(torch.float32).mul_(scale[:, None, None]).add_(offset[:, None, None])


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """An image file, or those in a folder and its subfolders without hidden ones, by name; else FileNotFoundError."""
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.exists():
        raise FileNotFoundError(f"no such image or folder of images: {root} (looked in {Path.cwd()})")
    files = sorted(root / name for name in list_files(root).files if name.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise FileNotFoundError(f"no images ({suffixes}) in {root} (looked in {Path.cwd()}): use another folder.")
    return files
