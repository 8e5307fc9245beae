import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from scipy import stats
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import InterpolationMode, RandAugment, functional as TF

from revdeq_lightning.data.images.augmentation import (
    MAX_MAGNITUDE,
    OPERATIONS,
    AugmentationConfig,
    apply_operations,
    augment_normalized,
    augment_pixels,
    crop_and_flip,
    erase,
    mix,
    padded_crop,
    rand_augment,
    random_box,
    resized_crop,
    symmetric_beta,
    uniform,
)
from revdeq_lightning.data.images.decoding import normalize

MANY = torch.arange(20000)


def images(number=6, channels=3, height=12, width=12, seed=0):
    """Smooth in part, so that equalization and contrast have something to do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 120, (number, channels, height, width), generator=generator)
    ramp = torch.linspace(0, 130, height)[:, None] + torch.arange(width) % 3
    return (noise + ramp.long()).to(torch.uint8)


# Random numbers


def _splitmix64(state):
    """The published generator, in Python's integers: (next state, output)."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, z ^ (z >> 31)


def test_numbers_are_those_of_splitmix64_started_from_the_mixed_key():
    def mixed(value):
        return _splitmix64((value - 0x9E3779B97F4A7C15) % 2**64)[1]

    keys = (0, 1, 2**40)
    for seed, purpose in itertools.product((0, 5), ("crop", "flip")):
        start = mixed(zlib.crc32(purpose.encode()) ^ (seed * 0x9E3779B97F4A7C15 % 2**64))
        expected = []
        for key in keys:
            state = mixed((key + start) % 2**64)
            for _ in range(3):
                state, output = _splitmix64(state)
                expected.append((output >> 40) / 2**24)
        assert uniform(torch.tensor(keys), seed, purpose, 3).flatten().tolist() == expected
    assert _splitmix64(0)[1] == 0xE220A8397B1DCDAF  # published


def test_numbers_are_uniform_and_independent_between_keys_seeds_and_purposes():
    columns = [
        *uniform(MANY, 0, "crop", 3).unbind(1),
        uniform(MANY, 1, "crop", 1)[:, 0],
        uniform(MANY, 0, "flip", 1)[:, 0],
        uniform(MANY + 50000, 0, "crop", 1)[:, 0],  # the next epoch
        uniform(MANY, 0, "crop", 1)[:, 0].roll(1),
    ]
    for column in columns:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
        assert 0 <= column.min() < column.max() < 1
    correlations = np.corrcoef(torch.stack(columns).numpy()) - np.eye(len(columns))
    assert np.abs(correlations).max() < 4.5 / math.sqrt(len(MANY))


# Crop and flip


def test_padded_crop_is_index_arithmetic():
    batch = images(5, height=6, width=7)
    top, left = torch.tensor([0, 4, 2, 1, 3]), torch.tensor([4, 0, 2, 3, 1])
    result = padded_crop(batch, 2, top, left)
    for n, c, y, x in itertools.product(range(5), range(3), range(6), range(7)):
        source_y, source_x = y + int(top[n]) - 2, x + int(left[n]) - 2
        inside = 0 <= source_y < 6 and 0 <= source_x < 7
        assert result[n, c, y, x] == (batch[n, c, source_y, source_x] if inside else 0)


def test_crops_and_flips_are_drawn_evenly_for_each_image():
    batch = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(len(MANY), -1, -1, -1)
    config = AugmentationConfig(crop_padding=1, flip=True)
    result = crop_and_flip(batch, config, MANY, 0)
    padded = np.pad(np.arange(1, 10).reshape(3, 3), 1)
    parts = {}
    for top, left, mirrored in itertools.product(range(3), range(3), (False, True)):
        part = padded[top : top + 3, left : left + 3]
        parts[(part[:, ::-1] if mirrored else part).tobytes()] = 0
    assert len(parts) == 18
    for image in result.long().numpy():
        parts[np.ascontiguousarray(image[0]).tobytes()] += 1
    assert stats.chisquare(list(parts.values())).pvalue > 1e-4


