import re

import numpy as np
import pytest

from revdeq_lightning.loggers.plots import Line, Plot, number


def drawn(svg: str, color: int = 0) -> list[np.ndarray]:
    """The pieces of the curve in a color, as points of the picture."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--series-{color}\)', svg)
    pieces = re.split("M ", paths[0])[1:]
    return [np.array(re.findall(r"([\d.]+) ([\d.]+)", piece), dtype=float) for piece in pieces]


def affine(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance of b from the best affine function of a."""
    return float(np.abs(np.polyval(np.polyfit(a, b, 1), a) - b).max())


STEPS = np.arange(10, 101, 10)


@pytest.mark.parametrize(("scale", "height"), [("zero", lambda y: y), ("log", np.log10), ("range", lambda y: y)])
def test_points_lie_where_they_belong(scale, height):
    y = 10.0 ** -(STEPS / 25)
    (points,) = drawn(Plot("t", [Line("", STEPS, y)], scale).svg)
    assert affine(STEPS, points[:, 0]) < 0.01
    assert affine(height(y), points[:, 1]) < 0.01
    assert np.all(np.diff(points[:, 1]) > 0)  # downwards in the picture


def test_a_curve_is_broken_where_a_value_is_not_finite():
    y = np.array([1, 2, np.nan, 4, np.inf, 6, 7, 8, 9, 10])
    plot = Plot("t", [Line("", STEPS, y)])
    assert [len(piece) for piece in drawn(plot.svg) if len(piece) > 1] == [2, 5]
    assert plot.svg.count("<use") >= 8  # a mark for each of ten points but two, also for the one between


def test_one_point_and_a_constant_are_seen():
    for y in (np.array([3.0]), np.array([0.0])):
        svg = Plot("t", [Line("", STEPS[:1], y)]).svg
        assert re.search(r'<use [^>]*style="fill: var\(--series-0\)', svg)


def test_nothing_finite_is_no_plot():
    plot = Plot("t", [Line("", STEPS, np.full(10, np.nan))])
    assert list(plot.lines) == []


def test_a_long_run_is_averaged_and_says_so():
    steps = np.arange(1, 20001)
    plot = Plot("t", [Line("", steps, np.sin(steps) + steps / 1000)])
    (points,) = drawn(plot.svg)
    assert len(plot.svg) < 60_000
    assert plot.notes == ["lines: means of 34 values, bands: their extremes"]
    assert affine(np.arange(len(points)), points[:, 1]) < 3  # the sine is averaged out: picture of 169 points


def test_a_zero_has_a_place_on_a_logarithmic_axis():
    y = np.where(STEPS == 50, 0.0, 10.0 ** -(STEPS / 20))
    (points,) = drawn(Plot("t", [Line("", STEPS, y)], "log").svg)
    assert len(points) == 10
    assert points[4, 1] == points[:, 1].max()


def test_values_above_the_frame_are_told():
    y = np.r_[1000.0, np.linspace(3, 2, 99)]
    plot = Plot("t", [Line("", np.arange(100), y)], "focus")
    assert plot.svg
    assert plot.notes == ["3 values above the frame, up to 1,000"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (4.0, "4"), (7000, "7,000"), (0.06345, "0.06345"), (3.4e-7, "3.4e-7"), (2.5e12, "2.5e12"),
        (1.60531, "1.605"), (12345.6, "12,346"), (-0.5, "-0.5"), (float("nan"), "not finite"), (1e-6, "1e-6"),
    ],
)  # fmt: skip
def test_numbers_are_readable(value, text):
    assert number(value) == text
