"""Which gradient at which depth: reversible, stored, or checkpointed backpropagation through the same iteration.

    python -m benchmarks.core.depth [--quick] [--output DIR]

RevDEQ at beta 0.8 around an attention block, 4 to 128 evaluations of f; momentum 1/8 around the convolutions of
`reasoning/mazes.yaml`, batch 32, 32 evaluations. All of them give the same gradient and differ in time and memory.
"Segments" stores the state after every sqrt(N) steps and one segment's activations. The reversible gradient is a line:
with a share of its evaluations stored.
Times: CPU time of one thread, all competitors in each round; ratios are taken within the round. Memory: bytes held by
tensors (`measure.peak_tensor_bytes`).
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import part
from benchmarks.core.problems import (
    Member,
    Problem,
    attention_problem,
    bptt_step,
    momentum,
    problem_of,
    revdeq,
    reversible_step,
)
from benchmarks.core.reference import bare_evaluations, reversible_step_pair
from benchmarks.measure import paired_ratio, peak_tensor_bytes, time_interleaved
from benchmarks.requirements import Requirement, Rows, at_most
from revdeq_lightning.models.config import ReasonerConfig
from revdeq_lightning.models.reasoner import ConvolutionBlock

BETA = 0.8
EVALUATIONS = (4, 8, 16, 32, 64, 128)
STORED, EVERY, SEGMENTS, REVERSIBLE = "stored", "checkpoint each evaluation", "checkpoint segments", "reversible"
SHARES = {REVERSIBLE: 0.0} | {f"{REVERSIBLE}, {share:.0%} stored": share for share in (0.25, 0.5, 0.75, 1.0)}
METHODS = (STORED, EVERY, SEGMENTS, *SHARES)
BARE = "bare evaluations"
MAX_TIME, MAX_TIME_ALL_STORED, MAX_TIME_MAZE = 1.33, 1.03, 1.20
"""Reversible over stored: 4 evaluations of f in time compared with 3, the same evaluations, and the aim for mazes."""


def competitors(problem: Problem, member: Member, num_steps: int) -> dict[str, Callable[[], Any]]:
    count = num_steps * member.evaluations_per_step
    return {
        STORED: bptt_step(problem, member, num_steps),
        EVERY: bptt_step(problem, member, num_steps, checkpoint=True),
        **{
            name: reversible_step(problem, member, num_steps, "exact", stored_evaluations=round(share * count))
            for name, share in SHARES.items()
        },
    }


def with_segments(problem: Problem, num_steps: int) -> dict[str, Callable[[], Any]]:
    return competitors(problem, revdeq(BETA), num_steps) | {
        SEGMENTS: lambda: torch.autograd.grad(segmented_value(problem, num_steps), problem.sources, problem.weight)
    }


def segmented_value(problem: Problem, num_steps: int) -> Tensor:
    """The iteration with a checkpoint every sqrt(N) steps."""
    length = ceil(sqrt(num_steps))

    def segment(y: Tensor, z: Tensor, x: Tensor, num: int) -> tuple[Tensor, Tensor]:
        for _ in range(num):
            y, z = reversible_step_pair(problem.f, y, z, x, beta=BETA, dtype=y.dtype)
        return y, z

    y = z = problem.z0
    for start in range(0, num_steps, length):
        y, z = checkpoint(segment, y, z, problem.x, min(length, num_steps - start), use_reentrant=False)
    return z


def measure(quick: bool) -> list[dict[str, Any]]:
    tokens, dim, rounds = (32, 32, 1) if quick else (512, 192, 5)
    problem = attention_problem(1, tokens, dim, dim // 32)
    rows = []
    for evaluations in EVALUATIONS[: 2 if quick else None]:
        rounds = min(rounds, 3) if evaluations > 32 else rounds
        rows += rows_of(with_segments(problem, evaluations // 2), evaluations, rounds)
    return rows


def measure_mazes(quick: bool) -> list[dict[str, Any]]:
    """The same methods, without segments, for the convolutions that solve mazes, and the necessary evaluations."""
    batch, channels, evaluations, rounds = (2, 8, 4, 1) if quick else (32, 48, 32, 7)
    torch.manual_seed(0)
    f = ConvolutionBlock(
        ReasonerConfig(num_symbols=4, num_answers=2, shape=[11, 11], channels=channels, padding="circular")
    )
    problem = problem_of(f, (batch, channels, 11, 11), torch.float32)
    arguments = problem.f, torch.randn_like(problem.z0), problem.x, list(f.parameters())
    bare = {BARE: lambda: bare_evaluations(*arguments, evaluations)}
    return rows_of(bare | competitors(problem, momentum(1 / 8), evaluations), evaluations, rounds)


def rows_of(runs: Mapping[str, Callable[[], Any]], evaluations: int, rounds: int) -> list[dict[str, Any]]:
    """Time and memory of each method, all of them in every round."""
    timings = time_interleaved(runs, rounds)
    seconds = {name: timing.process_seconds for name, timing in timings.items()}
    rows = []
    for name, run in runs.items():
        ratio = paired_ratio(seconds[name], seconds[STORED])
        row = {"evaluations": evaluations, "method": name, "seconds": sorted(seconds[name])[rounds // 2]}
        row |= {f"time over stored, {quartile}": value for quartile, value in ratio._asdict().items()}
        rows.append(row | {"peak_bytes": peak_tensor_bytes(run)})
    return rows


def best(rows: Rows) -> list[dict[str, Any]]:
    """Methods of one depth, fastest first, that need less memory than every faster one."""
    chosen: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row["time over stored, median"]):
        if not chosen or row["peak_bytes"] < chosen[-1]["peak_bytes"]:
            chosen.append(row)
    return chosen


def advice(rows: Rows) -> str:
    words = []
    for row in best(rows):
        needs = f"{row['method']} ({row['peak_bytes'] / 2**20:.1f} MiB, {row['time over stored, median']:.2f}x)"
        words.append(needs)
    return ", else ".join(words)


def page(rows: Rows, mazes: Rows) -> list[str]:
    lines = []
    for evaluations, group in by_depth(rows).items():
        line: dict[str, Any] = {"evaluations": evaluations}
        for row in group:
            line[row["method"]] = f"{row['time over stored, median']:.2f}x, {row['peak_bytes'] / 2**20:.1f} MiB"
        lines.append(line | {"choose the first that fits": advice(group)})
    return [
        "Time over stored backpropagation (median of paired CPU times) and peak of the tensors of one training step."
        " From left to right, choose the first one that fits into memory:",
        part.markdown_table(lines),
        summary(rows),
        f"The convolutions of the mazes, {mazes[0]['evaluations']} evaluations. The least possible time of a"
        " reversible method is that of the bare evaluations: each once plain, and once with its derivatives:",
        part.markdown_table(
            [
                {
                    "method": row["method"],
                    "time over stored": f"{row['time over stored, median']:.2f}x",
                    "peak of the tensors, MiB": f"{row['peak_bytes'] / 2**20:.1f}",
                }
                for row in mazes
            ]
        ),
    ]


def summary(rows: Rows) -> str:
    """The depth beyond which checkpointing is never the right choice."""
    depths = by_depth(rows)
    useful = [n for n, group in depths.items() if any(row["method"] in (EVERY, SEGMENTS) for row in best(group))]
    deeper = [n for n in depths if n > max(useful, default=0)]
    if not deeper:
        return "At every depth measured, a checkpointed gradient is the right choice for some amount of memory."
    return (
        f"From {deeper[0]} evaluations on, the reversible gradient needs less memory than both checkpointed ones and is"
        " at least as fast: stored where it fits, reversible elsewhere."
    )


def by_depth(rows: Rows) -> Mapping[int, list[dict[str, Any]]]:
    return {n: [row for row in rows if row["evaluations"] == n] for n in dict.fromkeys(r["evaluations"] for r in rows)}


def judge(rows: Rows, mazes: Rows, quick: bool) -> list[Requirement]:
    """Less memory than stored backpropagation at depth; time as the number of evaluations implies."""
    deep = [row for row in rows if row["evaluations"] >= 16 and row["method"] == REVERSIBLE]
    if not deep:
        return []
    stored = {row["evaluations"]: row["peak_bytes"] for row in rows if row["method"] == STORED}
    memory = max(row["peak_bytes"] / stored[row["evaluations"]] for row in deep)
    time = max(row["time over stored, median"] for row in deep)
    all_stored = [row["time over stored, median"] for row in rows if SHARES.get(row["method"]) == 1]
    between = [
        row["time over stored, median"] / min(fitting)
        for row in rows
        if 0 < SHARES.get(row["method"], 0) < 1 and (fitting := checkpointed_times(rows, row))
    ]
    (maze,) = (row["time over stored, median"] for row in mazes if row["method"] == REVERSIBLE)
    return [
        at_most("reversible over stored from 16 evaluations on: time", time, MAX_TIME, "{:.3f}", not quick),
        at_most("reversible over stored from 16 evaluations on: memory", memory, 1.0, "{:.3f}", not quick),
        at_most("all evaluations stored, over stored: time", max(all_stored), MAX_TIME_ALL_STORED, "{:.3f}", not quick),
        at_most("maze block, reversible over stored: time", maze, MAX_TIME_MAZE, "{:.3f}", not quick),
        at_most("25 to 75 % stored, over checkpoints in that memory: time", max(between), 1.0, "{:.3f}", not quick),
    ]


def checkpointed_times(rows: Rows, row: dict[str, Any]) -> list[float]:
    """Times of the checkpointed gradients of this depth that need no more memory than this row."""
    depth = [r for r in by_depth(rows)[row["evaluations"]] if r["method"] in (EVERY, SEGMENTS)]
    return [r["time over stored, median"] for r in depth if r["peak_bytes"] <= row["peak_bytes"]]


def draw(path: Path, rows: Rows) -> None:
    depths = by_depth(rows)
    with part.figure(path, 2, 3, (14, 7), sharey=True) as axes:
        for axis, (evaluations, group) in zip(axes.flat, depths.items(), strict=False):
            points = {r["method"]: (r["peak_bytes"] / 2**20, r["time over stored, median"]) for r in group}
            dial = [points[name] for name in SHARES]
            axis.plot(*zip(*dial, strict=True), "o-", color="tab:blue", label="reversible, 0 to 100 % stored")
            for name, color, mark in zip(METHODS[:3], ("gray", "orange", "green"), "s^v", strict=True):
                axis.plot(*points[name], mark, color=f"tab:{color}", markersize=8, label=name)
            axis.set_title(f"{evaluations} evaluations", fontsize=11)
            axis.set_xlim(0, None)
        axes[0, 0].figure.supxlabel("peak of the tensors of one training step (MiB)")
        axes[0, 0].figure.supylabel("CPU time over stored back-propagation (dimensionless)")
        axes[0, 0].legend(frameon=False, fontsize=9)


def run(options: argparse.Namespace) -> part.Result:
    rows, mazes = measure(options.quick), measure_mazes(options.quick)
    tables = {"methods": rows, "mazes": mazes}
    return part.Result(tables, judge(rows, mazes, options.quick), page(rows, mazes), lambda path: draw(path, rows))


main = part.command("core.depth", "Which gradient at which depth", __doc__, run)

if __name__ == "__main__":
    sys.exit(main())
