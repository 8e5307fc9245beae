"""Programs in processes of their own, which see what the tests see."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Output(NamedTuple):
    """What a program wrote."""

    out: str
    err: str


def run_python(*words: object, seconds: float = 300, code: int = 0, **settings: object) -> Output:
    """Run `python WORDS` with one thread, where it must end with this code; what it says."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    result = subprocess.run(
        command, env=environment, timeout=seconds, capture_output=True, text=True, check=False, **settings
    )
    assert result.returncode == code, f"{command}:\n{result.stdout[-3000:]}\n{result.stderr[-4000:]}"
    return Output(result.stdout, result.stderr)


def pids_with(*words: str) -> list[int]:
    """Of the Python processes whose command holds these words; none of one that ended, and is not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:  # it ended just now
            continue
        if "python" in command.split("\0")[0] and all(word in command for word in words):
            found.append(int(path.parent.name))
    return sorted(found)
