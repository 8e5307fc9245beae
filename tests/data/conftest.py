import logging
import multiprocessing

import pytest

from revdeq_lightning.data.images.module import ImageDataModule
from tests.helpers.data import make_folder

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def running():
    """Returns the processes begun in this test that still run; an interrupted run before it may have left others."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


@pytest.fixture
def module(folder, tmp_path):
    """Builds a data module on the folder of images, or on other sources."""

    def build(path=None, **arguments):
        if arguments.get("source", "folder") == "folder":
            path = path or folder
        if path:
            arguments["path"] = str(path)
        defaults = {"source": "folder", "batch_size": 4, "image_size": 16, "cache_dir": str(tmp_path / "cache")}
        return ImageDataModule(**defaults | arguments)

    return build
