"""Which curves a page shows, of one run or of several beside each other."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from revdeq_lightning.report.plots import Line, Plot
from revdeq_lightning.report.run_folder import Run, Series, Table


class Panel(NamedTuple):
    """Curves of one kind: those of a single run, those of a comparison if fewer, and how they are drawn."""

    title: str
    keys: tuple[str, ...]
    compared: tuple[str, ...] = ()
    scale: str = "zero"
    factor: float = 1
    mark: float | None = None


NOT_CERTIFIED = "gradients not certified"
PANELS = (
    Panel("loss [nats per {item}]", ("train/loss", "val/loss"), scale="focus"),
    Panel("bits per byte", ("val/bits_per_byte",), scale="focus"),
    Panel("accuracy", ("train/accuracy", "val/accuracy", "val/top5_accuracy"), ("val/accuracy",), scale="range"),
    Panel(
        "relative residual at the end of the solve",
        ("equilibrium/relative_residual", "equilibrium/backward_relative_residual"),
        scale="log",
    ),
    Panel(
        "evaluations of f a step",
        ("equilibrium/forward_nfe", "equilibrium/backward_nfe", "equilibrium/sample_nfe_mean"),
    ),
    Panel("fraction of samples converged", ("equilibrium/fraction_converged",)),
    Panel("gradients not certified exact, of all so far", (NOT_CERTIFIED,)),
    Panel(
        "relative error of the gradient",
        ("gradient_error/bptt/relative_l2", "gradient_error/converged/relative_l2"),
        scale="log",
    ),
    Panel("spectral radius of df/dz", ("equilibrium/spectral_radius",), mark=1),
    Panel("peak memory [MiB]", ("system/peak_memory_bytes",), factor=2**-20),
    Panel("{item}s a second", ("system/tokens_per_second", "system/images_per_second", "system/samples_per_second")),
    Panel(
        "seconds a step",
        tuple(f"system/{part}_seconds" for part in ("data", "forward", "backward", "optimizer", "other")),
        ("system/seconds_per_step",),
    ),
    Panel("model FLOP utilization", ("system/model_flop_utilization",)),
)
LEGEND = {
    "train/accuracy": "train",
    "train/loss": "train",
    "val/accuracy": "val",
    "val/loss": "val",
    "val/top5_accuracy": "val, in the first five",
    **{f"system/{part}_seconds": part for part in ("data", "forward", "backward", "optimizer", "other")},
    "equilibrium/sample_nfe_mean": "forward, mean over samples until each converged",
    "equilibrium/forward_nfe": "forward",
    "equilibrium/backward_nfe": "backward",
    "equilibrium/relative_residual": "forward",
    "equilibrium/backward_relative_residual": "backward",
    "gradient_error/bptt/relative_l2": "against BPTT",
    "gradient_error/converged/relative_l2": "against the converged fixed point's",
}
TOLD_ELSEWHERE = (
    *("epoch", "equilibrium/num_gradients", "equilibrium/num_certified_gradients", "system/seconds_per_step"),
    *("equilibrium/total_forward_nfe", "equilibrium/total_backward_nfe", "system/evaluations_per_second"),
    *("equilibrium/total_reconstruction_mismatch", "equilibrium/reconstruction_mismatch"),
    *("val/token_perplexity", "val/word_perplexity"),
)
"""Keys without a panel: in the figures on top, in the table of all keys, or another unit of what is drawn."""


def curves(runs: Sequence[Run]) -> list[Plot]:
    """The panels of which at least one run has a value."""
    plots = []
    for panel in PANELS:
        keys = panel.compared if len(runs) > 1 and panel.compared else panel.keys
        title = panel.title.format(item=runs[0].item)
        plots.append(Plot(title, _lines(runs, keys, panel.factor), panel.scale, mark=panel.mark))
    return [plot for plot in plots if plot.lines]


def other_curves(runs: Sequence[Run]) -> list[Plot]:
    """What else was logged, one panel a key; keys that differ in one word before the last share one."""
    shown = {key for panel in PANELS for key in panel.keys} | set(TOLD_ELSEWHERE)
    shown |= {f"test/{name}" for name in ("loss", "accuracy")}
    keys = dict.fromkeys(key for run in runs for key in run.series if key not in shown and not key.startswith("test/"))
    groups: dict[str, list[str]] = {}
    for key in keys:
        words = key.split("/")
        title = key if len(words) < 3 else "/".join([*words[:-2], "...", words[-1]])
        groups.setdefault(title, []).append(key)
    plots = [Plot(title, _lines(runs, tuple(group)), "focus") for title, group in groups.items()]
    return [plot for plot in plots if plot.lines]


def sweep_plots(runs: Sequence[Run]) -> list[Plot]:
    """Each figure of the depth sweeps over the evaluations of f; those in training where there is no other."""
    lines: dict[str, list[Line]] = {}
    for i, run in enumerate(runs):
        table = run.sweep or newest(run.validation_sweep)
        for name in [name for name in (table[0] if table else {}) if name not in ("step", "steps", "forward_nfe")]:
            lines.setdefault(name, []).append(Line(run.label if len(runs) > 1 else "", *columns(table, name), i))
    at = trained_nfe(runs[0]) if len(runs) == 1 else None
    units = {"loss": f"loss [nats per {runs[0].item}]"}
    xlabel = "evaluations of f" + (" (dashed: as trained)" if at else "")
    titles = {name: f"{units.get(name, name)} with other numbers of evaluations" for name in lines}
    plots = [Plot(titles[n], group, "range", xlabel, powers=True, at=at) for n, group in lines.items()]
    return [plot for plot in plots if plot.lines]


def residual_plots(runs: Sequence[Run]) -> list[Plot]:
    """Residual along the iteration, a panel for each equilibrium: first and newest of a run, newest of several."""
    lines: dict[float, list[Line]] = {}
    for i, run in enumerate(runs):
        steps = sorted({row["step"] for row in run.residual_curve})
        for j, step in enumerate(dict.fromkeys([steps[0], steps[-1]] if len(runs) == 1 and steps else steps[-1:])):
            for solve in sorted({row["solve"] for row in run.residual_curve}):
                rows = [row for row in run.residual_curve if row["step"] == step and row["solve"] == solve]
                label = run.label if len(runs) > 1 else f"at step {step + 1:,.0f}"
                x, y = (np.array([row[key] for row in rows]) for key in ("evaluation", "relative_residual"))
                lines.setdefault(solve, []).append(Line(label, x, y, i + j))
    name = "relative residual along the iteration"
    titles = {solve: name if len(lines) == 1 else f"{name}, equilibrium {solve:.0f}" for solve in lines}
    plots = [Plot(titles[s], lines[s], "log", "evaluation of f") for s in sorted(lines)]
    return [plot for plot in plots if plot.lines]


def newest(table: Table) -> Table:
    """The rows of the last step."""
    return [row for row in table if row["step"] == table[-1]["step"]]


def columns(table: Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations and one figure."""
    return np.array([row["forward_nfe"] for row in table]), np.array([row.get(name, np.nan) for row in table])


