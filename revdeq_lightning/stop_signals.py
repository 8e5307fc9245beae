"""SIGTERM and SIGUSR1, "end soon": noted, never obeyed in the midst of something.

A scheduler sends them before it takes a machine away. Whoever trains looks at `STOP.received` between two steps. This
imports only the standard library, so that the signals are noted from the first line of the program on: the imports of a
training take seconds, from a network's file system minutes, and the default action of both signals is to kill.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

AGAIN = 75
"""Exit code (EX_TEMPFAIL, "try again later") of a training that SIGTERM or SIGUSR1 ended, and that can go on."""


class Stopped(SystemExit):
    """Training ends on all its processes after the same step, asked to by a signal.

    Not Lightning's way to shut down, KeyboardInterrupt: there the first process kills those that it started, and
    PyTorch 2.11 takes that of a forked one for an end in good order, and waits for its result for ever.
    """


class StopSignals:
    """Notes which signal asked to end.

    Attributes:
        received: Number of the signal that this process received, 0 if there was none.
        agreed: Number of the signal that all processes of the training agreed to end by.
    """

    def __init__(self) -> None:
        self.received = self.agreed = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """Of a process that ended by the signal agreed on."""
        return 128 + signal.SIGINT if self.agreed == signal.SIGINT else AGAIN

    def take(self) -> bool:
        """Note the signals from now on; whether that is new. In other threads than the main one Python cannot."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._previous:
            signal.signal(signal.SIGTERM, self._note)
            return False
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return True

    def let_restart_kill(self) -> None:
        """Under torchrun, until `take`: SIGTERM kills, as nothing is lost before the first step.

        torchrun ends processes that still look for each other by it when one of them failed, and waits for those that
        only note it, while the others begin again without them.
        """
        if self._previous and not self.received and "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def give_back(self) -> None:
        """Let the signals do again what they did before, and forget what was received."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous, self.received, self.agreed = {}, 0, 0

    def ignore(self) -> None:
        """For a program at its end: while it ends Python would let the signals kill again, and spoil the exit code."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


STOP = StopSignals()
"""Signals are the process's, so there is one."""


@contextmanager
def no_failure_to_torchrun() -> Iterator[None]:
    """End with 0 where it was asked for, with the exit code in the file that `configs/cluster/torchrun.sh` names.

    torchrun begins all processes again when one ends with another code.
    """
    try:
        yield
    except SystemExit as end:
        file = os.environ.get("REVDEQ_STOPPED")
        if file is None or end.code not in (AGAIN, 128 + signal.SIGINT):
            raise
        Path(file).write_text(str(end.code))
        sys.exit(0)


def leave_signals_to_main_process(worker: int) -> None:
    """For workers that load data: a scheduler, and Ctrl-C, signal every process, and the last step needs the data.

    They end when the process that trains ends them: by SIGTERM, too, if that comes from their parent.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # who sent a signal, macOS does not tell: there SIGTERM ends a worker at once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
