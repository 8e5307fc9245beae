"""Augment a batch on its device, with separate random decisions for every image."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from revdeq_lightning.data.images.keyed_random import uniform
from revdeq_lightning.data.images.randaugment import MAX_MAGNITUDE, rand_augment
from revdeq_lightning.equilibrium.validation import require_count, require_in_range


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


class Mixed(NamedTuple):
    """Images, the index of the image mixed into each, and the share of the original label, float32 `(batch,)`."""

    images: Tensor
    partners: Tensor
    weights: Tensor


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
