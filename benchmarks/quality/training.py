"""Tables of training runs. Each run is a command line; its last validation is written to a CSV file."""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any, NamedTuple

import torch

from benchmarks.measure import provenance
from benchmarks.report import spread, table as markdown

FACTS = ("minutes", "date", "commit", "uncommitted_changes", "cpu", "torch", "command")


class Variant(NamedTuple):
    """One row of a table."""

    evaluations: int
    """Evaluations of f in a forward pass, 1 without a solver."""
    options: list[str]
    limit: float | None = None
    """Limit that the mean over the seeds must reach."""


class Table(NamedTuple):
    """A table of variants.

    Attributes:
        title: Heading.
        command: Words of the command, such as `["fit", "--config", FILE]`.
        variants: Rows by name.
        metric: Key of the validation metric.
        unit: Description of the metric.
        smaller_is_better: Whether a limit is an upper limit.
        threads: Threads per run.
    """

    title: str
    command: list[str]
    variants: dict[str, Variant]
    metric: str
    unit: str
    smaller_is_better: bool
    threads: int = 1

    @property
    def column(self) -> str:
        return self.metric.replace("/", "_")

    @property
    def fields(self) -> list[str]:
        return ["variant", "seed", "evaluations", "parameters", self.column, *FACTS]

    def is_met(self, variant: Variant, value: float) -> bool:
        if variant.limit is None:
            return True
        return value <= variant.limit if self.smaller_is_better else value >= variant.limit


def train(table: Table, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make one run and read its last validation."""
    variant = table.variants[name]
    folder = arguments.runs / f"{name}-{seed}"
    shown = [*table.command, f"--data.path={arguments.data}", f"--seed_everything={seed}", *variant.options]
    hidden = [f"--run.folder={arguments.runs}", "--run.test=false", f"--run.name={folder.name}", "--run.version=run"]
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    folder.mkdir(parents=True)
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "revdeq_lightning", *shown, *hidden]
        environment = {**os.environ, "OMP_NUM_THREADS": str(table.threads)}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    minutes = (time.monotonic() - start) / 60
    with (folder / "run" / "metrics.csv").open() as file:
        values = [float(row[table.metric]) for row in csv.DictReader(file) if row.get(table.metric)]
    told = " ".join(["python -m revdeq_lightning", *shown]).replace(str(arguments.data), arguments.data.name)
    return {
        "variant": name,
        "seed": seed,
        "evaluations": variant.evaluations,
        "parameters": num_parameters(folder / "run" / "checkpoints" / "last.ckpt"),
        table.column: f"{values[-1]:.4f}",
        "minutes": f"{minutes:.1f}",
        **facts_of(told),
    }


def facts_of(command: str) -> dict[str, Any]:
    """Provenance of a row: `FACTS` without the minutes."""
    facts = provenance(command)
    return {
        "cpu": facts["hardware"]["cpu"],
        "torch": facts["versions"]["torch"],
        **{key: facts[key] for key in ("date", "commit", "uncommitted_changes", "command")},
    }


def origins(rows: Sequence[Mapping[str, str]]) -> str:
    """Where the rows of runs on one thread come from, in words."""
    cpu, version, commit = (", ".join(sorted({row[name] for row in rows})) for name in ("cpu", "torch", "commit"))
    return f"{cpu}, one thread, torch {version}, commit {commit}"


def num_parameters(checkpoint: Path) -> int:
    """Parameters of the model in a checkpoint of a run with averaged weights."""
    trained = torch.load(checkpoint, weights_only=True, map_location="cpu")["trained_weights"]
    buffers = ("running_mean", "running_var")
    return sum(t.numel() for name, t in trained.items() if name.startswith("model.") and not name.endswith(buffers))


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def summary(table: Table, rows: Sequence[dict[str, str]]) -> tuple[str, bool]:
    """Means over the seeds and their limits as Markdown, and whether all limits are met."""
    sign = "<=" if table.smaller_is_better else ">="
    header = ("variant", "parameters", "evaluations", "seeds", table.unit, "required", "minutes per run")
    lines, is_met = [], True
    for name, variant in table.variants.items():
        own = [row for row in rows if row["variant"] == name]
        if not own:
            continue
        values = [float(row[table.column]) for row in own]
        required = "" if variant.limit is None else f"{sign} {variant.limit}"
        is_met &= table.is_met(variant, mean(values))
        minutes = f"{mean(float(row['minutes']) for row in own):.1f}"
        facts = (name, f"{int(own[0]['parameters']):,}", str(variant.evaluations), str(len(own)))
        lines.append((*facts, spread(values, 4), required, minutes))
    return markdown(header, lines), is_met


def fill(table: Table, arguments: argparse.Namespace) -> bool:
    """Make the missing runs, write and print the table, and return whether every requirement is met."""
    rows = read(arguments.output)
    done = {(row["variant"], int(row["seed"])) for row in rows}
    wanted = [(name, seed) for name in arguments.only for seed in arguments.seeds if (name, seed) not in done]
    lock = Lock()

    def make(job: tuple[str, int]) -> None:
        row = train(table, *job, arguments)
        with lock:
            rows.append(row)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, table.fields, lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda r: (list(table.variants).index(r["variant"]), int(r["seed"]))))
            print(f"{row['variant']} seed {row['seed']}: {row[table.column]} in {row['minutes']} minutes", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(make, wanted))
    page, is_met = summary(table, read(arguments.output))
    arguments.output.with_suffix(".md").write_text(f"# {table.title}\n\n{page}\n")
    print(page)
    return is_met


def run(table: Table, description: str, name: str, *, seeds: list[int], jobs: int, data: str) -> int:
    """Parse the options of a benchmark, fill its table, and return the exit code (1 if a requirement is missed).

    Args:
        table: What to train.
        description: Text of `--help`.
        name: Name of the result files and of the folder of runs.
        seeds: Default seeds.
        jobs: Default number of parallel runs.
        data: Description of `--data` for `--help`.
    """
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--data", type=Path, required=True, help=data)
    options.add_argument("--only", nargs="+", choices=list(table.variants), default=list(table.variants))
    options.add_argument("--seeds", nargs="+", type=int, default=seeds)
    options.add_argument("--jobs", type=int, default=jobs, help=f"parallel runs, {table.threads} thread(s) each")
    options.add_argument("--runs", type=Path, default=Path("runs") / f"bench-{name}", help="folder for the runs")
    options.add_argument("--output", type=Path, default=Path(f"benchmarks/results/{name}.csv"))
    arguments = options.parse_args()
    if not arguments.data.exists():
        options.error(f"--data {arguments.data}: no such file or folder")
    return 0 if fill(table, arguments) else 1
