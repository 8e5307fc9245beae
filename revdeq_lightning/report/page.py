"""Renders and writes the page of a run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revdeq_lightning import __version__
from revdeq_lightning.loggers.plots import NUM_COLORS, number
from revdeq_lightning.report import panels
from revdeq_lightning.report.figures import figures
from revdeq_lightning.report.run_folder import Run, read_runs
from revdeq_lightning.runs.folder import REPORT

MAX_RUNS = NUM_COLORS
"""In a comparison, each run has its own color."""


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the self-contained page of a run, or of several runs of one task side by side, and return its path.

    By default it is `report.html` in the run's folder, or `comparison.html` in the nearest folder that contains all
    runs. Links to checkpoints and tables are relative to it.
    """
    paths = [Path(folder) for folder in folders]
    if not 1 <= len(paths) <= MAX_RUNS:
        raise ValueError(f"a page shows 1 to {MAX_RUNS} runs, got {len(paths)}")
    runs = read_runs(paths)
    tasks = {run.task: run for run in runs if run.task}
    if len(tasks) > 1:  # the same key means different things in them
        told = ", ".join(f"{run.folder} is a {task}" for task, run in tasks.items())
        raise ValueError(f"runs of different tasks have no figure in common, got: {told}. Compare runs of one task")
    if output is None:
        above = os.path.commonpath(list(map(os.path.abspath, paths)))
        output = paths[0] / REPORT if len(runs) == 1 else Path(above) / "comparison.html"
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(runs, path.parent), encoding="utf-8")
    return path


def render(runs: Sequence[Run], folder: Path) -> str:
    """Render the page for a file in this folder."""
    import jinja2

    loader = jinja2.PackageLoader("revdeq_lightning.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=number, setting=setting, relative=lambda path: os.path.relpath(path, folder))
    found = [figures(run) for run in runs]
    return environment.get_template("page.html.j2").render(
        title=runs[0].folder.resolve().name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        figures=found,
        names=dict.fromkeys(name for of_run in found for name in of_run),
        settings=main_settings(runs[0]) if len(runs) == 1 else "",
        curves=panels.curves(runs),
        others=panels.other_curves(runs),
        equilibrium=panels.equilibrium_plots(runs),
        differences=differences([run.config for run in runs]),
        surroundings=differences([run.environment for run in runs]),
        version=__version__,
    )


def main_settings(run: Run) -> str:
    """The solver's settings that are set and not zero, in one line."""
    keys = ("solver", "max_steps", "beta", "momentum", "rtol", "atol", "arithmetic", "adjoint")
    given = {key: run.config.get(f"model.solver.{key}") for key in keys}
    return ", ".join(f"{key} {setting(value)}" for key, value in given.items() if value not in (None, 0, 0.0))


def differences(settings: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """Each key with its value in each run, and whether they differ."""
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    values = {key: [of_run.get(key) for of_run in settings] for key in keys}
    return [(key, found, any(value != found[0] for value in found)) for key, found in values.items()]


def setting(value: Any) -> str:
    """Format a setting as in the configuration file."""
    if isinstance(value, list):
        return f"[{', '.join(map(setting, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) or value == "" else str(value)
