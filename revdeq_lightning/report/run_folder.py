"""What a run left in its folder, read back: every file may be missing."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from revdeq_lightning.runs.folder import CONFIG, ENVIRONMENT, METRICS

Table = list[dict[str, float]]


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
    """A run's folder.

    Attributes:
        folder: The folder.
        label: Short name, different for each run of a page.
        series: Of each key with at least one value.
        config: Settings, as `model.solver.max_steps`.
        environment: What it ran on, flat as the settings.
        sweeps: Rows of the depth sweep after training, and of those in training.
        residual_curve: Rows of the residual along the iteration.
        samples: Generated texts, oldest first.
        notes: What a reader of the page must know about the files.
    """

    folder: Path
    label: str
    series: dict[str, Series]
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    sweep: Table = field(default_factory=list)
    validation_sweep: Table = field(default_factory=list)
    residual_curve: Table = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> str | None:
        """What was trained, as far as the keys say."""
        names = {key.rsplit("/", 1)[-1] for key in self.series}
        if names & {"token_perplexity", "bits_per_byte", "tokens_per_second"}:
            return "language model"
        return "classifier" if names & {"accuracy", "images_per_second"} else None

    @property
    def item(self) -> str:
        """What the loss is a mean over."""
        return {"language model": "token", "classifier": "image"}.get(str(self.task), "sample")

    def last(self, key: str) -> float | None:
        """The newest finite value of a key, if there is one."""
        return self.series[key].last if key in self.series else None

    @property
    def images(self) -> list[Path]:
        """Pictures that are not drawn again from their table: the newest sheet of samples first."""
        drawn = {"depth_sweep.png", "residual_curve.png"}
        sheets = sorted(self.folder.glob("samples/*.png"))[-1:]
        return sheets + [path for path in sorted(self.folder.glob("*.png")) if path.name not in drawn]

    @property
    def files(self) -> list[Path]:
        """What lies in the folder, checkpoints first; no pages, nothing hidden."""
        found = [*sorted(self.folder.glob("checkpoints/*")), *sorted(self.folder.iterdir())]
        return [p for p in found if p.name != "checkpoints" and p.suffix != ".html" and not p.name.startswith(".")]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, labelled by what differs in their paths.

    Raises:
        FileNotFoundError: If a folder holds no run.
        ValueError: If a file cannot be read as what it should be, or a folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    if twice := next((given for given, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None):
        raise ValueError(f"the run {twice} is given twice")
    above = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent.parent
    return [read_run(folder, str(path.relative_to(above))) for folder, path in zip(folders, paths, strict=True)]


def read_run(folder: Path, label: str) -> Run:
    """The run in a folder."""
    if not (folder / METRICS).is_file():
        below = sorted(folder.glob(f"**/{METRICS}"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
        hint = f" (the newest run below it: {below[-1].parent})" if below else ""
        raise FileNotFoundError(f"no run in {folder}: it holds no {METRICS}{hint}")
    notes: list[str] = []
    run = Run(folder, label, read_metrics(folder / METRICS, notes), notes=notes)
    run.config = flat(_load(folder / CONFIG, yaml.safe_load))
    environment = _load(folder / ENVIRONMENT, json.loads) or {}
    starts = [earlier.get("started") for earlier in environment.pop("earlier_starts", [])]
    run.environment = flat(environment | ({"earlier_starts": starts} if starts else {}))
    run.sweep, run.validation_sweep, run.residual_curve = (
        read_table(folder / f"{name}.csv") for name in ("depth_sweep", "depth_sweep_validation", "residual_curve")
    )
    run.samples = _load(folder / "samples.jsonl", lambda text: [json.loads(line) for line in text.splitlines()]) or []
    return run


def read_metrics(path: Path, notes: list[str]) -> dict[str, Series]:
    """Series of each key that was logged; steps counted from 1."""
    points: dict[str, list[tuple[int, float]]] = {}
    left_out: Counter[str] = Counter()
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.pop("step", None)
            if not step:  # the end of a file whose process was killed while it wrote
                left_out["rows without a step"] += 1
                continue
            for key, text in row.items():
                if not key or not text:
                    continue
                try:
                    point = int(step) + 1, float(text)
                except ValueError:
                    left_out[f"texts as values of {key}"] += 1
                else:
                    points.setdefault(key, []).append(point)
    notes += [f"{path.name}: {what}, left out: {count:,}" for what, count in left_out.items()]
    series = {key: Series(*map(np.array, zip(*rows, strict=True))) for key, rows in points.items()}
    for key, curve in series.items():
        if missing := len(curve.values) - len(curve.finite):
            first = curve.steps[~np.isfinite(curve.values)][0]
            notes.append(
                f"{key}: {missing:,} of {len(curve.values):,} values are not finite, the first at step {first:,}"
            )
    return {key: series[key] for key in sorted(series)}


def read_table(path: Path) -> Table:
    """Rows of numbers; NaN where a field is empty. No rows without the file.

    Raises:
        ValueError: If a field is not a number.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [{key: float(text or math.nan) for key, text in row.items()} for row in csv.DictReader(file)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a table of numbers: {error}") from None


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the names."""
    if not isinstance(settings, dict):
        return {prefix: settings} if prefix else {}
    items: dict[str, Any] = {}
    for key, value in settings.items():
        items |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return items


def _load(path: Path, parse: Any) -> Any:
    """Parsed text of a file, None without the file."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
