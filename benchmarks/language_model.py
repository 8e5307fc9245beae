"""Tiny Shakespeare, characters, 2000 iterations: what solvers and evaluations are worth beside an explicit stack.

    python -m benchmarks.language_model --data tinyshakespeare.txt [--only NAME ...] [--seeds 0 1 2] [--jobs 2]

Each run is `python -m revdeq_lightning fit --config configs/lm/tinyshakespeare.yaml` with the overrides below, one
thread each. A run that is already in the output is not made again, so that the table can be filled in parts.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any, NamedTuple

import torch

from benchmarks.measure import provenance

CONFIG = "configs/lm/tinyshakespeare.yaml"
FIELDS = [
    "variant",
    "seed",
    "evaluations",
    "parameters",
    "val_loss",
    "minutes",
    "date",
    "commit",
    "uncommitted_changes",
    "cpu",
    "torch",
    "command",
]


class Variant(NamedTuple):
    """One row of the table."""

    evaluations: int
    overrides: list[str]
    limit: float | None = None
    """Required mean validation loss over 3 seeds, nats per character."""


def momentum(evaluations: int, limit: float | None = None) -> Variant:
    """The config's own momentum solver with this many evaluations."""
    return Variant(evaluations, [f"--model.solver.max_steps={evaluations}"], limit)


def paper(beta: float, num_steps: int) -> Variant:
    """The paper's solver, 2 evaluations a step."""
    solver = ["--model.solver.solver=reversible", "--model.solver.momentum=null", f"--model.solver.beta={beta}"]
    return Variant(2 * num_steps, [*solver, f"--model.solver.max_steps={num_steps}"])


EXPLICIT = [
    "--model.solver.solver=none",
    "--model.solver.momentum=null",
    "--model.solver.beta=null",
    "--model.network.num_layers=4",
]
VARIANTS = {
    "momentum-4": momentum(4, limit=1.59),
    "momentum-8": momentum(8, limit=1.57),
    "paper-0.5-8": paper(0.5, 4),
    "paper-0.8-8": paper(0.8, 4),
    "momentum-1": momentum(1),
    "momentum-2": momentum(2),
    "momentum-16": momentum(16),
    "explicit-4-layers": Variant(1, EXPLICIT),
    "explicit-4-layers-half-rates": Variant(
        1, [*EXPLICIT, "--model.optimizer.lr=0.005", "--model.optimizer.muon_lr=0.01"]
    ),
    "explicit-4-layers-muon-0.01": Variant(1, [*EXPLICIT, "--model.optimizer.muon_lr=0.01"]),
}


def run_command(variant: Variant, seed: int, arguments: argparse.Namespace) -> list[str]:
    """The training run of one row."""
    run = [f"--run.folder={arguments.runs}", "--run.test=false", "--run.sample_tokens=0"]
    options = [f"--data.path={arguments.data}", f"--seed_everything={seed}", *variant.overrides, *run]
    return [sys.executable, "-m", "revdeq_lightning", "fit", "--config", CONFIG, *options]


def train(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make one run and read its last validation loss, of the whole last tenth of the text."""
    variant = VARIANTS[name]
    folder = arguments.runs / f"{name}-{seed}"
    command = [*run_command(variant, seed, arguments), f"--run.name={folder.name}", "--run.version=run"]
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    folder.mkdir(parents=True)
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    minutes = (time.monotonic() - start) / 60
    with (folder / "run" / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    told = ["python", *(word for word in command[1:] if not word.startswith("--run."))]
    facts = provenance(" ".join(told).replace(str(arguments.data), arguments.data.name))
    return {
        "variant": name,
        "seed": seed,
        "evaluations": variant.evaluations,
        "parameters": num_parameters(folder / "run" / "checkpoints" / "last.ckpt"),
        "val_loss": f"{losses[-1]:.4f}",
        "minutes": f"{minutes:.1f}",
        "cpu": facts["hardware"]["cpu"],
        "torch": facts["versions"]["torch"],
        **{key: facts[key] for key in ("date", "commit", "uncommitted_changes", "command")},
    }


def num_parameters(checkpoint: Path) -> int:
    """Parameters of the model in a checkpoint."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    return sum(tensor.numel() for name, tensor in state.items() if name.startswith("model."))


def read(path: Path) -> list[dict[str, str]]:
    """Rows of an earlier run."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> tuple[str, bool]:
    """The means over seeds beside what is required, as Markdown, and whether all of it is met."""
    lines = [
        "| variant | parameters | evaluations | seeds | val loss, nats per character | required | minutes a run |",
        "|---|---|---|---|---|---|---|",
    ]
    is_met = True
    for name, variant in VARIANTS.items():
        own = [row for row in rows if row["variant"] == name]
        if not own:
            continue
        losses = [float(row["val_loss"]) for row in own]
        required = "" if variant.limit is None else f"<= {variant.limit}"
        is_met &= variant.limit is None or mean(losses) <= variant.limit
        spread = f" ({min(losses):.4f} - {max(losses):.4f})" if len(losses) > 1 else ""
        minutes = mean(float(row["minutes"]) for row in own)
        lines.append(
            f"| {name} | {int(own[0]['parameters']):,} | {variant.evaluations} | {len(own)} |"
            f" {mean(losses):.4f}{spread}"
            f" | {required} | {minutes:.1f} |"
        )
    return "\n".join(lines), is_met


def main() -> None:
    """Make the runs that are missing, then print the table; exit with 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-lm"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/language_model.csv"))
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"no file {arguments.data}")
    rows = read(arguments.output)
    done = {(row["variant"], int(row["seed"])) for row in rows}
    wanted = [(name, seed) for name in arguments.only for seed in arguments.seeds if (name, seed) not in done]
    lock = Lock()

    def make(job: tuple[str, int]) -> None:
        row = train(*job, arguments)
        with lock:
            rows.append(row)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda r: (list(VARIANTS).index(r["variant"]), int(r["seed"]))))
            print(f"{row['variant']} seed {row['seed']}: {row['val_loss']} in {row['minutes']} minutes", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(make, wanted))
    markdown, is_met = table(read(arguments.output))
    arguments.output.with_suffix(".md").write_text(f"# Tiny Shakespeare\n\n{markdown}\n")
    print(markdown)
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
