"""Mazes: which gradient solves them, at equal steps, at equal CPU time, and within a memory budget.

    python -m benchmarks.quality.reasoning [--quick] [--only NAME ...] [--evaluations 32 ...] [--seeds 0 1 2]

All models have the same f (stacks: its layers), mazes (5 x 5 cells in training), and optimizer, whose learning rate
is the best of three in short runs. Each is trained until both 600 steps and 360 CPU seconds are spent, and solves new
mazes of 5 to 19 cells a side when each was. Three gradients are also trained without random and late starts. One
process, one thread. Runs that are already in the output are skipped, so that the table can be filled in parts. Memory
at other depths: `benchmarks.quality.reasoning_memory`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import part
from benchmarks.quality import mazes
from benchmarks.quality.__main__ import Files, best_rate, train
from benchmarks.quality.training import facts_of, origins
from benchmarks.report import spread, table
from revdeq_lightning.cli.quiet import quieten_lightning

EVALUATIONS = 32
OTHER_EVALUATIONS = (16, 64, 128)
DEEP_AND_SHALLOW = (mazes.EXACT, mazes.STORED, mazes.LAST[5], mazes.ONE_STEP)
"""Gradients that are also trained with the other numbers of evaluations."""
BUDGETS = {"steps": "At equal steps", "cpu": "At equal CPU time"}
Rows = Sequence[dict[str, str]]


def jobs(names: Sequence[str], evaluations: Sequence[int], seeds: Sequence[int]) -> list[tuple[str, int, int]]:
    """Gradient, evaluations, and seed of each run, those with the most common number of evaluations first."""
    return [
        (name, count, seed)
        for count in sorted(evaluations, key=lambda n: (n in OTHER_EVALUATIONS, n))
        for seed in seeds
        for name in names
        if count not in OTHER_EVALUATIONS or name in DEEP_AND_SHALLOW
    ]


def fill(options: Any) -> Rows:
    files = Files({"search": options.output / "reasoning_search.csv", "runs": options.output / "reasoning.csv"})
    usual = 4 if options.quick else EVALUATIONS
    for name, evaluations, seed in jobs(options.only, options.evaluations, options.seeds):
        key = {"gradient": name, "evaluations": evaluations, "seed": seed}
        if files.has("runs", **key):
            continue
        rate = best_rate(mazes.part(usual, options.quick), name, files, options)
        chosen = mazes.part(evaluations, options.quick)
        outcome = train(chosen, name, rate, seed, chosen.budget, options, mazes.solved)
        row = key | {"rate": rate, "parameters": outcome.parameters, "peak_mib": f"{outcome.peak_bytes / 2**20:.2f}"}
        for budget in BUDGETS:
            seconds, _, steps = outcome.spent.get(budget, (float("nan"),) * 3)
            row |= {f"steps_{budget}": steps, f"cpu_minutes_{budget}": f"{seconds / 60:.2f}"}
            for size in mazes.sizes(options.quick):
                row[f"solved_{size}_{budget}"] = f"{outcome.at.get(budget, {}).get(size, float('nan')):.1f}"
        files.add("runs", [row | facts_of("python -m benchmarks.quality.reasoning")])
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return files.rows["runs"]


def groups(rows: Rows) -> dict[tuple[str, int], Rows]:
    """Rows of the same gradient and evaluations, in the order of the comparison."""
    order = list(mazes.part(EVALUATIONS, False).variants)
    keys = sorted({(row["gradient"], int(row["evaluations"])) for row in rows}, key=lambda k: (order.index(k[0]), k[1]))
    return {k: [row for row in rows if (row["gradient"], int(row["evaluations"])) == k] for k in keys}


def average(rows: Rows, column: str) -> float:
    return mean(float(row[column]) for row in rows)


def page(rows: Rows) -> str:
    sections = [
        "# Mazes: which gradient solves them",
        "Written by `python -m benchmarks.quality.reasoning`; for the interpretation see [the README](../README.md)."
        f" {origins(rows)}. Percent of new mazes with every cell right, by cells a"
        " side, mean of the seeds named (minimum - maximum). All were trained on the smallest size. Larger mazes"
        " get evaluations of f in proportion to their pixels, also where another number would do better. Averaged"
        " weights at a constant learning rate (rates x: times that of the configuration, best of three in short runs)."
        " Memory: tensors of one training step.",
    ]
    sizes = sizes_of(rows)
    for budget, title in BUDGETS.items():
        lines = []
        for (name, evaluations), own in groups(rows).items():
            seeds = ", ".join(sorted((row["seed"] for row in own), key=int))
            facts = (name, str(evaluations), seeds, f"{float(own[0]['rate']):g}", f"{int(own[0]['parameters']):,}")
            cost = (f"{average(own, f'steps_{budget}'):.0f}", f"{average(own, f'cpu_minutes_{budget}'):.2f}")
            found = (spread([float(row[f"solved_{size}_{budget}"]) for row in own], 1, 0) for size in sizes)
            lines.append((*facts, *cost, f"{average(own, 'peak_mib'):.1f}", *found))
        header = ("gradient", "evaluations", "seeds", "rates x", "parameters", "steps", "CPU minutes", "MiB", *sizes)
        sections += [f"## {title}", table(header, lines)]
    return "\n\n".join([*sections, "![Solved mazes by size and by memory](reasoning.png)"]) + "\n"


def sizes_of(rows: Rows) -> list[str]:
    """Cells a side of the test mazes."""
    return [name.split("_")[1] for name in rows[0] if name.startswith("solved_") and name.endswith("_steps")]


def draw(path: Path, rows: Rows) -> None:
    """Solved mazes by their size for each gradient, and by the memory of a training step, at equal CPU time."""
    sizes, found = sizes_of(rows), groups(rows)
    ticks = [int(size) for size in sizes]
    usual = EVALUATIONS if any(n == EVALUATIONS for _, n in found) else min(n for _, n in found)
    with part.figure(path, 1, 2, (14, 6)) as axes:
        by_size, by_memory = axes[0]
        for i, name in enumerate(dict.fromkeys(name for name, _ in found)):
            style = {"color": f"C{i % 10}", "marker": "os^"[i // 10], "label": name}
            if (name, usual) in found:
                own = found[name, usual]
                by_size.plot(ticks, [average(own, f"solved_{size}_cpu") for size in sizes], **style)
            points = [
                (average(own, "peak_mib"), mean(average(own, f"solved_{size}_cpu") for size in sizes), n)
                for (other, n), own in found.items()
                if other == name
            ]
            by_memory.plot([x for x, _, _ in points], [y for _, y, _ in points], **style)
            for x, y, n in points:
                by_memory.annotate(str(n), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        by_size.set(xlabel="cells a side", ylabel="solved mazes, %", xticks=ticks)
        by_size.set_title(f"Trained on {sizes[0]} x {sizes[0]} cells with {usual} evaluations of f, equal CPU time")
        by_memory.set(
            xlabel="tensors of a training step, MiB", xscale="log", ylabel="solved mazes, %, mean of the sizes"
        )
        by_memory.set_title("Solved within a memory budget; numbers: evaluations in training")
        handles = by_memory.get_legend_handles_labels()
        by_memory.figure.legend(*handles, loc="outside right", fontsize=8, frameon=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = part.parser(__doc__)
    names = list(mazes.part(EVALUATIONS, False).variants)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--evaluations", nargs="+", type=int, help="of f in training; default: 32, and for some others")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder for prepared data")
    options = parser.parse_args(arguments)
    part.refuse_quick_results(parser, options)
    if options.quick:
        options.seeds, options.cache = options.seeds[:1], options.output / "cache"
    options.evaluations = options.evaluations or ([4] if options.quick else [EVALUATIONS, *OTHER_EVALUATIONS])
    torch.set_num_threads(1)
    quieten_lightning()
    rows = fill(options)
    (options.output / "reasoning.md").write_text(page(rows))
    draw(options.output / "reasoning.png", rows)
    print(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
