"""The curves of a run as a figure."""

import csv
import math
from pathlib import Path
from typing import Any

PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss [nats]", ("train/loss", "val/loss"), False),
    ("accuracy", ("train/accuracy", "val/accuracy"), False),
    ("relative residual", ("equilibrium/relative_residual",), True),
    ("evaluations of f a step", ("equilibrium/forward_nfe", "equilibrium/backward_nfe"), False),
    ("throughput [1/s]", ("system/tokens_per_second", "system/images_per_second"), False),
    ("seconds a step", tuple(f"system/{part}_seconds" for part in ("data", "forward", "backward", "optimizer")), False),
    ("spectral radius of df/dz", ("equilibrium/spectral_radius",), False),
    ("gradient error", tuple(f"gradient_error/{of}/relative_l2" for of in ("bptt", "converged")), True),
)


def read_curves(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each key that was logged; finite values only."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, text in row.items():
                if text and key != "step" and math.isfinite(value := float(text)):
                    curves.setdefault(key, []).append((int(row["step"]) + 1, value))
    return curves


def draw_curves(metrics: Path, figure: Path) -> None:
    """Draw loss, residual, evaluations and throughput over optimizer steps into a PNG file."""
    from matplotlib.figure import Figure

    curves = read_curves(metrics)
    panels = [panel for panel in PANELS if any(key in curves for key in panel[1])]
    canvas = Figure(figsize=(10, 3.2 * math.ceil(len(panels) / 2)), layout="constrained")
    axes: list[Any] = list(canvas.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).flat)
    for axis, (title, keys, logarithmic) in zip(axes, panels, strict=False):
        for key in (key for key in keys if key in curves):
            steps, heights = zip(*curves[key], strict=True)
            marker, style = "o" if len(steps) < 20 else None, "--" if "backward" in key else "-"
            axis.plot(steps, heights, style, label=key, marker=marker, markersize=3, linewidth=1.2)
        axis.set(title=title, xlabel="optimizer step")
        values = [value for key in keys for _, value in curves.get(key, [])]
        if logarithmic and max(values) > 10 * min(values) > 0:
            axis.set_yscale("log")
        else:
            _focus(axis, values, zero="loss" not in title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    canvas.savefig(figure, dpi=120)


def _focus(axis: Any, values: list[float], zero: bool) -> None:
    """Counts and rates from zero on; a loss without the height of its first steps."""
    if zero:
        axis.set_ylim(0, 1.1 * max(values) or 1)
    elif len(values) > 20:
        ordered = sorted(values)
        low, high = ordered[0], ordered[int(0.97 * len(ordered))]
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
