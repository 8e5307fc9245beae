"""Every committed picture, and every picture in a notebook, is whole."""

import base64
import io
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "configs", "docs", "examples", "notebooks", "tests")
ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp")


def pictures() -> dict[str, bytes]:
    found = {}
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in ENDINGS:
            found[name] = path.read_bytes()
        elif path.suffix == ".ipynb":
            cells = enumerate(nbformat.read(path, as_version=4).cells)
            for i, output in ((i, output) for i, cell in cells for output in cell.get("outputs", [])):
                for kind, data in output.get("data", {}).items():
                    if kind.startswith("image/") and kind != "image/svg+xml":
                        found[f"{name}, cell {i}"] = base64.b64decode(data, validate=False)
    return found


PICTURES = pictures()


def test_there_are_pictures_of_both_kinds():
    assert {"docs/pictures/dashboard.png", "docs/pictures/gradient_error.png"} <= set(PICTURES)
    assert sum("cell" in name for name in PICTURES) >= 8


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_can_be_decoded_to_its_end(name):
    with Image.open(io.BytesIO(PICTURES[name])) as picture:
        picture.load()  # raises OSError if it is cut short
        assert min(picture.size) > 50


def test_a_picture_that_is_cut_short_is_noticed():
    whole = PICTURES["docs/pictures/dashboard.png"]
    with Image.open(io.BytesIO(whole[: len(whole) // 2])) as picture, pytest.raises(OSError, match="truncated"):
        picture.load()
