"""`revdeq`, or `python -m revdeq_lightning`: see `cli/main.py`."""

import os
import sys

from revdeq_lightning.runs.output import make_output_last
from revdeq_lightning.runs.signals import STOP, no_failure_to_torchrun

if "fit" in sys.argv[1:3]:  # before the other imports, which take seconds
    STOP.take()

from revdeq_lightning.cli.main import main


def run() -> None:
    """Run the command in `sys.argv`."""
    make_output_last()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does, for user-defined blocks
    with no_failure_to_torchrun():
        main()


if __name__ == "__main__":
    run()
