"""Reads a run's folder, in which every file but `metrics.csv` may be missing."""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from revdeq_lightning.loggers.plots import Table, by_step
from revdeq_lightning.loggers.step_rows import read_rows, read_table
from revdeq_lightning.runs.folder import CONFIG, ENVIRONMENT, METRICS

NOT_CERTIFIED = "gradients not certified"
"""Derived key: the number of gradients minus those certified exact."""


@dataclass
class Series:
    """The values of one key over optimizer steps, in the order of logging; NaN and infinities are kept."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """The finite values."""
        found: np.ndarray = self.values[np.isfinite(self.values)]
        return found

    @property
    def last(self) -> float | None:
        """The newest finite value."""
        return float(self.finite[-1]) if self.finite.size else None


@dataclass
class Run:
    """A run's folder; its label is unique on a page.

    `series` has the values of each key with at least one value, `notes` remarks on the files for the page's reader. The
    settings in `config` and `environment` have flat names, such as `model.solver.max_steps`. `sweep` is the depth sweep
    after training, `validation_sweep` those in training; samples are generated texts, oldest first.
    """

    folder: Path
    label: str
    series: dict[str, Series]
    notes: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    sweep: Table
    validation_sweep: Table
    residual_curve: Table
    samples: list[dict[str, Any]]

    def __getitem__(self, key: str) -> Series:
        nothing = Series(np.array([]), np.array([]))
        if key == NOT_CERTIFIED:
            every, certified = (self[f"equilibrium/num_{name}"] for name in ("gradients", "certified_gradients"))
            together = len(every.steps) == len(certified.steps)
            return Series(every.steps, every.values - certified.values) if together else nothing
        return self.series.get(key, nothing)

    @property
    def task(self) -> str | None:
        """The task, inferred from the keys."""
        names = {key.rsplit("/", 1)[-1] for key in self.series}
        if names & {"token_perplexity", "bits_per_byte", "tokens_per_second"}:
            return "language model"
        if names & {"solved", "puzzles_per_second"}:
            return "reasoner"
        return "classifier" if names & {"accuracy", "images_per_second"} else None

    @property
    def item(self) -> str:
        """What the loss is a mean over."""
        return {"language model": "token", "classifier": "image", "reasoner": "cell"}.get(str(self.task), "sample")

    @property
    def unit(self) -> str:
        """What is counted a second."""
        return "puzzle" if self.task == "reasoner" else self.item

    @property
    def newest_sweep(self) -> Table:
        """The sweep after training, else the newest in training."""
        return self.sweep or (by_step(self.validation_sweep)[-1][1] if self.validation_sweep else [])

    @property
    def trained_nfe(self) -> float | None:
        """Evaluations of f in a forward pass of training, if the same in all steps."""
        values = set(self["equilibrium/forward_nfe"].finite.tolist())
        return values.pop() if len(values) == 1 else None

    @property
    def images(self) -> list[tuple[str, str]]:
        """Names and contents of the pictures that the page does not draw itself, the newest samples first."""
        drawn = {"depth_sweep.png", "residual_curve.png"}
        paths = [path for path in pictures_in(self.folder) if path.name not in drawn]
        paths[:0] = sorted(self.folder.glob("samples/*.png"))[-1:]
        contents = [(p, base64.b64encode(p.read_bytes()).decode()) for p in paths]
        return [(p.stem, f"data:image/{p.suffix[1:]};base64,{content}") for p, content in contents]

    @property
    def files(self) -> list[Path]:
        """The files in the folder, checkpoints first, without pages and hidden files."""
        found = [*sorted(self.folder.glob("checkpoints/*")), *sorted(self.folder.iterdir())]
        return [p for p in found if p.name != "checkpoints" and p.suffix != ".html" and not p.name.startswith(".")]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders, labeled by the parts of their paths that differ."""
    paths = [folder.resolve() for folder in folders]
    if twice := next((given for given, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None):
        raise ValueError(f"the run {twice} is given twice")
    above = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent.parent
    return [read_run(folder, str(path.relative_to(above))) for folder, path in zip(folders, paths, strict=True)]


def read_run(folder: Path, label: str) -> Run:
    """Read the run in a folder."""
    if not (folder / METRICS).is_file():
        below = sorted(folder.glob(f"**/{METRICS}"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
        hint = f" (the newest run below it: {below[-1].parent})" if below else ""
        raise FileNotFoundError(f"no run in {folder}: it holds no {METRICS}{hint}")
    notes: list[str] = []
    environment = _load(folder / ENVIRONMENT, json.loads) or {}
    starts = [earlier.get("started") for earlier in environment.pop("earlier_starts", [])]
    return Run(
        folder,
        label,
        read_metrics(folder / METRICS, notes),
        notes,
        flat(_load(folder / CONFIG, yaml.safe_load)),
        flat(environment | ({"earlier_starts": starts} if starts else {})),
        read_table(folder / "depth_sweep.csv"),
        read_table(folder / "depth_sweep_validation.csv"),
        read_table(folder / "residual_curve.csv"),
        _load(folder / "samples.jsonl", lambda text: [json.loads(line) for line in text.splitlines()]) or [],
    )


def read_metrics(path: Path, notes: list[str]) -> dict[str, Series]:
    """Read the series of each key, with steps counted from 1; add to the notes where values are not finite."""
    points: dict[str, list[tuple[int, float]]] = {}
    try:
        for row in read_rows(path):
            step = int(row.pop("step")) + 1
            for key, text in row.items():
                if text:
                    points.setdefault(key, []).append((step, float(text)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of numbers by their step: {error!r}") from None
    series = {key: Series(*map(np.array, zip(*rows, strict=True))) for key, rows in sorted(points.items())}
    for key, curve in series.items():
        if missing := len(curve.values) - len(curve.finite):
            first = curve.steps[~np.isfinite(curve.values)][0]
            of = f"{missing:,} of {len(curve.values):,} values"
            notes.append(f"{key}: {of} are not finite, the first at step {first:,}")
    return series


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with dots in the names."""
    if not isinstance(settings, dict):
        return {prefix: settings} if prefix else {}
    items: dict[str, Any] = {}
    for key, value in settings.items():
        items |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return items


def _load(path: Path, parse: Any) -> Any:
    """Parse a file; None without the file."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def pictures_in(folder: Path) -> list[Path]:
    """Pictures and animations in a run's folder, sorted by name."""
    return sorted(path for path in folder.glob("*.*") if path.suffix in (".png", ".gif"))
