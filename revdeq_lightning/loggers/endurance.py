"""Keeps failures of what only records a run from ending it: they are reported once, and training continues."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, cast

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger

from revdeq_lightning.errors import RecordWarning


class Survives:
    """A context that suppresses every `Exception` within, and warns of the first one that `what` failed."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.num_failures = 0

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):  # an interrupt or an exit
            return False
        self.num_failures += 1
        if self.num_failures == 1:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            message = f"{self.what} failed ({reason}). Training continues; its record has gaps from here on"
            warnings.warn(message, RecordWarning, stacklevel=3)
        return True


class Enduring:
    """Delegates to a logger whose failures are reported once and do not end the training.

    A logger is tried again at each call, as a full disk may get space again. A logger whose `experiment` cannot begin
    is given up, as some wait minutes for a network. `isinstance` sees the class of the wrapped logger, so that
    callbacks find the logger that they know. With `waits`, what is logged is kept until `release`, so that a start that
    is refused leaves no files.
    """

    attempted = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save", "finalize")

    def __init__(self, logger: Logger, waits: bool = False) -> None:
        self.logger = logger
        self.waiting: list[Any] | None = [] if waits else None
        self.survives: Survives = getattr(logger, "survives", None) or Survives(type(logger).__name__)
        self._is_given_up = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.logger)

    def __reduce__(self) -> tuple[Any, ...]:  # for processes that are spawned
        return Enduring, (self.logger, self.waiting is not None)

    def __getattr__(self, name: str) -> Any:
        if name == "experiment" and hasattr(type(self.logger), name):
            return self._experiment()
        attribute = getattr(self.logger, name)
        return partial(self._attempt, attribute) if name in self.attempted else attribute

    def _experiment(self) -> Any:
        if not self._is_given_up and self.waiting is None:
            with self.survives:
                return cast(Any, self.logger).experiment
            self._is_given_up = True
        return _DummyExperiment()

    def _attempt(self, method: Any, *args: Any, **kwargs: Any) -> None:
        if self.waiting is not None:
            self.waiting.append(partial(method, *args, **kwargs))
        elif not self._is_given_up:
            with self.survives:
                method(*args, **kwargs)

    def release(self) -> None:
        """Log what was kept."""
        calls, self.waiting = self.waiting or [], None
        for call in calls:
            self._attempt(call)


def enduring(logger: Logger, waits: bool = False) -> Logger:
    """The logger, wrapped so that its failures no longer end a training; see `Enduring`."""
    return cast(Logger, Enduring(logger, waits))


def survival(logger: Logger) -> AbstractContextManager[Any]:
    """A context for direct use of the logger's `experiment`: it suppresses errors only if the logger is enduring."""
    return getattr(logger, "survives", nullcontext())