def test_no_augmentation_changes_nothing():
    batch = images()
    assert torch.equal(augment_pixels(batch, AugmentationConfig(), MANY[:6], 0), batch)
    normalized = batch / 255
    result = augment_normalized(normalized, AugmentationConfig(), MANY[:6], 0)
    assert torch.equal(result.images, normalized)
    assert result.weights.tolist() == [1.0] * 6
    assert result.partners.tolist() == list(range(6))


def test_random_boxes_lie_in_the_image_and_have_the_areas_and_ratios_asked_for():
    draws = uniform(MANY, 0, "crop", 4)
    left, top, width, height = random_box(draws, 500, 400, (0.1, 0.5)).unbind(1)
    assert min(left.min(), top.min()) >= 0
    assert (left + width).max() <= 500
    assert (top + height).max() <= 400
    area = (width * height / 200000).numpy()
    whole = (height < 400).numpy()  # not cut off
    assert whole.mean() > 0.95
    assert stats.kstest(area[whole & (area < 0.4)], stats.uniform(0.1, 0.3).cdf).statistic < 0.03
    ratio = (width / height).log().numpy()
    narrow = area < 0.3  # never cut off
    assert stats.kstest(ratio[narrow], stats.uniform(-math.log(4 / 3), 2 * math.log(4 / 3)).cdf).statistic < 0.02
    place = (left / (500 - width)).numpy()[width.numpy() < 400]
    assert stats.kstest(place, "uniform").statistic < 0.02


def test_resized_crop_is_torchvisions_bilinear_one():
    batch = images(40, height=20, width=24)
    boxes = random_box(uniform(MANY[:40], 3, "crop", 4), 24, 20, (0.08, 1.0))
    boxes[0] = torch.tensor([0, 0, 24, 20])
    result = resized_crop(batch, boxes)
    assert torch.equal(result[0], batch[0])
    for n, (left, top, width, height) in enumerate(boxes.int().tolist()):
        expected = TF.resized_crop(batch[n], top, left, height, width, [20, 24], antialias=False)
        assert (result[n].int() - expected.int()).abs().max() <= 1  # rounding of the grid


# RandAugment

LEVELS = RandAugment._AUGMENTATION_SPACE


def reference(image, operation, sign, magnitude):
    """torchvision's operation on one image."""
    values, signed = LEVELS[operation]
    level = values(MAX_MAGNITUDE + 1, *image.shape[-2:])
    level = 0.0 if level is None else float(level[magnitude]) * (sign if signed else 1)
    transform = RandAugment(interpolation=InterpolationMode.BILINEAR)
    fill = {type(image): None}
    return transform._apply_image_or_video_transform(image, operation, level, transform.interpolation, fill)


@pytest.mark.parametrize("operation", LEVELS)
def test_operation_is_torchvisions_on_each_image(operation):
    interpolated = operation.startswith(("Shear", "Translate", "Rotate"))
    signs = torch.tensor([1.0, -1.0] * 4)
    for magnitude, channels in itertools.product((0, 3, 9, 17, 30), (1, 3)):
        batch = images(8, channels, height=18, width=26)
        result = apply_operations(batch, torch.full((8,), OPERATIONS.index(operation)), signs, magnitude)
        assert result.dtype == torch.uint8
        for n in range(8):
            difference = (result[n].int() - reference(batch[n], operation, int(signs[n]), magnitude).int()).abs()
            assert difference.max() <= 1  # torchvision's magnitudes are float32,
            # interpolated values that end in .5 are rounded either way, and shears by tenths of a pixel have many
            assert (difference > 0).float().mean() < (0.05 if interpolated else 0.02)
        if magnitude > 3 and operation != "Identity" and not (channels == 1 and operation == "Color"):
            assert not torch.equal(result, batch)


