"""Draw the panels of the dashboard with Matplotlib from run folders. W&B itself looks different."""

import csv
import json
import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.image import imread

COLUMNS = 3
STYLES = ("-", "--", ":", "-.", (0, (1, 1)))


def draw(template: dict[str, Any], runs: list[Path], path: Path) -> None:
    """Draw each section as rows of three panels; a panel without data stays empty, as in W&B."""
    sections = template["sections"]
    rows = [math.ceil(len(section["panels"]) / COLUMNS) for section in sections]
    canvas = Figure(figsize=(5 * COLUMNS, 2.5 * sum(rows) + 0.45 * len(rows)), layout="constrained")
    canvas.suptitle(
        f"{template['name']}: the panels of dashboard.yaml, drawn with Matplotlib from {len(runs)} runs:"
        f" {', '.join('/'.join(run.parts[-2:]) for run in runs)} (not a screenshot of W&B)",
        fontsize="medium",
    )
    for part, section, num_rows in zip(
        canvas.subfigures(len(rows), 1, height_ratios=rows), sections, rows, strict=True
    ):
        part.suptitle(section["name"], x=0.01, ha="left", fontweight="bold", fontsize="medium")
        axes = list(part.subplots(num_rows, COLUMNS, squeeze=False).flat)
        for axis, settings in zip(axes, section["panels"], strict=False):
            axis.set_title(settings["title"], fontsize="small")
            axis.tick_params(labelsize="x-small")
            if not any([show(axis, settings, run, color=f"C{i}") for i, run in enumerate(runs)]):
                axis.text(0.5, 0.5, "no data in these runs", ha="center", color="0.5", fontsize="small")
                axis.set_axis_off()
        for axis in axes[len(section["panels"]) :]:
            axis.set_visible(False)
    canvas.savefig(path, dpi=80)


def show(axis: Any, settings: dict[str, Any], run: Path, color: str) -> bool:
    """Draw what this run has, and return whether it has anything."""
    if "lines" in settings:
        return lines(axis, settings, run, color)
    if "chart" in settings:
        return chart(axis, settings["chart"], run, color)
    if "table" in settings:
        return table(axis, settings["table"], run)
    return picture(axis, run)


def lines(axis: Any, settings: dict[str, Any], run: Path, color: str) -> bool:
    """Draw columns of `metrics.csv` over the steps."""
    shown = False
    for key, style in zip(settings["lines"], STYLES, strict=False):
        points = [(int(row["step"]), float(row[key])) for row in read(run / "metrics.csv") if row.get(key)]
        if points:
            shown = True
            marker = "o" if len(points) < 8 else None
            axis.plot(
                *zip(*points, strict=True),
                linestyle=style,
                color=color,
                label=f"{run.parent.name} {key}",
                marker=marker,
            )
    if shown:
        if settings.get("log_y"):
            axis.set_yscale("log")
        axis.set_xlabel("trainer/global_step", fontsize="x-small")
        axis.legend(fontsize=6, frameon=False)
    return shown


def chart(axis: Any, key: str, run: Path, color: str) -> bool:
    """Draw the newest curves, older ones paler."""
    if key == "equilibrium/residual_curve":
        rows, x, y = read(run / "residual_curve.csv"), "evaluation", "relative_residual"
        rows = [row for row in rows if row["solve"] == "1"]
        axis.set_yscale("log")
    else:
        rows, x, y = read(run / "depth_sweep_validation.csv"), "forward_nfe", key.split("_")[-1]
        rows = [row for row in rows if y in row]
    steps = list(dict.fromkeys(row["step"] for row in rows))[-8:]
    for i, step in enumerate(steps):
        points = [(float(row[x]), float(row[y])) for row in rows if row["step"] == step]
        label = f"{run.parent.name} step {int(step) + 1}" if i == len(steps) - 1 else None
        axis.plot(*zip(*points, strict=True), color=color, alpha=(i + 1) / len(steps), marker=".", label=label)
    if steps:
        axis.set_xlabel("evaluations of f", fontsize="x-small")
        axis.legend(fontsize=6, frameon=False)
    return bool(steps)


def table(axis: Any, key: str, run: Path) -> bool:
    """Write the newest samples, or the rows of the newest sweep, of one run."""
    if axis.texts:
        return True
    if key == "samples/text":
        path = run / "samples.jsonl"
        samples = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        text = "".join(
            textwrap.fill(repr(s["prompt"] + s["text"])[:150], 55) + f"\n(step {s['step'] + 1})\n" for s in samples[-3:]
        )
    else:
        rows = read(run / "depth_sweep_validation.csv")
        newest = [row for row in rows if row["step"] == rows[-1]["step"]]
        lines = ["  ".join(newest[0])] if newest else []
        text = "\n".join(lines + ["  ".join(value[:6] for value in row.values()) for row in newest])
    axis.text(0.02, 0.97, text, va="top", family="monospace", fontsize=6.5, transform=axis.transAxes)
    axis.set_axis_off()
    return bool(text)


def picture(axis: Any, run: Path) -> bool:
    """Show the newest sheet of images."""
    sheets = sorted((run / "samples").glob("*.png"))
    if sheets:
        axis.imshow(imread(sheets[-1]))
        axis.set_axis_off()
    return bool(sheets)


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
