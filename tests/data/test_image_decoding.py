import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from revdeq_lightning.data.images.batches import preprocess_files
from revdeq_lightning.data.images.decoding import decode_image, evaluation_resize
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from tests.helpers.data import encoded, make_folder, pixels, refused, split, whole

# Decoding


@pytest.mark.parametrize("crop_fraction", [None, 0.875, 0.7])
def test_evaluation_convention_is_torchvisions_resize_and_center_crop(tmp_path, crop_fraction):
    data = ImageDataModule("digits", image_size=16, crop_fraction=crop_fraction, channels=3, cache_dir=str(tmp_path))
    state = data.preprocessing_state()
    assert evaluation_resize(224, None) == 256  # above 64 pixels, seven eighths
    resize = transforms.Resize(round(16 / (crop_fraction or 1)), transforms.InterpolationMode.BICUBIC)
    convert = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True)]
    normalize = transforms.Normalize(state["mean"], state["std"])
    reference = transforms.Compose([resize, transforms.CenterCrop(16), *convert, normalize])
    for size in ((48, 31), (31, 48), (16, 16), (9, 20), (33, 33)):
        image = Image.fromarray(pixels(1, *size))
        image.save(tmp_path / "image.png")
        decoded = preprocess_files([tmp_path / "image.png"], state)
        torch.testing.assert_close(decoded.images[0], reference(image).as_subclass(torch.Tensor))


