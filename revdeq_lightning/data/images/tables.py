"""Tables of labeled images: what every source of images gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Content = bytes | NDArray[np.uint8]
"""An encoded image, or pixels of shape `(height, width, channels)`."""


class AbstractImageReader(ABC):
    """Images by position. Pickles, so that worker processes read."""

    random_access = True
    """False: only `stream` is fast."""

    @abstractmethod
    def name(self, position: int) -> str:
        """Name of the image, the same wherever the data lies; decides in which split it falls."""

    @abstractmethod
    def read(self, position: int) -> Content:
        """One image."""

    def stream(self, positions: Sequence[int]) -> Iterator[tuple[int, Content]]:
        """(index into `positions`, image) for all of them, in whatever order is fast."""
        for index, position in enumerate(positions):
            yield index, self.read(position)


class ImageTable(NamedTuple):
    """Labelled images of one split.

    Attributes:
        reader: Where they are.
        positions: In the reader, int64.
        labels: Classes, int64.
    """

    reader: AbstractImageReader
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]

    def name(self, index: int) -> str:
        """Name of an image."""
        return self.reader.name(int(self.positions[index]))

    def take(self, indices: NDArray[np.int64]) -> "ImageTable":
        """Those images only."""
        return ImageTable(self.reader, self.positions[indices], self.labels[indices])


class ImageCollection(NamedTuple):
    """The splits that a source has ("train" at least), and what it says of them."""

    class_names: list[str]
    tables: dict[str, ImageTable]


class ImageSource(NamedTuple):
    """Images that are not looked at yet.

    Attributes:
        key: Computes what identifies the content; may read all of it.
        open: Lists the images.
        channels: Of the images: 1 grey, 3 RGB.
    """

    key: Callable[[], str]
    open: Callable[[], ImageCollection]
    channels: int = 3


class ArrayReader(AbstractImageReader):
    """Pixels in memory, uint8 `(number, height, width, channels)`."""

    def __init__(self, pixels: NDArray[np.uint8], prefix: str) -> None:
        self.pixels, self.prefix = pixels, prefix

    def name(self, position: int) -> str:
        """Prefix and number."""
        return f"{self.prefix}/{position:05d}"

    def read(self, position: int) -> Content:
        """The pixels."""
        pixels: NDArray[np.uint8] = self.pixels[position]
        return pixels
