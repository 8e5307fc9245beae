"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) with its 14 operations, drawn per image."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from revdeq_lightning.data.images.keyed_random import uniform
from revdeq_lightning.host import constant, send

MAX_MAGNITUDE = 30
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_GEOMETRIC = range(1, 6)
_SIGNED_COLORS = range(6, 10)


def rand_augment(images: Tensor, num_ops: int, magnitude: int, keys: Tensor, seed: int) -> Tensor:
    """Apply `num_ops` operations, one after the other, to each image; uint8 `(batch, 1 or 3, height, width)`.

    Operations are drawn independently and uniformly, and so are the signs of those with a direction. As in torchvision,
    `magnitude` 30 is shear 0.3, translation 45 % of the side, rotation 30 degrees, brightness, color, contrast and
    sharpness 0.9 either way, 4 bits, solarization above 0.
    """
    for number in range(num_ops):
        draws = uniform(keys, seed, f"randaugment/{number}", 2)
        operations = (draws[:, 0] * len(OPERATIONS)).long()
        signs = 1 - 2 * (draws[:, 1] < 0.5).to(torch.float32)
        images = apply_operations(images, operations, signs, magnitude)
    return images


def apply_operations(images: Tensor, operations: Tensor, signs: Tensor, magnitude: int) -> Tensor:
    """Apply one operation per image; `operations` (indices of `OPERATIONS`) and `signs` are on the CPU."""
    images = images.clone()
    geometric = ((operations >= _GEOMETRIC.start) & (operations < _GEOMETRIC.stop)).nonzero().flatten()
    if len(geometric):
        rows = send(geometric, images.device)
        matrices = _matrices(operations[geometric], signs[geometric], magnitude, *images.shape[-2:])
        images[rows] = affine(images[rows], matrices)
    for operation in range(_GEOMETRIC.stop, len(OPERATIONS)):
        for sign in (1, -1) if operation in _SIGNED_COLORS else (None,):
            chosen = operations == operation if sign is None else (operations == operation) & (signs == sign)
            if len(rows := send(chosen.nonzero().flatten(), images.device)):
                images[rows] = _color(images[rows], OPERATIONS[operation], (sign or 1) * magnitude / MAX_MAGNITUDE)
    return images


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample each pixel p at M p bilinearly, black outside; M `(batch, 2, 3)` on the host, pixels from the center."""
    height, width = images.shape[-2:]
    half = torch.tensor([width / 2, height / 2])
    relative = matrices * torch.cat([half, half.new_ones(1)]) / half[:, None]
    grid = F.affine_grid(send(relative, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.to(torch.float32), grid, align_corners=False).round_().to(images.dtype)


def _matrices(operations: Tensor, signs: Tensor, magnitude: int, height: int, width: int) -> Tensor:
    fraction = magnitude / MAX_MAGNITUDE
    shear = signs * 0.3 * fraction
    angle = signs * math.radians(30.0 * fraction)
    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    shift_x, shift_y = (signs * int(150.0 / 331.0 * side * fraction) for side in (width, height))

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, dim=-1).view(-1, 2, 3)

    of_operation = torch.stack(
        [
            matrix(one, shear, shear * height / 2, zero, one, zero),  # the upper edge stays
            matrix(one, zero, zero, shear, one, shear * width / 2),  # the left edge stays
            matrix(one, zero, -shift_x, zero, one, zero),
            matrix(one, zero, zero, zero, one, -shift_y),
            matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero),
        ]
    )
    return of_operation[operations - _GEOMETRIC.start, torch.arange(len(operations))]


def sharpen(images: Tensor, factor: float) -> Tensor:
    """As torchvision's `adjust_sharpness`, which sends its kernel to the device and waits for it."""
    channels, pixels = images.shape[1], images.to(torch.float32)
    kernel = constant((1 / 13,) * 4 + (5 / 13,) + (1 / 13,) * 4, images.device).view(1, 1, 3, 3)
    blurred = F.conv2d(pixels, kernel.expand(channels, 1, 3, 3), groups=channels).round_()
    inner = pixels[..., 1:-1, 1:-1]
    inner.add_(blurred.sub_(inner), alpha=1 - factor)
    return pixels.clamp_(0, 255).to(images.dtype)


def _color(images: Tensor, operation: str, fraction: float) -> Tensor:
    """One color operation on all images."""
    factor = 1 + 0.9 * fraction
    operations: dict[str, Callable[[], Any]] = {
        "Brightness": lambda: TF.adjust_brightness(images, factor),
        "Color": lambda: TF.adjust_saturation(images, factor),
        "Contrast": lambda: TF.adjust_contrast(images, factor),
        "Sharpness": lambda: sharpen(images, factor),
        "Posterize": lambda: TF.posterize(images, 8 - round(4 * fraction)),
        "Solarize": lambda: TF.solarize(images, 255 * (1 - fraction)),
        "AutoContrast": lambda: TF.autocontrast(images),
        "Equalize": lambda: TF.equalize(images),
    }
    result: Tensor = operations[operation]()
    return result
