"""Standard output and error that cannot end a run, whatever they are connected to. Standard library only."""

import io
import os
import select
import sys
from typing import Any


class LastingFile(io.FileIO):
    """A standard stream that leads nowhere once its reader is gone, its disk is full, or its terminal is closed.

    The loss of standard output is reported on standard error.
    """

    def write(self, data: Any) -> int:
        written, view = 0, memoryview(data).cast("B")
        while written < len(view):
            try:
                count = super().write(view[written:])
            except OSError as error:
                self._discard(error)
                return len(view)
            if count is None:  # full, and in a mode (shared with other processes) in which writing does not wait
                select.select([], [self], [])
            written += count or 0
        return written

    def _discard(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # also for other libraries, and for processes that are started
        os.close(nowhere)
        if self.fileno() == 1:
            print(f"warning: standard output is lost ({error.strerror}): continuing without it", file=sys.stderr)


def make_output_last() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose failures are not errors.

    Characters that cannot be encoded are replaced. A stream that is closed leads nowhere, so that no other file gets
    its descriptor.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name, errors in ((1, "stdout", "replace"), (2, "stderr", "backslashreplace")):
        before: Any = getattr(sys, name)
        encoding = before.encoding if before else "utf-8"
        prompt = before is not None and (before.line_buffering or before.write_through)
        stream = io.BufferedWriter(LastingFile(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, encoding, errors, line_buffering=prompt))
