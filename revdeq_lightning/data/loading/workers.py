"""Signal handling of data-loading processes."""

import os
import signal
import threading


def leave_signals_to_main_process(worker: int) -> None:
    """Ignore signals that a scheduler or Ctrl-C sends to every process, because the last step still needs data.

    A worker ends when the training process ends it, including by SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it: there SIGTERM ends a worker immediately
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
