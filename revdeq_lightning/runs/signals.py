"""SIGTERM and SIGUSR1, "end soon": noted, never obeyed in the midst of something.

A scheduler sends them before it takes a machine away. Whoever trains looks at `STOP.received` between two steps. This
imports only the standard library, so that the signals are noted from the first line of the program on: the imports of a
training take seconds, from a network's file system minutes, and the default action of both signals is to kill.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
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
        self._wakeup: int | None = None

    @property
    def exit_code(self) -> int:
        """Of a process that ended by the signal agreed on."""
        return 128 + signal.SIGINT if self.agreed == signal.SIGINT else AGAIN

    def take(self) -> bool:
        """Note the signals from now on; whether that is new. In other threads than the main one Python cannot."""
        if threading.current_thread() is not threading.main_thread():
            return False
        self._wait_no_more()
        if self._previous:
            return False
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return True

    def end_while_waiting(self, kill_children: Callable[[], None]) -> None:
        """Until `take`: SIGTERM ends this process at once, as nothing is lost before the first step.

        Processes that wait for each other do so in C++, for as long as their timeout, where Python's own handlers do
        not run: but it writes the signal's number to a file at once, which a thread can read.

        Args:
            kill_children: Ends the processes of the training that this one started.
        """
        if self.received == signal.SIGTERM:
            sys.exit(AGAIN)
        if not self._previous or self._wakeup is not None:
            return
        reader, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_sigterm, args=(reader, kill_children), daemon=True).start()

    def _wait_no_more(self) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
            self._wakeup = None

    def give_back(self) -> None:
        """Let the signals do again what they did before, and forget what was received."""
        self._wait_no_more()
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


def _end_at_sigterm(reader: int, kill_children: Callable[[], None]) -> None:
    while numbers := os.read(reader, 1):
        if numbers[0] == signal.SIGTERM:
            kill_children()
            os._exit(AGAIN)
    os.close(reader)
