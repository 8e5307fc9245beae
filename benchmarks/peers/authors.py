"""Compare with the authors' JAX code: same weights, same batch; gradients, time, and memory.

    python -m benchmarks.peers.authors --repository PATH [--quick] [--output DIR]

PATH is a checkout of github.com/sammccallum/reversible-deq; jax and equinox: `pip install -e '.[peers]'`. Their code is
compiled by XLA, as they run it; ours is not compiled. Each competitor has a separate process, all of them pinned to the
same core with one thread, and one runs at a time.

Gradients are compared in float64 with theirs from checkpointed backpropagation, which reconstructs nothing.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import part
from benchmarks.isolated import MEASURED_MEMORY, Isolated, time_alternating
from benchmarks.measure import paired_ratio
from benchmarks.peers.tasks import Task, classifier, language, make_arrays
from benchmarks.requirements import Requirement, at_most

MAX_LANGUAGE_TIME, MAX_CLASSIFIER_TIME, MAX_GROWTH = 0.70, 0.20, 1.02
MAX_LOSS_ERROR = MAX_GRADIENT_ERROR = 1e-8
"""Limit in float64: the exact state has a resolution of 2^-32, and gradients are compared as one vector."""
PAGE = 4096
LANGUAGE_STEPS = (2, 4, 8, 16)
CLASSIFIER_STEPS = (2, 4)
OURS, RELEASED, BATCHED = "ours", "theirs, released", "theirs, batch inside f"
STORED, CHECKPOINTED = "stored BPTT, PyTorch", "theirs, checkpointed"
COMPETITORS = (OURS, STORED, RELEASED, BATCHED)
VARIANTS = {
    OURS: "reversible",
    STORED: "stored",
    RELEASED: "released",
    BATCHED: "batched",
    CHECKPOINTED: "checkpointed",
}


class Stable:
    """The competitors' processes: `measured` with default settings, `weighed` with those for memory."""

    def __init__(self, repository: Path, stack: ExitStack) -> None:
        self.repository = repository
        builders = {
            n: "benchmarks.peers.authors_code:build" if n.startswith("theirs") else "benchmarks.peers.tasks:build"
            for n in VARIANTS
        }
        self.measured = {n: stack.enter_context(Isolated(builder)) for n, builder in builders.items()}
        self.weighed = {n: stack.enter_context(Isolated(builders[n], environment=MEASURED_MEMORY)) for n in COMPETITORS}

    def build(self, process: Isolated, name: str, task: Task, dtype: str) -> Isolated:
        where = (self.repository,) if name.startswith("theirs") else ()
        process.ask("build", *where, VARIANTS[name], task, make_arrays(task, dtype))
        return process


def measure(repository: Path, tasks: Sequence[Task], num_rounds: int) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {"gradients": [], "times": [], "memory": []}
    with ExitStack() as stack:
        stable = Stable(repository, stack)
        for task in tasks:
            label = {"model": task.model, "steps": task.num_steps}
            print(f"{task.model}, {task.num_steps} steps ...", flush=True)
            tables["gradients"] += [label | row for row in _gradients(task, stable)]
            tables["times"] += [label | row for row in _times(task, stable, num_rounds)]
            for name in COMPETITORS:
                process = stable.build(stable.weighed[name], name, task, "float32")
                tables["memory"].append({**label, "competitor": name, "peak_bytes": process.ask("peak_bytes")})
            print(
                part.markdown_table(lines({key: rows[-len(COMPETITORS) :] for key, rows in tables.items()})), flush=True
            )
    return tables


def _gradients(task: Task, stable: Stable) -> list[dict[str, Any]]:
    results = {
        name: stable.build(process, name, task, "float64").ask("results") for name, process in stable.measured.items()
    }
    loss, gradients = results.pop(CHECKPOINTED)
    rows = []
    for name, (own_loss, own) in results.items():
        assert own.keys() == gradients.keys(), own.keys() ^ gradients.keys()
        error, size = (
            sum(float(np.square(a).sum()) for a in vectors)
            for vectors in ([own[k].reshape(-1) - g.reshape(-1) for k, g in gradients.items()], gradients.values())
        )
        row = {"competitor": name, "loss": own_loss, "loss error": abs(own_loss - loss) / abs(loss)}
        rows.append(row | {"gradient error": (error / size) ** 0.5})
    return rows


