"""Range checks: what is accepted, and that a message shows the name, the range and the value."""

import re
from math import inf, nan

import pytest

from revdeq_lightning.equilibrium.validation import require_choice, require_count, require_in_range


@pytest.mark.parametrize(
    ("check", "message"),
    [
        *(
            (lambda v=value: require_in_range("beta", v, "(0, 2)"), f"beta must be in (0, 2), got {value!r}")
            for value in (0, 2, -1.0, nan, inf, "1", None, True)
        ),
        (lambda: require_in_range("p", 0, "(0, 1]"), "p must be in (0, 1], got 0"),
        (lambda: require_in_range("p", 1.0, "[0, 1)"), "p must be in [0, 1), got 1.0"),
        (lambda: require_in_range("rtol", inf, "[0, inf)", "use 0"), "rtol must be in [0, inf), got inf: use 0"),
        (lambda: require_count("steps", 0), "steps must be at least 1, got 0"),
        (lambda: require_count("steps", 1, at_least=2), "steps must be at least 2, got 1"),
        *(
            (lambda v=value: require_count("steps", v), f"steps must be an integer, got {value!r}")
            for value in (1.0, "1", None, True)
        ),
        (lambda: require_choice("kind", "c", ("a", "b")), "kind must be one of 'a', 'b', got 'c'"),
    ],
)
def test_message(check, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check()


def test_what_is_in_range_passes():
    for value, interval in ((1, "(0, 2)"), (0, "[0, 1)"), (1.0, "(0, 1]"), (1e300, "(0, inf)"), (-0.5, "(-1, 1)")):
        require_in_range("value", value, interval)
    require_count("steps", 1)
    require_count("steps", 0, at_least=0)
    require_choice("kind", "a", {"a": 1})
