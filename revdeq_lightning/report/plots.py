"""Curves as SVG whose colours are variables of the page's style: one drawing for light, dark and paper."""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_COLORS = 8
STYLES = ("-", "--", ":", "-.")
DASHES = ("", "5 3", "1.5 2.5", "6 2 1.5 2")
"""Of the legend, one for each style."""
MAX_POINTS = 600
"""More are averaged: a line has no more pixels."""

# Matplotlib writes colours as they are given: these stand for variables of the style sheet.
TEXT, GRID = "#fe0100", "#fe0101"
SERIES = [f"#fe00{i:02x}" for i in range(NUM_COLORS)]
VARIABLES = {TEXT: "var(--muted)", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
}


@dataclass
class Line:
    """A curve: its name, its points, and the numbers of its colour and style."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    style: int = 0

    @property
    def swatch(self) -> dict[str, str]:
        """How the legend shows it."""
        return {"color": f"var(--series-{self.color % NUM_COLORS})", "dashes": DASHES[self.style % len(DASHES)]}


@dataclass
class Plot:
    """One panel.

    Attributes:
        title: What is drawn, with its unit.
        lines: Curves with at least one finite value.
        scale: "log" where the values span more than one decade, "zero" from zero on, "range" of the values, or
            "focus" on all but the highest.
        xlabel: Of the horizontal axis.
        powers: Whether that is logarithmic to base 2.
        mark: Where a horizontal line is drawn.
        at: Where a vertical one is.
    """

    title: str
    lines: Sequence[Line]
    scale: str = "zero"
    xlabel: str = "optimizer step"
    powers: bool = False
    mark: float | None = None
    at: float | None = None

    def __post_init__(self) -> None:
        self.lines = [line for line in self.lines if np.isfinite(line.y).any()]
        self.notes: list[str] = []
        self.svg = _draw(self) if self.lines else ""


def _draw(plot: Plot) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = STYLE | {"svg.hashsalt": plot.title}
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(4.3, 2.35), layout="constrained")
        axis = canvas.subplots()
        for line in plot.lines:
            _draw_line(axis, plot, line)
        axis.set_xlabel(plot.xlabel)
        axis.grid(axis="y")
        for at, draw in ((plot.mark, axis.axhline), (plot.at, axis.axvline)):
            if at is not None:
                draw(at, color=TEXT, linewidth=0.8, linestyle="--")
        _scale(axis, plot)
        if plot.powers:
            ticks = sorted({float(x) for line in plot.lines for x in line.x})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [number(x) for x in ticks])
            axis.minorticks_off()
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.xaxis.set_major_formatter(lambda x, _: number(x))
            if len({float(x) for line in plot.lines for x in line.x}) == 1:
                axis.set_xticks([float(plot.lines[0].x[0])])
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(file.getvalue(), plot.title)


def _draw_line(axis: Any, plot: Plot, line: Line) -> None:
    color, style = SERIES[line.color % NUM_COLORS], STYLES[line.style % len(STYLES)]
    x, y = line.x.astype(float), np.where(np.isfinite(line.y), line.y, np.nan).astype(float)
    if len(x) > MAX_POINTS:
        size = math.ceil(len(x) / MAX_POINTS)
        chunks = [y[i : i + size] for i in range(0, len(y), size)]
        known = [chunk[~np.isnan(chunk)] for chunk in chunks]
        x = np.array([x[i : i + size].mean() for i in range(0, len(x), size)])
        low, high, y = (np.array([f(c) if c.size else np.nan for c in known]) for f in (np.min, np.max, np.mean))
        axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        if not plot.notes:
            plot.notes.append(f"lines: means of {size} values, bands: their extremes")
    alone = np.isnan(np.concatenate([[np.nan], y[:-1]])) & np.isnan(np.concatenate([y[1:], [np.nan]]))
    marked = range(len(y)) if len(y) <= 30 else np.flatnonzero(alone & ~np.isnan(y)).tolist()
    axis.plot(x, y, color=color, linestyle=style, marker="o", markevery=list(marked))


def _scale(axis: Any, plot: Plot) -> None:
    """The vertical axis: what is of interest fills it."""
    from matplotlib.ticker import LogLocator

    values = np.concatenate([line.y[np.isfinite(line.y)] for line in plot.lines])
    values = values if plot.mark is None else np.append(values, plot.mark)
    low, high = values.min(), values.max()
    positive = values[values > 0]
    if plot.scale == "log" and low >= 0 and positive.size and high > 10 * positive.min():
        if low == 0:  # has its place below the smallest value
            axis.set_yscale("symlog", linthresh=positive.min(), linscale=0.5)
            first, last = math.ceil(math.log10(3 * positive.min())), math.floor(math.log10(high))
            axis.set_yticks([0, *10.0 ** np.arange(first, last + 1, max(1, (last - first) // 4))])
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=7))
        axis.minorticks_off()
    elif plot.scale == "focus" and values.size > 20:
        top = np.quantile(values, 0.97)
        if high > top + 0.5 * (top - low):
            plot.notes.append(f"{int((values > top).sum())} values above the frame, up to {number(high)}")
            high = top
        axis.set_ylim(low - 0.06 * (high - low or 1), high + 0.1 * (high - low or 1))
    elif plot.scale in ("zero", "log"):
        top = 1.1 * max(high, 0.0) or 1
        axis.set_ylim(min(-0.03 * top, 1.1 * low), top)  # a curve at zero is not half behind the frame
    axis.yaxis.set_major_formatter(lambda y, _: number(y))


def _for_page(svg: str, title: str) -> str:
    """The drawing as an element of a page, its colours as variables."""
    label = f'role="img" aria-label="{html.escape(title)}"'.replace("\\", "/")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf"<svg {label} \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    return re.sub("|".join(VARIABLES), lambda match: VARIABLES[match.group()], svg)


def number(value: float) -> str:
    """A number to read: four digits, thousands separated, powers of ten where it is far from one."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size == 0 or (float(value).is_integer() and size < 1e9):
        return f"{value:,.0f}"
    if size >= 1e9 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:,.4g}"
