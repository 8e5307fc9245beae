"""Plots of curves: PNG files for a run's folder, and SVG for its page with colors from the style sheet."""

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Table = Sequence[Mapping[str, float]]
NUM_COLORS = 8
STYLES = ("-", "--", ":", "-.")
DASHES = ("", "5 3", "1.5 2.5", "6 2 1.5 2")
"""Dashes of the legend for each style."""
MAX_POINTS = 600
"""Longer curves are averaged, as a line has no more pixels."""

# Placeholders that `_for_page` replaces with variables of the style sheet.
TEXT, GRID = "#fe0100", "#fe0101"
SERIES = [f"#fe00{i:02x}" for i in range(NUM_COLORS)]
VARIABLES = {TEXT: "var(--muted)", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}

PAGE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    **{key: TEXT for key in ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")},
    **{key: GRID for key in ("xtick.color", "ytick.color")},
}


@dataclass
class Line:
    """A curve: its name, its points, and the indices of its color and style."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    style: int = 0

    @property
    def swatch(self) -> dict[str, str]:
        """Color and dashes in the legend of the page."""
        return {"color": f"var(--series-{self.color % NUM_COLORS})", "dashes": DASHES[self.style % len(DASHES)]}


@dataclass
class Plot:
    """One panel.

    Attributes:
        title: What is drawn, with its unit.
        lines: Curves with at least one finite value.
        scale: Vertical axis: "log" if the values span more than one decade, "zero" to start at zero, "range" for the
            range of the values, or "focus" to leave out the highest.
        xlabel: Label of the horizontal axis.
        powers: Whether that axis is logarithmic with base 2.
        mark: Position of a horizontal line.
        at: Position of a vertical line.
        notes: What the drawing leaves out; filled in when it is drawn.
    """

    title: str
    lines: Sequence[Line]
    scale: str = "zero"
    xlabel: str = "optimizer step"
    powers: bool = False
    mark: float | None = None
    at: float | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines = [line for line in self.lines if np.isfinite(line.y).any()]

    @cached_property
    def svg(self) -> str:
        """The drawing as an SVG element."""
        import matplotlib
        from matplotlib.figure import Figure

        file = io.StringIO()
        style: Any = PAGE | {"svg.hashsalt": self.title}
        with matplotlib.rc_context(style):
            canvas = Figure(figsize=(4.3, 2.35), layout="constrained")
            self.draw(canvas.subplots(), SERIES, TEXT)
            canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return _for_page(file.getvalue(), self.title)

    def draw(self, axis: Any, colors: Sequence[Any], mark_color: str) -> None:
        """Draw on Matplotlib's axes."""
        from matplotlib.ticker import MaxNLocator

        for line in self.lines:
            self._draw_line(axis, line, colors[line.color % len(colors)])
        axis.set_xlabel(self.xlabel)
        axis.grid(axis="y")
        for at, draw in ((self.mark, axis.axhline), (self.at, axis.axvline)):
            if at is not None:
                draw(at, color=mark_color, linewidth=0.8, linestyle="--")
        self._scale(axis)
        xs = sorted({float(x) for line in self.lines for x in line.x})
        if self.powers:
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, [number(x) for x in xs])
            axis.minorticks_off()
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.xaxis.set_major_formatter(lambda x, _: number(x))
            if len(xs) == 1:
                axis.set_xticks(xs)

    def _draw_line(self, axis: Any, line: Line, color: Any) -> None:
        x, y = line.x.astype(float), np.where(np.isfinite(line.y), line.y, np.nan).astype(float)
        if len(x) > MAX_POINTS:
            size = math.ceil(len(x) / MAX_POINTS)
            chunks = [y[i : i + size] for i in range(0, len(y), size)]
            known = [chunk[~np.isnan(chunk)] for chunk in chunks]
            x = np.array([x[i : i + size].mean() for i in range(0, len(x), size)])
            low, high, y = (np.array([f(c) if c.size else np.nan for c in known]) for f in (np.min, np.max, np.mean))
            axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            if not self.notes:
                self.notes.append(f"lines: means of {size} values, bands: their extremes")
        alone = np.isnan(np.concatenate([[np.nan], y[:-1]])) & np.isnan(np.concatenate([y[1:], [np.nan]]))
        marked = range(len(y)) if len(y) <= 30 else np.flatnonzero(alone & ~np.isnan(y)).tolist()
        style = STYLES[line.style % len(STYLES)]
        axis.plot(x, y, color=color, linestyle=style, marker="o", markevery=list(marked), label=line.label)

    def _scale(self, axis: Any) -> None:
        """Set the scale of the vertical axis."""
        from matplotlib.ticker import LogLocator

        values = np.concatenate([line.y[np.isfinite(line.y)] for line in self.lines])
        values = values if self.mark is None else np.append(values, self.mark)
        low, high = values.min(), values.max()
        positive = values[values > 0]
        if self.scale == "log" and low >= 0 and positive.size and high > 10 * positive.min():
            if low == 0:  # drawn below the smallest positive value
                axis.set_yscale("symlog", linthresh=positive.min(), linscale=0.5)
                first, last = math.ceil(math.log10(3 * positive.min())), math.floor(math.log10(high))
                axis.set_yticks([0, *10.0 ** np.arange(first, last + 1, max(1, (last - first) // 4))])
            else:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=7))
            axis.minorticks_off()
        elif self.scale == "focus" and values.size > 20:
            top = np.quantile(values, 0.97)
            if high > top + 0.5 * (top - low):
                self.notes.append(f"{int((values > top).sum())} values above the frame, up to {number(high)}")
                high = top
            axis.set_ylim(low - 0.06 * (high - low or 1), high + 0.1 * (high - low or 1))
        elif self.scale in ("zero", "log"):
            top = 1.1 * max(high, 0.0) or 1
            axis.set_ylim(min(-0.03 * top, 1.1 * low), top)  # leave room for a curve at zero
        axis.yaxis.set_major_formatter(lambda y, _: number(y))


@contextmanager
def saved_figure(path: Path, width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[list[Any]]:
    """The axes of a figure, with its size in inches, which is written at the end."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    yield list(canvas.subplots(rows, columns, squeeze=False).flat)
    canvas.savefig(path, dpi=120)


def save_png(plots: Sequence[Plot], path: Path) -> None:
    """Draw panels side by side, with lines from dark to light. Without panels, no file is written."""
    from matplotlib import colormaps

    if not plots:
        return
    with saved_figure(path, 5 * len(plots), 3.6, columns=len(plots)) as axes:
        for plot, axis in zip(plots, axes, strict=True):
            plot.draw(axis, list(colormaps["viridis"](np.linspace(0, 0.9, len(plot.lines)))), "0.7")
            axis.set_title(plot.title)
            if plot.lines[0].label:
                axis.legend(frameon=False, fontsize="small")


def residual_plots(curves: Sequence[tuple[str, Table]]) -> list[Plot]:
    """Plot the residual along the iteration, a panel for each equilibrium; a curve is a label and a step's rows."""
    solves = sorted({row["solve"] for _, rows in curves for row in rows})
    plots = []
    for solve in solves:
        tables = [(label, [row for row in rows if row["solve"] == solve]) for label, rows in curves]
        lines = [_line(i, label, rows, "evaluation", "relative_residual") for i, (label, rows) in enumerate(tables)]
        of = f", equilibrium {solve:.0f}" if len(solves) > 1 else ""
        plots.append(Plot(f"relative residual along the iteration{of}", lines, "log", "evaluation of f"))
    return [plot for plot in plots if plot.lines]


def sweep_plots(sweeps: Sequence[tuple[str, Table]], at: float | None = None, item: str = "") -> dict[str, Plot]:
    """Plot each figure of depth sweeps, of one model at several steps or of several models, over the evaluations of f.

    `at` is the number of evaluations in training, `item` what the loss is a mean over.
    """
    xlabel = "evaluations of f" + (" (dashed: as trained)" if at else "")
    names = dict.fromkeys(name for _, rows in sweeps for row in rows[:1] for name in row)
    plots = {}
    for name in [name for name in names if name not in ("step", "steps", "forward_nfe")]:
        lines = [_line(i, label, rows, "forward_nfe", name) for i, (label, rows) in enumerate(sweeps)]
        what = f"loss [nats per {item}]" if item and name == "loss" else name
        plots[name] = Plot(f"{what} with other numbers of evaluations", lines, "range", xlabel, powers=True, at=at)
    return {name: plot for name, plot in plots.items() if plot.lines}


def by_step(table: Table) -> list[tuple[str, Table]]:
    """Group the rows by step, each with a label, in order."""
    steps = sorted({int(row["step"]) for row in table})
    return [(f"step {step + 1:,}", [row for row in table if row["step"] == step]) for step in steps]


def _line(color: int, label: str, rows: Table, x: str, y: str) -> Line:
    xs, ys = (np.array([row.get(key, np.nan) for row in rows], dtype=float) for key in (x, y))
    return Line(label, xs, ys, color)


def _for_page(svg: str, title: str) -> str:
    label = f'role="img" aria-label="{html.escape(title)}"'.replace("\\", "/")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf"<svg {label} \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    return re.sub("|".join(VARIABLES), lambda match: VARIABLES[match.group()], svg)


def number(value: float) -> str:
    """Format a number with four digits, separated thousands, and powers of ten if it is very large or small."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size == 0 or (float(value).is_integer() and size < 1e9):
        return f"{value:,.0f}"
    if size >= 1e9 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:,.4g}"
