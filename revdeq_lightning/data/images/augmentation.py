"""Augment a batch on its device, with separate random decisions for every image."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from revdeq_lightning.equilibrium.validation import require_count, require_in_range
from revdeq_lightning.host import constant, send

MAX_MAGNITUDE = 30
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_GEOMETRIC = range(1, 6)
_SIGNED_COLORS = range(6, 10)


@dataclass
class AugmentationConfig:
    """Augmentations of training images, applied in this order; none by default.

    Attributes:
        crop_padding: Pad the image with this many black pixels before a random crop of the original size (CIFAR: 4).
            Not together with random_resized_crop.
        random_resized_crop: Range of the area fraction of a random crop, which is then resized (ImageNet: [0.08, 1]),
            with an aspect ratio between 3/4 and 4/3; null for none. Images decoded on demand are cropped from the
            original, prepared ones from their center square.
        flip: Mirror each image with probability 1/2.
        randaugment_ops: Number of RandAugment operations per image; 0 for none.
        randaugment_magnitude: Their strength, 0 to 30.
        erasing_probability: Fraction of images in which a random rectangle, 2 to 33 % of the area, is set to the mean
            color.
        mixup_alpha: Above 0: mix each image with another one, with a share from Beta(alpha, alpha).
        cutmix_alpha: Above 0: paste a part of another image, with an area from Beta(alpha, alpha). With both, each
            image uses one of the two with equal probability.
        mix_probability: Fraction of the images that are mixed, if any are.
    """

    crop_padding: int = 0
    random_resized_crop: tuple[float, float] | None = None
    flip: bool = False
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    erasing_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "randaugment_ops"):
            require_count(name, getattr(self, name), at_least=0)
        for name in ("mixup_alpha", "cutmix_alpha"):
            require_in_range(name, getattr(self, name), "[0, inf)")
        for name in ("erasing_probability", "mix_probability"):
            require_in_range(name, getattr(self, name), "[0, 1]")
        require_in_range("randaugment_magnitude", self.randaugment_magnitude, f"[0, {MAX_MAGNITUDE}]")
        if self.random_resized_crop is not None:
            scale = tuple(self.random_resized_crop)
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"random_resized_crop must be two ascending fractions of the area, got {list(scale)}.")
            self.random_resized_crop = (scale[0], scale[1])
            if self.crop_padding:
                got = f"got {self.crop_padding} and {list(scale)}"
                raise ValueError(f"crop_padding and random_resized_crop are two ways to crop: use one of them, {got}.")


NO_AUGMENTATION = AugmentationConfig()


def uniform(keys: Tensor, seed: int, purpose: str, count: int, device: torch.device | None = None) -> Tensor:
    """`count` uniform numbers in [0, 1) for each key, float32 `(batch, count)`; sent to `device` if given.

    SplitMix64 seeded with (seed, key, purpose): the numbers of an item are the same on every device, worker and rank
    and do not depend on the rest of the batch, and different purposes are independent.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    stream = torch.tensor(_signed(zlib.crc32(purpose.encode()) ^ (seed * _GOLDEN)), device=keys.device)
    state = _scrambled(keys + _scrambled(stream)).unsqueeze(1)
    steps = torch.arange(1, count + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _scrambled(state + steps)
    numbers = _shifted(bits, 40).to(torch.float32) * 2.0**-24  # exact
    return numbers if device is None else send(numbers, device)


def _signed(value: int) -> int:
    """The integer modulo 2^64 as a signed int64."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; the shift of int64 is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _scrambled(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _FACTORS[0]
    value = (value ^ _shifted(value, 27)) * _FACTORS[1]
    return value ^ _shifted(value, 31)


def crop_and_flip(images: Tensor, config: AugmentationConfig, keys: Tensor, seed: int) -> Tensor:
    """Crop at random, and mirror with probability 1/2."""
    size = images.shape[-1]
    if config.crop_padding:
        offsets = (uniform(keys, seed, "crop", 2, images.device) * (2 * config.crop_padding + 1)).long()
        images = padded_crop(images, config.crop_padding, offsets[:, 0], offsets[:, 1])
    if config.random_resized_crop is not None:
        boxes = random_box(uniform(keys, seed, "crop", 4, images.device), size, size, config.random_resized_crop)
        images = resized_crop(images, boxes)
    if config.flip:
        mirrored = uniform(keys, seed, "flip", 1, images.device) < 0.5
        images = torch.where(mirrored[:, :, None, None], images.flip(-1), images)
    return images


def padded_crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad each image with black and crop it to the original size at its (top, left)."""
    height, width = images.shape[-2:]
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view of all crops
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def random_box(draws: Tensor, width: int, height: int, scale: tuple[float, float]) -> Tensor:
    """A box (left, top, width, height) in whole pixels, `(..., 4)`, from uniform draws of the same shape.

    Its area is a fraction of the image's, uniform in `scale`, its ratio log-uniform in 3/4 ... 4/3, its sides at most
    the image's.
    """
    area = (scale[0] + (scale[1] - scale[0]) * draws[..., 0]) * (width * height)
    ratio = ((2 * draws[..., 1] - 1) * math.log(4 / 3)).exp()
    left, box_width = _interval(area * ratio, draws[..., 2], width)
    top, box_height = _interval(area / ratio, draws[..., 3], height)
    return torch.stack([left, top, box_width, box_height], dim=-1)


def _interval(squared_length: Tensor, draws: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Start and length, in whole pixels, of a random section of a side."""
    length = squared_length.sqrt().round().clamp(1, side)
    return (draws * (side - length + 1)).floor(), length


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Crop each image to its box (left, top, width, height) and resize it bilinearly to the image's size."""
    height, width = images.shape[-2:]
    left, top, box_width, box_height = boxes.to(torch.float32).unbind(-1)
    columns = _sampled(left, box_width, width)[:, None, :].expand(-1, height, -1)
    rows = _sampled(top, box_height, height)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([columns * (2 / width) - 1, rows * (2 / height) - 1], dim=-1)
    return F.grid_sample(images.to(torch.float32), grid, align_corners=False).round_().to(images.dtype)


def _sampled(start: Tensor, length: Tensor, count: int) -> Tensor:
    """Where `count` pixels that cover (start, length) take their value, within the centers of the outermost pixels."""
    places = start[:, None] + (torch.arange(count, device=start.device) + 0.5) * (length / count)[:, None]
    return torch.minimum(torch.maximum(places, start[:, None] + 0.5), (start + length)[:, None] - 0.5)


def rand_augment(images: Tensor, num_ops: int, magnitude: int, keys: Tensor, seed: int) -> Tensor:
    """Apply `num_ops` operations, one after the other, to each image; uint8 `(batch, 1 or 3, height, width)`.

    Operations are drawn independently and uniformly, and so are the signs of those with a direction. As in torchvision,
    `magnitude` 30 is shear 0.3, translation 45 % of the side, rotation 30 degrees, brightness, color, contrast and
    sharpness 0.9 either way, 4 bits, solarization above 0.

    Source: Cubuk et al. 2019, arXiv:1909.13719.
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


class Mixed(NamedTuple):
    """Images, the index of the image mixed into each, and the share of the original label, float32 `(batch,)`."""

    images: Tensor
    partners: Tensor
    weights: Tensor


def erase(images: Tensor, probability: float, keys: Tensor, seed: int) -> Tensor:
    """Set a random rectangle of some normalized images to 0, the mean color.

    Its area is 2 to 33 % of the image's, its ratio log-uniform in 0.3 ... 3.3, its sides at most the image's.

    Source: Zhong et al. 2017, arXiv:1708.04896.
    """
    height, width = images.shape[-2:]
    draws = uniform(keys, seed, "erase", 5, images.device)
    area = (0.02 + 0.31 * draws[:, 1]) * (height * width)
    ratio = (math.log(0.3) + math.log(3.3 / 0.3) * draws[:, 2]).exp()
    top, box_height = _interval(area * ratio, draws[:, 3], height)
    left, box_width = _interval(area / ratio, draws[:, 4], width)
    inside = _inside(top, left, top + box_height, left + box_width, height, width)
    return images.masked_fill(inside & (draws[:, 0] < probability)[:, None, None, None], 0)


def mix(images: Tensor, config: AugmentationConfig, keys: Tensor, seed: int) -> Mixed:
    """Mix each image with its predecessor in the batch (the first with the last), by mixup or cutmix.

    The partner is random because the training order is.

    Source: Zhang et al. 2017, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899.
    """
    height, width = images.shape[-2:]
    partners = torch.arange(len(images), device=images.device).roll(1)
    other = images[partners]
    draws = uniform(keys, seed, "mix", 7, images.device)
    mixes = draws[:, 0] < config.mix_probability
    cuts = draws[:, 1] < (config.cutmix_alpha > 0) * (0.5 if config.mixup_alpha else 1.0)
    share = torch.ones_like(draws[:, 0])  # share of the image itself
    if config.mixup_alpha:
        share = torch.where(mixes & ~cuts, symmetric_beta(draws[:, 2:4], config.mixup_alpha), share)
    weights = share
    images = torch.lerp(other, images, share[:, None, None, None])
    if config.cutmix_alpha:
        cut = (1 - symmetric_beta(draws[:, 2:4], config.cutmix_alpha)).sqrt() / 2
        row, column = (draws[:, 5] * height).floor(), (draws[:, 6] * width).floor()
        top, bottom = (row - (cut * height).floor()).clamp(min=0), (row + (cut * height).floor()).clamp(max=height)
        left, right = (column - (cut * width).floor()).clamp(min=0), (column + (cut * width).floor()).clamp(max=width)
        chosen = mixes & cuts
        inside = _inside(top, left, bottom, right, height, width) & chosen[:, None, None, None]
        images = torch.where(inside, other, images)
        weights = torch.where(chosen, 1 - (bottom - top) * (right - left) / (height * width), weights)
    return Mixed(images, torch.where(weights < 1, partners, partners.roll(-1)), weights)


def symmetric_beta(draws: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) from two uniform numbers each, `(batch, 2)`, for any alpha > 0.

    Source: Devroye 1996, "Random variate generation in one line of code", section 3.
    """
    radius, angle = draws.to(torch.float64).unbind(1)
    power = (1 - radius) ** (1 / alpha)  # 1 - radius is never 0
    cosine = torch.cos(2 * math.pi * angle)
    squared = (1 - power) * cosine**2
    return (0.5 + 0.5 * cosine.sign() * (squared / (squared + power).clamp(min=1e-300)).sqrt()).to(draws.dtype)


def _inside(top: Tensor, left: Tensor, bottom: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Whether each pixel lies in its image's rectangle, `(batch, 1, height, width)`."""
    rows = torch.arange(height, device=top.device)[:, None]
    columns = torch.arange(width, device=top.device)
    top, left, bottom, right = (side[:, None, None, None] for side in (top, left, bottom, right))
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def augment_pixels(images: Tensor, config: AugmentationConfig, keys: Tensor, seed: int) -> Tensor:
    """Augment square images before normalization: crop, flip, RandAugment; uint8 in and out.

    The keys, int64 `(batch,)`, are on the host, which draws: every random number is a function of key and `seed`.
    """
    images = crop_and_flip(images, config, keys, seed)
    if config.randaugment_ops:
        images = rand_augment(images, config.randaugment_ops, config.randaugment_magnitude, keys, seed)
    return images


def augment_normalized(images: Tensor, config: AugmentationConfig, keys: Tensor, seed: int) -> Mixed:
    """Augment after normalization: random erasing, mixup, cutmix; float32 in and out."""
    if config.erasing_probability:
        images = erase(images, config.erasing_probability, keys, seed)
    if config.mixup_alpha or config.cutmix_alpha:
        return mix(images, config, keys, seed)
    device = images.device
    return Mixed(images, torch.arange(len(images), device=device), torch.ones(len(images), device=device))
