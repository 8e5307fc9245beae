"""Range checks. Every error shows the value received: "beta must be in (0, 2), got 2.5"."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any


def require_in_range(name: str, value: object, interval: str, advice: str = "") -> None:
    """Raise ValueError unless `value` is a number, not a boolean, in an interval such as "[0, 1)" or "(0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    is_above = low <= number if interval[0] == "[" else low < number
    if not is_above or not (number <= high if interval[-1] == "]" else number < high):
        raise ValueError(_message(name, f"in {interval}", value, advice))


def require_count(name: str, value: object, *, at_least: int = 1, advice: str = "") -> None:
    """Raise ValueError unless `value` is an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(_message(name, "an integer", value, advice))
    if value < at_least:
        raise ValueError(_message(name, f"at least {at_least}", value, advice))


def require_choice(name: str, value: object, choices: Collection[object], advice: str = "") -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(_message(name, f"one of {', '.join(map(repr, choices))}", value, advice))


def refuse_unused(given: Mapping[str, Any], of: Callable[..., Any], needs: str, *names: str) -> None:
    """Raise ValueError if one of these arguments of `of` is not its default, as it has no effect without `needs`."""
    for name in names:
        default = inspect.signature(of).parameters[name].default
        if given[name] != default:
            raise ValueError(
                f"{name} has no effect without {needs}, got {given[name]!r}: remove it (default: {default!r})"
            )


def _message(name: str, wanted: str, value: object, advice: str) -> str:
    return f"{name} must be {wanted}, got {value!r}{f': {advice}' if advice else ''}"
