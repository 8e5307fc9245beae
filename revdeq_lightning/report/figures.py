"""The main figures of a run."""

from typing import NamedTuple

import numpy as np

from revdeq_lightning.loggers.plots import number
from revdeq_lightning.report.panels import UNITS
from revdeq_lightning.report.run_folder import Run


class Figure(NamedTuple):
    """A figure at the top of the page; `is_bad` highlights it."""

    name: str
    value: str
    detail: str = ""
    is_bad: bool = False


def figures(run: Run) -> dict[str, Figure]:
    """All figures of the run's files by name, the result first."""
    found = (_result(run), _certificate(run), _evaluations(run), _time(run))
    return {figure.name: figure for figure in found if figure}


def _result(run: Run) -> Figure | None:
    """The figures of the test, otherwise of the newest validation, otherwise of training."""
    forms = {
        "bits_per_byte": ("bits per byte", number),
        "accuracy": ("accuracy", "{:.2%}".format),
        "solved": ("solved", "{:.2%}".format),
        "loss": (f"nats per {run.item}", "{:.4f}".format),
        "top5_accuracy": ("in the first five", "{:.2%}".format),
        "token_perplexity": ("perplexity per token", number),
        "word_perplexity": ("per word", number),
    }
    for split, where in {"test": "test", "val": "validation, newest", "train": "training, newest"}.items():
        values = {name: run[f"{split}/{name}"].last for name in forms}
        there = [(forms[name][0], forms[name][1](value)) for name, value in values.items() if value is not None]
        if there:
            (name, value), *others = there
            text = ", ".join(f"{v} {n}" for n, v in others)
            losses = run["val/loss"]
            if split == "val" and losses.finite.size:
                best = int(np.nanargmin(np.where(np.isfinite(losses.values), losses.values, np.inf)))
                text += f"; best loss {losses.values[best]:.4f}, at step {losses.steps[best]:,}"
            return Figure(f"{name} ({where})", value, text.lstrip("; "))
    return None


def _certificate(run: Run) -> Figure | None:
    every, certified = (run[f"equilibrium/num_{name}"].last for name in ("gradients", "certified_gradients"))
    name = "gradients certified exact"
    if every and certified is not None:
        missed = run["equilibrium/total_reconstruction_mismatch"].last or 0
        detail = f"{missed:,.0f} elements were not reconstructed" if missed else "each state came back bit for bit"
        return Figure(name, f"{certified:,.0f} of {every:,.0f}", detail, is_bad=certified < every)
    mismatches = run["equilibrium/reconstruction_mismatch"].finite
    if mismatches.size:
        exact, looked = int((mismatches == 0).sum()), mismatches.size
        return Figure(name, f"{exact:,} of {looked:,}", "of the steps that were logged", is_bad=exact < looked)
    if "equilibrium/forward_nfe" in run.series:
        return Figure(name, "none", "this adjoint reconstructs no state")
    return None


def _evaluations(run: Run) -> Figure | None:
    forward, backward = (run[f"equilibrium/{name}_nfe"].finite for name in ("forward", "backward"))
    if not forward.size:
        return None
    means = [number(round(float(nfe.mean()), 1)) if nfe.size else "unknown" for nfe in (forward, backward)]
    parts = []
    total, total_backward = (run[f"equilibrium/total_{name}_nfe"] for name in ("forward", "backward"))
    if total.last is not None:
        parts.append(f"{total.last + (total_backward.last or 0):,.0f} up to step {total.steps[-1]:,}")
    if (residual := run["equilibrium/relative_residual"].last) is not None:
        parts.append(f"relative residual {number(residual)} at the end")
    return Figure("evaluations of f a step, forward + backward", " + ".join(means), ", ".join(parts))


def _time(run: Run) -> Figure | None:
    """Training time without evaluation, throughput and memory."""
    rates = {unit: run[f"system/{unit}_per_second"].finite for unit in UNITS}
    parts = [f"{number(float(np.median(rate)))} {unit} a second" for unit, rate in rates.items() if rate.size]
    if (memory := run["system/peak_memory_bytes"].last) is not None:
        parts.append(f"{memory / 2**20:,.0f} MiB at most")
    of_training = [series for key, series in run.series.items() if key.startswith(("train/", "val/", "equilibrium/"))]
    steps = max((int(series.steps[-1]) for series in of_training), default=0)
    seconds = run["system/seconds_per_step"]
    if seconds.finite.size:
        windows = np.diff(seconds.steps, prepend=0)
        known = np.isfinite(seconds.values)
        total = float(np.average(seconds.values[known], weights=windows[known])) * steps
        return Figure("time of training", duration(total), ", ".join([f"{steps:,} steps", *parts]))
    return Figure("steps of training", f"{steps:,}", ", ".join(parts)) if steps else None


def duration(seconds: float) -> str:
    """Format a duration with its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