def _times(task: Task, stable: Stable, num_rounds: int) -> list[dict[str, Any]]:
    competitors = {name: stable.build(stable.measured[name], name, task, "float32") for name in COMPETITORS}
    timings = time_alternating(competitors, num_rounds)
    rows = []
    for name in COMPETITORS:
        row: dict[str, Any] = {"competitor": name}
        for clock in ("process", "wall"):
            seconds = {n: getattr(timing, f"{clock}_seconds") for n, timing in timings.items()}
            row[f"{clock} seconds"] = round(sorted(seconds[name])[num_rounds // 2], 4)
            for base in (RELEASED, BATCHED):
                ratio = paired_ratio(seconds[name], seconds[base])
                row |= {f"{clock} over {base}, {key}": round(value, 4) for key, value in ratio._asdict().items()}
        rows.append(row)
    return rows


def judge(tables: dict[str, list[dict[str, Any]]], quick: bool) -> list[Requirement]:
    verdict = []
    for model, limit in (("language", MAX_LANGUAGE_TIME), ("classifier", MAX_CLASSIFIER_TIME)):
        ours = {
            key: [row for row in rows if row["model"] == model and row["competitor"] == OURS]
            for key, rows in tables.items()
        }
        if not ours["times"]:
            continue
        errors = [max(row[f"{kind} error"] for row in ours["gradients"]) for kind in ("loss", "gradient")]
        verdict.append(at_most(f"{model}: relative error of the loss", errors[0], MAX_LOSS_ERROR, "{:.1e}"))
        verdict.append(at_most(f"{model}: gradient error", errors[1], MAX_GRADIENT_ERROR, "{:.1e}"))
        for row in ours["times"]:
            what = f"{model}, N = {row['steps']}: time over theirs, as released"
            ratio = row[f"process over {RELEASED}, median"]
            verdict.append(at_most(what, ratio, limit, "{:.3f}", not quick))
        theirs = {
            row["steps"]: row["peak_bytes"]
            for row in tables["memory"]
            if row["model"] == model and row["competitor"] == BATCHED
        }
        # Tiny models may not need any new memory page.
        over = max(row["peak_bytes"] / max(theirs[row["steps"]], PAGE) for row in ours["memory"])
        verdict.append(at_most(f"{model}: peak memory over theirs, batch inside f", over, 1.0, "{:.2f}", not quick))
        growth = max(row["peak_bytes"] for row in ours["memory"]) / max(ours["memory"][0]["peak_bytes"], PAGE)
        verdict.append(at_most(f"{model}: growth of the peak with N", growth, MAX_GROWTH, "{:.3f}", not quick))
    return verdict


def lines(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    joined = []
    for error, memory in zip(tables["gradients"], tables["memory"], strict=True):
        key = (error["model"], error["steps"], error["competitor"])
        time = next(r for r in tables["times"] if (r["model"], r["steps"], r["competitor"]) == key)
        joined.append(
            {
                "model": error["model"],
                "N": error["steps"],
                "": error["competitor"],
                "CPU seconds per step": time["process seconds"],
                "over theirs, released": f"{time[f'process over {RELEASED}, median']:.3f}",
                "over theirs, batch inside f": f"{time[f'process over {BATCHED}, median']:.3f}",
                "peak MiB above base": f"{memory['peak_bytes'] / 2**20:.0f}",
                "loss error": f"{error['loss error']:.0e}",
                "gradient error": f"{error['gradient error']:.0e}",
            }
        )
    return joined


def page(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [
        "Language model: the released one, vocabulary 512, context 128, d 256, 8 heads, batch 8, beta 0.5. Classifier:"
        " the released multi-scale one, channels 32-64-64-32, widths 1-3-3-1, batch 16, beta 0.8, N steps per stage."
        " Forward and backward pass in float32; errors in float64, compared with their checkpointed backpropagation.",
        part.markdown_table(lines(tables)),
    ]


def run(options: argparse.Namespace) -> part.Result:
    tasks = [language(n) for n in LANGUAGE_STEPS] + [classifier(n) for n in CLASSIFIER_STEPS]
    if options.quick:
        small = {"vocab_size": 16, "context": 8, "dim": 32, "num_heads": 2, "batch": 2}
        tasks = [language(n)._replace(**small) for n in (1, 2)]
        tasks.append(classifier(1)._replace(channels=(16, 16), widths=(1, 2), image_size=8, batch=2))
    missing = [name for name in ("jax", "equinox") if importlib.util.find_spec(name) is None]
    if missing:
        raise part.Skipped(f"{' and '.join(missing)} not installed: pip install -e '.[peers]'")
    if options.repository is None:
        raise part.Skipped("no --repository given: a checkout of github.com/sammccallum/reversible-deq is required")
    if not (options.repository / "reversible_deq").is_dir():
        raise part.Misused(f"no folder reversible_deq in --repository {options.repository}")
    tasks = [task for task in tasks if options.only in (None, task.model)]
    tables = measure(options.repository.resolve(), tasks, 1 if options.quick else options.rounds)
    return part.Result(tables, judge(tables, options.quick), page(tables), packages=("jax", "equinox"))


main = part.command(
    "peers.authors",
    "Against the authors' JAX code",
    __doc__,
    run,
    options={
        "--repository": {"type": Path, "help": "checkout of the authors' repository"},
        "--rounds": {"type": int, "default": 7},
        "--only": {"choices": ("language", "classifier"), "help": "one of the two models"},
    },
    needs=lambda options: "--repository PATH",
)

if __name__ == "__main__":
    sys.exit(main())
