"""The curves on a page, of one run or of several runs side by side."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from revdeq_lightning.loggers.plots import Line, Plot, Table, by_step, residual_plots, sweep_plots
from revdeq_lightning.report.run_folder import NOT_CERTIFIED, Run


class Panel(NamedTuple):
    """Keys and names of the curves of one plot; `compared` are the keys in a comparison, if not all."""

    title: str
    keys: Mapping[str, str]
    compared: tuple[str, ...] = ()
    scale: str = "zero"
    factor: float = 1
    mark: float | None = None


SOLVED = {"val/solved": "puzzles solved", "val/cell_accuracy": "cells right"}
ACCURACIES = {"train/accuracy": "train", "val/accuracy": "val", "val/top5_accuracy": "val, in the first five"}
EVALUATIONS = {
    "equilibrium/forward_nfe": "forward",
    "equilibrium/backward_nfe": "backward",
    "equilibrium/sample_nfe_mean": "forward, mean over samples until each converged",
}
RESIDUALS = {"equilibrium/relative_residual": "forward", "equilibrium/backward_relative_residual": "backward"}
GRADIENT_ERRORS = {
    "gradient_error/bptt/relative_l2": "against BPTT",
    "gradient_error/converged/relative_l2": "against the converged fixed point's",
}
UNITS = ("tokens", "images", "puzzles", "samples")
SECONDS = {f"system/{part}_seconds": part for part in ("data", "forward", "backward", "optimizer", "other")}
PANELS = (
    Panel("loss [nats per {item}]", {"train/loss": "train", "val/loss": "val"}, scale="focus"),
    Panel("bits per byte", {"val/bits_per_byte": "val"}, scale="focus"),
    Panel("fraction solved", SOLVED, ("val/solved",), scale="range"),
    Panel("accuracy", ACCURACIES, ("val/accuracy",), scale="range"),
    Panel("relative residual at the end of the solve", RESIDUALS, scale="log"),
    Panel("evaluations of f a step", EVALUATIONS),
    Panel("fraction of samples converged", {"equilibrium/fraction_converged": ""}),
    Panel("gradients not certified exact, of all so far", {NOT_CERTIFIED: ""}),
    Panel("relative error of the gradient", GRADIENT_ERRORS, scale="log"),
    Panel("spectral radius of df/dz", {"equilibrium/spectral_radius": ""}, mark=1),
    Panel("learning rate", {"train/lr": "AdamW", "train/muon_lr": "Muon"}),
    Panel("peak memory [MiB]", {"system/peak_memory_bytes": ""}, factor=2**-20),
    Panel("{unit}s a second", {f"system/{item}_per_second": item for item in UNITS}),
    Panel("seconds a step", SECONDS, ("system/seconds_per_step",)),
    Panel("model FLOP utilization", {"system/model_flop_utilization": ""}),
)
TOLD_ELSEWHERE = (
    *("epoch", "equilibrium/num_gradients", "equilibrium/num_certified_gradients", "system/seconds_per_step"),
    *("equilibrium/total_forward_nfe", "equilibrium/total_backward_nfe", "system/evaluations_per_second"),
    *("equilibrium/total_reconstruction_mismatch", "equilibrium/reconstruction_mismatch"),
    *("val/token_perplexity", "val/word_perplexity"),
)
"""Keys without a panel: they are in the figures at the top or in another unit of a panel."""


def curves(runs: Sequence[Run]) -> list[Plot]:
    """The panels for which at least one run has a value."""
    plots = []
    for panel in PANELS:
        keys = dict.fromkeys(panel.compared, "") if len(runs) > 1 and panel.compared else panel.keys
        title = panel.title.format(item=runs[0].item, unit=runs[0].unit)
        plots.append(Plot(title, _lines(runs, keys, panel.factor), panel.scale, mark=panel.mark))
    return [plot for plot in plots if plot.lines]


def other_curves(runs: Sequence[Run]) -> list[Plot]:
    """Panels of the other keys, one each; keys that differ only in the second-to-last word share a panel."""
    shown = {key for panel in PANELS for key in panel.keys} | set(TOLD_ELSEWHERE)
    keys = dict.fromkeys(key for run in runs for key in run.series if key not in shown and not key.startswith("test/"))
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        words = key.split("/")
        title = key if len(words) < 3 else "/".join([*words[:-2], "...", words[-1]])
        groups.setdefault(title, {})[key] = key
    plots = [Plot(title, _lines(runs, group), "focus") for title, group in groups.items()]
    return [plot for plot in plots if plot.lines]


def equilibrium_plots(runs: Sequence[Run]) -> list[Plot]:
    """Residual curves (the first and the newest of one run, or the newest of several) and the depth sweeps."""
    residuals: list[tuple[str, Table]] = []
    for run in runs:
        steps = by_step(run.residual_curve)
        if len(runs) > 1:
            residuals.append((run.label, steps[-1][1] if steps else []))
        else:
            residuals += [steps[0], steps[-1]] if len(steps) > 1 else steps
    sweeps = [(run.label if len(runs) > 1 else "", run.newest_sweep) for run in runs]
    at = runs[0].trained_nfe if len(runs) == 1 else None
    return [*residual_plots(residuals), *sweep_plots(sweeps, at, runs[0].item).values()]


def _lines(runs: Sequence[Run], keys: Mapping[str, str], factor: float = 1) -> list[Line]:
    """A line for each run and key: color distinguishes the keys of one run, or several runs (and style the keys)."""
    lines = []
    for i, run in enumerate(runs):
        there = [key for key in keys if run[key].steps.size]
        for j, key in enumerate(keys):
            if key in there:
                name = keys[key] if len(there) > 1 else ""
                label = name if len(runs) == 1 else f"{run.label}, {name}" if name else run.label
                color, style = (there.index(key), int("backward" in key)) if len(runs) == 1 else (i, j)
                lines.append(Line(label, run[key].steps, run[key].values * factor, color, style))
    return lines
