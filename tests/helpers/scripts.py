"""Programs in processes of their own, which see what the tests see."""

import os
import subprocess
import sys
from typing import NamedTuple


class Output(NamedTuple):
    """What a program wrote."""

    out: str
    err: str


def run_python(*words: object, seconds: float = 300, **settings: object) -> Output:
    """Run `python WORDS` with one thread, where it must end well; what it says."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    result = subprocess.run(
        command, env=environment, timeout=seconds, capture_output=True, text=True, check=False, **settings
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout[-3000:]}\n{result.stderr[-4000:]}"
    return Output(result.stdout, result.stderr)
