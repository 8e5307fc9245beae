"""What only records a run must not end it: failures are told once, and training goes on."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger


class RecordWarning(UserWarning):
    """Something that records the run failed, and its record has gaps from here on."""


class Survives:
    """`with survives:` goes on after an `Exception` within, and warns at the first one.

    Args:
        what: What fails, for the warning.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.num_failures = 0

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Swallow what an interrupt or an exit is not."""
        if not isinstance(error, Exception):
            return False
        self.num_failures += 1
        if self.num_failures == 1:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            message = f"{self.what} failed ({reason}). Training goes on; its record has gaps from here on"
            warnings.warn(message, RecordWarning, stacklevel=3)
        return True


class Enduring(Logger):
    """What `enduring` makes of a logger: whatever it fails at is told once, and training goes on.

    A logger is tried again at each call, as a disk may be emptied; but one that cannot even begin is given up, for some
    wait minutes for a network that is not there.
    """

    survives: Survives
    _is_given_up = False

    @property
    def experiment(self) -> Any:
        """The logger's own, or one that takes everything and does nothing."""
        if not hasattr(_own_class(self), "experiment"):
            raise AttributeError(f"{_own_class(self).__name__} has no experiment")
        if not self._is_given_up:
            with self.survives:
                return super().experiment  # type: ignore[misc]
            self._is_given_up = True
        return _DummyExperiment()

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """As the logger does, if it can; so the others below."""
        with self.survives:
            super().log_metrics(*args, **kwargs)  # type: ignore[safe-super]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """See `log_metrics`."""
        with self.survives:
            super().log_hyperparams(*args, **kwargs)  # type: ignore[safe-super]

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """See `log_metrics`."""
        with self.survives:
            super().log_graph(*args, **kwargs)

    def after_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """See `log_metrics`."""
        with self.survives:
            super().after_save_checkpoint(*args, **kwargs)

    def save(self) -> None:
        """See `log_metrics`."""
        with self.survives:
            super().save()

    def finalize(self, status: str) -> None:
        """See `log_metrics`."""
        with self.survives:
            super().finalize(status)

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that are spawned: the class is made anew there."""
        return _revive, (_own_class(self), self.__getstate__())


def enduring(logger: Logger) -> Logger:
    """The same logger, which no longer ends a training when it fails; it stays an instance of its class."""
    if not isinstance(logger, Enduring):
        _give_endurance(logger)
        logger.survives = Survives(_own_class(logger).__name__)  # type: ignore[attr-defined]
    return logger


def survival(logger: Logger) -> AbstractContextManager[Any]:
    """Context in which to use the logger's `experiment` itself; of a logger that is not enduring errors are errors."""
    return logger.survives if isinstance(logger, Enduring) else nullcontext()


def _give_endurance(logger: Logger) -> None:
    own = type(logger)
    logger.__class__ = type(f"Enduring{own.__name__}", (Enduring, own), {"__module__": own.__module__})


def _own_class(logger: Logger) -> type[Logger]:
    return type(logger).__bases__[1]


def _revive(own: type[Logger], state: dict[str, Any]) -> Logger:
    logger = own.__new__(own)
    logger.__dict__.update(state)
    _give_endurance(logger)
    return logger