def trained_nfe(run: Run) -> float | None:
    """Evaluations of f in a forward pass of training, if all steps made as many."""
    series = run.series.get("equilibrium/forward_nfe")
    values = set() if series is None else set(series.finite.tolist())
    return values.pop() if len(values) == 1 else None


def _lines(runs: Sequence[Run], keys: tuple[str, ...], factor: float = 1) -> list[Line]:
    """A line for each run and key: one run tells keys by colour, several tell runs by colour and keys by style."""
    lines = []
    for i, run in enumerate(runs):
        there = [key for key in keys if _series(run, key)]
        for j, key in enumerate(keys):
            if series := _series(run, key):
                name = LEGEND.get(key, key) if len(there) > 1 else ""
                label = name if len(runs) == 1 else f"{run.label}, {name}" if name else run.label
                color, style = (there.index(key), int("backward" in key)) if len(runs) == 1 else (i, j)
                lines.append(Line(label, series.steps, series.values * factor, color, style))
    return lines


def _series(run: Run, key: str) -> Series | None:
    return DERIVED[key](run) if key in DERIVED else run.series.get(key)


def _not_certified(run: Run) -> Series | None:
    """Gradients less those certified exact."""
    every, certified = (run.series.get(f"equilibrium/num_{name}") for name in ("gradients", "certified_gradients"))
    if every is None or certified is None or len(every.steps) != len(certified.steps):
        return None
    return Series(every.steps, every.values - certified.values)


DERIVED: dict[str, Callable[[Run], Series | None]] = {NOT_CERTIFIED: _not_certified}