GRAY = Image.fromarray(pixels(2)).convert("L")
RGB = Image.fromarray(pixels(2))
TRANSPARENT = RGB.convert("RGBA")
TRANSPARENT.putalpha(100)
PALETTE = RGB.quantize(16)
DEEP = Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 256 + 7)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # shown after a turn by 90 degrees clockwise
MODES = {
    "gray": (encoded(GRAY, "png"), GRAY.convert("RGB")),
    "rgb": (encoded(RGB, "png"), RGB),
    "transparent": (encoded(TRANSPARENT, "png"), RGB),
    "gray and transparent": (encoded(TRANSPARENT.convert("LA"), "png"), GRAY.convert("RGB")),
    "palette": (encoded(PALETTE, "png"), PALETTE.convert("RGB")),
    "transparent color": (encoded(PALETTE, "png", transparency=bytes([9] * 16)), PALETTE.convert("RGB")),
    "cmyk": (encoded(RGB.convert("CMYK"), "tif"), RGB),
    "16 bits": (encoded(DEEP, "png"), GRAY.convert("RGB")),
    "one bit": (encoded(RGB.convert("1"), "png"), RGB.convert("1").convert("RGB")),
    "turned by EXIF": (encoded(RGB.transpose(Image.Transpose.ROTATE_90), "png", exif=TURNED), RGB),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    content, expected = MODES[mode]
    (tmp_path / "image").write_bytes(content)
    state = {"channels": 3, "image_size": 32, "resize": 32, "mean": [0.0] * 3, "std": [1.0] * 3}
    decoded = preprocess_files([tmp_path / "image"], state).images[0] * 255
    reference = torch.from_numpy(np.asarray(expected)[:, 4:36].copy()).permute(2, 0, 1)
    assert torch.equal(decoded.round(), reference.float())


def png_of_16_bits(pixels, kind):
    """Color (2) and transparent gray (4), which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SIXTEEN = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
TWELVE = SIXTEEN >> 4
GRAYMAP = b"P5 16 16 "
DEEP_FILES = {
    "png": encoded(SIXTEEN, "png"),
    "tiff": encoded(SIXTEEN, "tif"),
    "tiff, white is zero": encoded(65535 - SIXTEEN, "tif").replace(
        struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0)
    ),
    "pgm": GRAYMAP + b"65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "color": png_of_16_bits(np.repeat(SIXTEEN[..., None], 3, 2), 2),
    "gray and transparent": png_of_16_bits(np.stack([SIXTEEN, SIXTEEN], -1), 4),
    "12 bits, png": encoded(TWELVE, "png"),
    "12 bits, tiff": encoded(TWELVE, "tif"),
    "12 bits, pgm": GRAYMAP + b"65535\n" + TWELVE.astype(">u2").tobytes(),
    "12 bits, pgm that says so": GRAYMAP + b"4095\n" + TWELVE.astype(">u2").tobytes(),
    "12 bits, pgm that says so, dark": GRAYMAP + b"4095\n" + (TWELVE >> 5).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file", DEEP_FILES)
def test_pixels_of_12_and_16_bits_keep_their_upper_8(file, channels):
    image = np.asarray(decode_image(DEEP_FILES[file], file, channels)).reshape(16, 16, channels)
    expected = (np.linspace(0, 65535, 256).round() // 256).reshape(16, 16, 1)
    assert (image == (expected // 32 if "dark" in file else expected)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(SIXTEEN.astype(np.float32) / 65535, "tif"), "mode F have no fixed range: convert it to 8 or 16 bits"),
        (encoded(SIXTEEN.astype(np.int32), "tif"), "mode I have no fixed range"),
        (b"Pf 2 2 -1.0\n" + np.ones(4, "<f4").tobytes(), "mode F have no fixed range"),
        (png_of_16_bits(np.repeat(TWELVE[..., None], 3, 2), 2), "colors of 12 bits or fewer in 16 .*convert it to 8"),
    ],
)
def test_pixels_without_a_known_range_are_refused_in_one_line(content, reason):
    with refused(f"cannot decode the image x.y .*{reason}"):
        decode_image(content, "x.y", 3)


def test_gray_channels_of_a_color_folder(module):
    data = module(channels=1)
    images, _ = split(data, "test")
    color, _ = split(module(), "test")
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert images.shape[1:] == (1, 16, 16)
    assert ((color * luma).sum(1, keepdim=True) - images).abs().max() <= 4  # luma before instead of after the resize


def test_prediction_prepares_files_as_evaluation_does(module, folder):
    data = module(in_memory=False)
    paths = sorted((folder / "test").rglob("*.jpg"))
    evaluated = data.on_after_batch_transfer(whole(data.test_dataloader()), 0)
    decoded = preprocess_files(paths, json.loads(json.dumps(data.preprocessing_state())))
    assert decoded.paths == paths
    assert torch.equal(decoded.images, evaluated.images)


# Images that cannot be decoded


@pytest.fixture
def damaged(tmp_path):
    root = make_folder(tmp_path / "damaged", {"train": 8, "val": 2})
    good = (root / "train/ant/001.jpg").read_bytes()
    (root / "train/ant/001.jpg").write_bytes(good[: len(good) // 2])
    (root / "train/bee/002.jpg").write_bytes(b"")
    (root / "val/bee/001.jpg").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("options", [{}, {"in_memory": False}, {"in_memory": False, "num_workers": 1}])
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(module, damaged, options):
    data = module(damaged, **options)
    message = r'cannot decode the image \S+/00[12].jpg \(.*\): repair.*undecodable="skip"'
    with refused(message):
        list(data.train_dataloader())
    data.teardown("fit")


def test_images_that_cannot_be_decoded_are_left_out_with_one_warning(module, damaged):
    data = module(damaged, undecodable="skip")
    for build in (data, module(damaged, undecodable="skip")):  # the second one reads what the first stored
        message = r"3 image\(s\) .* skipped: train/ant/001.jpg, .*, val/bee/001.jpg"
        with pytest.warns(UserWarning, match=message) as record:
            build.setup("fit")
        assert len(record) == 1
    counts = {name: torch.bincount(split(data, name)[1]).tolist() for name in data.splits}
    assert counts == {"train": [7, 7, 8], "validation": [2, 1, 2]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_mark_images_that_cannot_be_decoded_and_the_run_names_them_at_its_end(module, damaged, num_workers):
    data = module(damaged, undecodable="skip", in_memory=False, num_workers=num_workers)
    batch = whole(data.train_dataloader())
    assert (batch.labels == IGNORE_INDEX).sum() == 2
    assert not batch.images[batch.labels == IGNORE_INDEX].any()
    with pytest.warns(UserWarning, match=r"2 image\(s\) .* skipped: train/ant/001.jpg, train/bee/002.jpg"):
        data.teardown("fit")
    data.teardown("fit")


def test_prediction_skips_what_cannot_be_decoded(module, damaged):
    paths = [damaged / "train/ant/000.jpg", damaged / "val/bee/001.jpg", damaged / "train/cat/000.jpg"]
    state = module().preprocessing_state()
    with pytest.warns(UserWarning, match=r"1 image\(s\) .*bee/001.jpg"):
        decoded = preprocess_files(paths, state, undecodable="skip")
    assert decoded.paths == [paths[0], paths[2]]
    with refused(r"bee/001.jpg \(no image format that Pillow knows\)"):
        preprocess_files(paths, state)
    with pytest.warns(UserWarning, match="1 image"):
        assert preprocess_files(paths[1:2], state, undecodable="skip").images.shape == (0, 3, 16, 16)
