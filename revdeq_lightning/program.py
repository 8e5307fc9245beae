"""How this program was started, for messages that show a command."""

import shlex
import sys
from pathlib import Path


def program() -> str:
    """`revdeq`, or `python -m revdeq_lightning`, as one would type it here."""
    started = Path(sys.argv[0])
    if started.name == "revdeq":
        return _typed(started, "revdeq")
    return f"{_typed(Path(sys.executable), 'python')} -m revdeq_lightning"


def _typed(path: Path, name: str) -> str:
    """The virtual environment of a project need not be active: with its path, where that lies in this folder."""
    return shlex.quote(str(path.relative_to(Path.cwd()))) if path.is_relative_to(Path.cwd()) else name
