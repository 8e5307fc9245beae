"""Record SIGTERM, SIGHUP and SIGUSR1 and act on them between two training steps.

A scheduler sends them before it takes a machine away, a closed terminal or connection sends SIGHUP. Training checks
`STOP.received` between two steps. This module imports only the standard library, so that signals are recorded from the
first line of the program: importing everything takes seconds, or minutes from a network file system, and the signals
kill a process by default.
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

AT_ONCE = (signal.SIGTERM, signal.SIGHUP)
SIGNALS = (*AT_ONCE, signal.SIGUSR1)

AGAIN = 75
"""Exit code (EX_TEMPFAIL, "try again later") after one of these signals ended a training that can be resumed."""


class Stopped(SystemExit):
    """A signal ends training on all processes after the same step.

    Not KeyboardInterrupt, with which Lightning's first process kills the ones that it started; PyTorch 2.11 considers
    that of a forked process a regular end and waits for its result forever.
    """


class StopSignals:
    """Record which signal requested the end.

    Attributes:
        received: Number of the signal that this process received, 0 if none.
        agreed: Number of the signal that all processes agreed on.
        has_agreed: Whether they have exchanged this in the current batch.
    """

    def __init__(self) -> None:
        self.received = self.agreed = 0
        self.has_agreed = False
        self._previous: dict[signal.Signals, Any] = {}
        self._wakeup: int | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of a process that ended by the agreed signal."""
        return 128 + signal.SIGINT if self.agreed == signal.SIGINT else AGAIN

    def take(self) -> bool:
        """Start recording signals; return whether this is new. Only possible in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return False
        self._wait_no_more()
        if self._previous:
            return False
        kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by `nohup`
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS if number not in kept}
        return True

    def end_while_waiting(self, kill_children: Callable[[], None]) -> None:
        """Let SIGTERM and SIGHUP end this process at once until `take`, because nothing is lost before the first step.

        Processes wait for each other in C++, up to their timeout, and Python's handlers do not run there. Python writes
        the signal's number to a file immediately, however, which a thread can read. `kill_children` ends the training
        processes that this one started.
        """
        if self.received in AT_ONCE:
            sys.exit(AGAIN)
        if not self._previous or self._wakeup is not None:
            return
        reader, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_signal, args=(reader, kill_children), daemon=True).start()

    def _wait_no_more(self) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
            self._wakeup = None

    def give_back(self) -> None:
        """Restore the previous handlers and forget received signals."""
        self._wait_no_more()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous, self.received, self.agreed = {}, 0, 0

    def ignore(self) -> None:
        """Ignore the signals at the end of the program, where they would kill it and change the exit code."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


STOP = StopSignals()
"""The only instance, because signals belong to the process."""


@contextmanager
def no_failure_to_torchrun() -> Iterator[None]:
    """After a requested end, exit with 0 and write the exit code to the file given by `configs/cluster/torchrun.sh`.

    torchrun restarts all processes if one exits with a different code.
    """
    try:
        yield
    except SystemExit as end:
        file = os.environ.get("REVDEQ_STOPPED")
        if file is None or end.code not in (AGAIN, 128 + signal.SIGINT):
            raise
        Path(file).write_text(str(end.code), encoding="ascii")
        sys.exit(0)


def _end_at_signal(reader: int, kill_children: Callable[[], None]) -> None:
    while numbers := os.read(reader, 1):
        if numbers[0] in AT_ONCE:
            kill_children()
            os._exit(AGAIN)
    os.close(reader)