def test_a_batch_of_all_operations_treats_each_image_alone():
    batch = images(56, height=16, width=16)
    operations = torch.arange(14).repeat(4)[torch.randperm(56, generator=torch.Generator().manual_seed(0))]
    signs = torch.where(torch.arange(56) % 2 == 0, 1.0, -1.0)
    together = apply_operations(batch, operations, signs, 20)
    for n in range(56):
        alone = apply_operations(batch[n : n + 1], operations[n : n + 1], signs[n : n + 1], 20)
        assert torch.equal(together[n : n + 1], alone)


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    assert list(OPERATIONS) == list(LEVELS)
    drawn = []
    monkeypatch.setattr(
        "revdeq_lightning.data.images.augmentation.apply_operations",
        lambda images, operations, signs, magnitude: drawn.append((operations, signs)) or images,
    )
    rand_augment(torch.zeros(len(MANY), 1, 2, 2, dtype=torch.uint8), 2, 9, MANY, 0)
    counts = np.zeros((14, 14, 2, 2))
    (first, sign), (second, other) = drawn
    np.add.at(counts, (first, second, (sign > 0).long(), (other > 0).long()), 1)
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


# Random erasing


def test_erased_rectangles_have_the_areas_and_the_frequency_asked_for():
    height, width, probability = 40, 50, 0.3
    result = erase(torch.ones(len(MANY) // 8, 2, height, width), probability, MANY[: len(MANY) // 8], 0)
    assert torch.equal(result[:, 0], result[:, 1])
    holes = result[:, 0] == 0
    areas = holes.sum((1, 2)).numpy()
    number, count = len(areas), int((areas > 0).sum())
    assert stats.binomtest(count, number, probability).pvalue > 1e-4
    rows, columns = holes.any(2).sum(1).numpy(), holes.any(1).sum(1).numpy()
    assert (areas == rows * columns).all()  # one rectangle each
    areas = areas[areas > 0] / (height * width)
    assert 0.015 < areas.min() < 0.04
    assert 0.25 < areas.max() < 0.34
    assert areas.mean() == pytest.approx(0.17, abs=0.01)  # (0.02 + 0.33) / 2, a little less where a side is cut off
    assert result.unique().tolist() == [0, 1]
    assert torch.equal(erase(torch.ones(9, 1, 8, 8), 0.0, MANY[:9], 0), torch.ones(9, 1, 8, 8))
    assert (erase(torch.ones(99, 1, 8, 8), 1.0, MANY[:99], 0) == 0).flatten(1).any(1).all()


# Mixing


def test_shares_are_beta_distributed():
    inner = np.linspace(0.01, 0.99, 50)
    extreme = torch.tensor([[0.0, 0.0], [0.0, 0.25], [1 - 2.0**-24, 0.25], [1 - 2.0**-24, 0.0], [0.5, 0.75]])
    for alpha in (1e-3, 0.1, 0.2, 1.0, 3.0, 50.0):
        shares = symmetric_beta(torch.cat([uniform(MANY, 0, "mix", 2), extreme]), alpha).double().numpy()
        assert 0 <= shares.min() <= shares.max() <= 1
        found = np.searchsorted(np.sort(shares), inner) / len(shares)
        assert np.abs(found - stats.beta(alpha, alpha).cdf(inner)).max() < 0.015  # 2 standard errors are 0.007


def test_mixup_is_the_weighted_sum_with_the_partner():
    batch = torch.rand(300, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    result = mix(batch, AugmentationConfig(mixup_alpha=1.0), MANY[:300], 0)
    assert sorted(result.partners.tolist()) == list(range(300))
    for n in range(300):
        share, partner = float(result.weights[n]), int(result.partners[n])
        assert partner == (n - 1) % 300
        torch.testing.assert_close(result.images[n], share * batch[n] + (1 - share) * batch[partner])
    assert len(result.weights.unique()) > 290  # one for each image
    assert stats.kstest(result.weights.numpy(), "uniform").pvalue > 1e-4


def test_cutmix_weights_are_the_counted_areas():
    number = 400
    batch = torch.arange(number, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, 24, 20)
    result = mix(batch, AugmentationConfig(cutmix_alpha=1.0), MANY[:number], 0)
    shares = []
    for n in range(number):
        own = (result.images[n] == n).float().mean()
        partner = (result.images[n] == int(result.partners[n])).float().mean()
        if result.partners[n] != n:
            assert own + partner == pytest.approx(1)
        assert float(result.weights[n]) == pytest.approx(float(own), abs=1e-6)
        pasted = (result.images[n, 0] != n).numpy()
        assert pasted.sum() == pasted.any(0).sum() * pasted.any(1).sum()  # one rectangle
        shares.append(float(own))
    assert np.mean(np.array(shares) == 1) < 0.1
    assert 0.5 < np.mean(shares) < 0.75  # half, and more where the rectangle leaves the image


def test_each_image_is_mixed_one_way_or_not_at_all():
    single = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for kind in ("mixup_alpha", "cutmix_alpha"):  # a batch of one is mixed with itself
        torch.testing.assert_close(mix(single, AugmentationConfig(**{kind: 1.0}), MANY[:1], 0).images, single)
    number = 4000
    batch = torch.arange(number, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    config = AugmentationConfig(mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=0.6)
    result = mix(batch, config, MANY[:number], 0)
    values = [len(image.unique()) for image in result.images]
    untouched = torch.tensor([bool((image == n).all()) for n, image in enumerate(result.images)])
    cut = torch.tensor([v == 2 for v in values])
    blended = ~untouched & ~cut
    assert (result.weights[untouched] == 1).all()
    assert torch.equal(result.partners[untouched], torch.arange(number)[untouched])
    assert float(blended.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(untouched.float().mean()) == pytest.approx(0.4, abs=0.05)  # and the emptiest rectangles
    n = torch.arange(number)[blended & (torch.arange(number) > 0)]
    expected = n - 1 + result.weights[n]  # partner n - 1
    torch.testing.assert_close(result.images[n, 0, 0, 0], expected.float())


# Devices


class Waits(TorchFunctionMode):
    """Counts copies from the host for which it waits; to read numbers of the "meta" device is an error anyway."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        source = args[0].device if args and isinstance(args[0], torch.Tensor) else torch.device("cpu")
        copies = func in (torch.tensor, torch.as_tensor, torch.Tensor.to) and result.device != source
        self.count += copies and not kwargs.get("non_blocking")
        return result


def test_the_host_waits_for_no_augmentation_on_a_device():
    mixing = {"erasing_probability": 0.5, "mixup_alpha": 0.4, "cutmix_alpha": 1.0}
    crops = ({"crop_padding": 4}, {"random_resized_crop": (0.08, 1.0)})
    batch = torch.zeros(256, 3, 32, 32, dtype=torch.uint8, device="meta")
    with Waits() as waits:
        for crop in crops:
            config = AugmentationConfig(**crop, **mixing, flip=True, randaugment_ops=2)
            pixels = augment_pixels(batch, config, MANY[:256], 7)
            result = augment_normalized(normalize(pixels, [0.5] * 3, [0.2] * 3), config, MANY[:256], 7)
    assert result.images.is_meta
    assert waits.count == 0
    with Waits() as waits:
        torch.ones(2).to(device="meta") + torch.tensor([1.0], device="meta")
    assert waits.count == 2
    with pytest.raises(RuntimeError, match="meta"):
        result.weights.sum().item()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_augments_as_the_cpu_does():
    config = AugmentationConfig(
        crop_padding=4, flip=True, randaugment_ops=2, erasing_probability=0.5, mixup_alpha=0.4, cutmix_alpha=1.0
    )
    batch, keys = images(64, height=32, width=32), MANY[:64]
    assert torch.equal(uniform(keys, 7, "crop", 5), uniform(keys.cuda(), 7, "crop", 5).cpu())
    pixels = [augment_pixels(batch.to(d), config, keys, 7) for d in ("cpu", "cuda")]
    difference = (pixels[0].int() - pixels[1].cpu().int()).abs()
    assert (difference > 1).float().mean() < 0.01  # interpolated values that round the other way, then equalized
    normalized = pixels[0] / 255
    ours, theirs = (augment_normalized(normalized.to(d), config, keys, 7) for d in ("cpu", "cuda"))
    torch.testing.assert_close(ours.weights, theirs.weights.cpu())
    torch.testing.assert_close(ours.images, theirs.images.cpu())
