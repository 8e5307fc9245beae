"""Processes that load data leave signals to the process that trains."""

import os
import signal
import threading


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
