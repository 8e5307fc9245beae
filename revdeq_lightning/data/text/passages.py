"""Text of any size on disk, read in blocks."""

import codecs
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from revdeq_lightning.data.loading.array_cache import written_to

_BLOCK_BYTES = 1 << 17


class Passage(NamedTuple):
    """The bytes from `start` to `end` of a UTF-8 file."""

    path: Path
    start: int
    end: int

    @classmethod
    def write(cls, path: Path, texts: Iterable[str], min_bytes: int | None = None) -> "Passage":
        """Write the parts of a text: all of them, or as many as make `min_bytes`."""
        end = 0
        with path.open("wb") as file:
            for text in texts:
                with written_to(path.parent.parent):
                    end += file.write(text.encode("utf-8"))
                if min_bytes is not None and end >= min_bytes:
                    break
        return cls(path, 0, end)

    @property
    def num_bytes(self) -> int:
        """Size of the text."""
        return self.end - self.start

    def blocks(self) -> Iterator[str]:
        """The text in parts of at most 128 KiB; an incomplete character at an end is U+FFFD."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            sizes = iter(lambda: min(_BLOCK_BYTES, self.end - file.tell()), 0)
            yield from codecs.iterdecode(map(file.read, sizes), "utf-8", errors="replace")

    def divide(self, *fractions: float) -> list["Passage"]:
        """The parts between these fractions of the characters."""
        total = sum(map(len, self.blocks()))
        cuts = [self.start, *(self._position(int(fraction * total)) for fraction in fractions), self.end]
        return [self._replace(start=start, end=end) for start, end in pairwise(cuts)]

    def _position(self, num_characters: int) -> int:
        position = self.start
        for block in self.blocks():
            position += len(block[:num_characters].encode("utf-8"))
            num_characters -= min(num_characters, len(block))
        return position

    def first_bytes(self, limit: int | None) -> "Passage":
        """At most the first `limit` bytes, without an incomplete character."""
        end = self.end if limit is None else min(self.end, self.start + limit)
        with self.path.open("rb") as file:
            while file.seek(end) < self.end and file.read(1)[0] & 0xC0 == 0x80:
                end -= 1
        return self._replace(end=end)

    def count_words(self) -> int:
        """Words as WikiText counts them: separated by white space, and one for each line end."""
        count, in_word = 0, False
        for block in self.blocks():
            count += len(block.split()) + block.count("\n") - (in_word and not block[0].isspace())
            in_word = not block[-1].isspace()
        return count
