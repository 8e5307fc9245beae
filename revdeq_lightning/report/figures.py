"""What a run came to, in a few figures."""

from typing import NamedTuple

import numpy as np

from revdeq_lightning.report.plots import number
from revdeq_lightning.report.run_folder import Run


class Figure(NamedTuple):
    """A figure on top of the page: what it is, its value, what belongs to it, and whether that is bad news."""

    name: str
    value: str
    detail: str = ""
    is_bad: bool = False


def figures(run: Run) -> list[Figure]:
    """All that the run's files tell, the result first."""
    found = (_result(run), _certificate(run), _evaluations(run), _time(run), _gradient_error(run), _contraction(run))
    return [figure for figure in found if figure]


def _result(run: Run) -> Figure | None:
    """Of the test split, else of validation, else the newest loss of training."""
    forms = {
        "bits_per_byte": ("bits per byte", number),
        "accuracy": ("accuracy", lambda value: f"{value:.2%}"),
        "loss": (f"nats per {run.item}", lambda value: f"{value:.4f}"),
        "top5_accuracy": ("in the first five", lambda value: f"{value:.2%}"),
        "token_perplexity": ("perplexity per token", number),
        "word_perplexity": ("per word", number),
    }
    splits = {"test": "test", "val": "validation, newest", "train": "training, newest"}
    for split, where in splits.items():
        values = {name: run.last(f"{split}/{name}") for name in forms}
        there = [(forms[name][0], forms[name][1](value)) for name, value in values.items() if value is not None]
        if there:
            (name, value), *others = there
            text = ", ".join(f"{v} {n}" for n, v in others)
            if split == "val" and "val/loss" in run.series:
                series = run.series["val/loss"]
                best = int(np.nanargmin(np.where(np.isfinite(series.values), series.values, np.inf)))
                text += f"; best loss {series.values[best]:.4f}, at step {series.steps[best]:,}"
            return Figure(f"{name} ({where})", value, text.lstrip("; "))
    return None


def _certificate(run: Run) -> Figure | None:
    every, certified = (run.last(f"equilibrium/num_{name}") for name in ("gradients", "certified_gradients"))
    name = "gradients certified exact"
    if every and certified is not None:
        missed = run.last("equilibrium/total_reconstruction_mismatch") or 0
        detail = f"{missed:,.0f} elements were not reconstructed" if missed else "each state came back bit for bit"
        return Figure(name, f"{certified:,.0f} of {every:,.0f}", detail, is_bad=certified < every)
    mismatch = run.series.get("equilibrium/reconstruction_mismatch")
    if mismatch is not None and mismatch.finite.size:
        exact, looked = int((mismatch.finite == 0).sum()), mismatch.finite.size
        return Figure(name, f"{exact:,} of {looked:,}", "of the steps that were logged", is_bad=exact < looked)
    if "equilibrium/forward_nfe" in run.series:
        return Figure(name, "none", "this adjoint reconstructs no state")
    return None


def _evaluations(run: Run) -> Figure | None:
    forward, backward = (run.series.get(f"equilibrium/{name}_nfe") for name in ("forward", "backward"))
    if forward is None or not forward.finite.size:
        return None
    means = [
        number(round(float(series.finite.mean()), 1)) if series and series.finite.size else "unknown"
        for series in (forward, backward)
    ]
    parts = []
    totals = [run.last(f"equilibrium/total_{name}_nfe") for name in ("forward", "backward")]
    if totals[0] is not None:
        step = run.series["equilibrium/total_forward_nfe"].steps[-1]
        parts.append(f"{sum(total or 0 for total in totals):,.0f} up to step {step:,}")
    if (residual := run.last("equilibrium/relative_residual")) is not None:
        parts.append(f"relative residual {number(residual)} at the end")
    return Figure("evaluations of f a step, forward + backward", " + ".join(means), ", ".join(parts))


def _time(run: Run) -> Figure | None:
    """Time of training, without evaluation; throughput and memory."""
    parts = []
    for unit in ("tokens", "images", "samples"):
        rate = run.series.get(f"system/{unit}_per_second")
        if rate is not None and rate.finite.size:
            parts.append(f"{number(float(np.median(rate.finite)))} {unit} a second")
    if (memory := run.last("system/peak_memory_bytes")) is not None:
        parts.append(f"{memory / 2**20:,.0f} MiB at most")
    steps = max(
        (
            int(series.steps[-1])
            for key, series in run.series.items()
            if key.startswith(("train/", "val/", "equilibrium/"))
        ),
        default=0,
    )
    seconds = run.series.get("system/seconds_per_step")
    if seconds is not None and seconds.finite.size:
        windows = np.diff(seconds.steps, prepend=0)
        known = np.isfinite(seconds.values)
        total = float(np.average(seconds.values[known], weights=windows[known])) * steps
        return Figure("time of training", duration(total), ", ".join([f"{steps:,} steps", *parts]))
    return Figure("steps of training", f"{steps:,}", ", ".join(parts)) if steps else None


def _gradient_error(run: Run) -> Figure | None:
    errors = {of: run.series.get(f"gradient_error/{of}/relative_l2") for of in ("bptt", "converged")}
    largest = {of: float(series.finite.max()) for of, series in errors.items() if series and series.finite.size}
    if not largest:
        return None
    names = {"bptt": "against BPTT", "converged": "against the converged fixed point's"}
    (of, value), *others = largest.items()
    detail = ", ".join(f"{number(error)} {names[other]}" for other, error in others)
    return Figure(f"largest gradient error {names[of]}", number(value), detail)


def _contraction(run: Run) -> Figure | None:
    radius = run.series.get("equilibrium/spectral_radius")
    if radius is None or not radius.finite.size:
        return None
    largest = float(radius.finite.max())
    detail = f"{number(float(radius.finite[-1]))} at the end"
    if largest >= 1:
        detail += ": from 1 on more steps bring the state no closer"
    return Figure("largest spectral radius of df/dz", number(largest), detail, is_bad=largest >= 1)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; the two largest."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
