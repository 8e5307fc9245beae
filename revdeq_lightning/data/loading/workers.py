"""Data-loading processes leave signals to the process that trains."""

import os
import signal
import threading


def leave_signals_to_main_process(worker: int) -> None:
    """Ignore the signals that a scheduler or Ctrl-C sends to every process: the last step still needs the data.

    A worker ends when the training process ends it, also by a SIGTERM of its own.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal: there SIGTERM ends a worker at once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
