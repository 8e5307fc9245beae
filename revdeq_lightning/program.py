"""What messages of any room need: the command that started this program, and lines on standard output."""

import shlex
import shutil
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path


def program() -> str:
    """`revdeq` or `python -m revdeq_lightning`, as the user would type it."""
    started = Path(sys.argv[0])
    if started.name == "revdeq":
        return _typed(started, "revdeq")
    return f"{_typed(Path(sys.executable), 'python')} -m revdeq_lightning"


def say(text: str) -> None:
    """Print a line, unless standard output fails, or a signal interrupted another line (RuntimeError)."""
    with suppress(OSError, ValueError, RuntimeError):
        print(text, flush=True)


def printable(text: str) -> str:
    """The text with replaced control characters, which untrained models write and terminals obey."""
    text = text.replace("\r\n", "\n")
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def _typed(path: Path, name: str) -> str:
    """Its name alone if the shell finds it there; otherwise with its path, shortened in the current folder."""
    if shutil.which(name) == str(path):
        return name
    if path.parent != Path.cwd() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))
