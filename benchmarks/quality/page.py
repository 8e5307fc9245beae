"""Quality at equal cost, as a page of tables and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import part
from benchmarks.report import spread, table

Rows = Sequence[Mapping[str, str]]
Results = Sequence[tuple[Any, Mapping[str, Rows]]]


def page(results: Results) -> str:
    sections = [
        "# Quality at equal cost",
        "Written by `python -m benchmarks.quality`; for the interpretation see [the README](../README.md). Every model"
        " was trained until two budgets were spent, and evaluated on the whole validation split when each was: CPU time"
        " of one thread (data, forward and backward pass, optimizer), and FLOPs of the training steps (matrix products"
        " and convolutions, forward and backward, counted during training by PyTorch's formulas). All models have the"
        " same optimizer and batches; the learning rates are multiplied by 1/4, 1/2, or 1, whichever was best in three"
        " short runs. The rate is constant, and averaged weights are evaluated. Memory: tensors of one training step."
        " In parentheses: minimum and maximum over the seeds.",
    ]
    for data, rows in results:
        sections += [
            f"## {data.title}",
            _provenance(data, rows["runs"]),
            _runs(data, rows),
            _depths(data, rows["depths"]),
        ]
    sections.append("![Quality at equal cost](quality.png)")
    return "\n\n".join(sections) + "\n"


def _provenance(data: Any, runs: Rows) -> str:
    commits = sorted({row["commit"][:7] for row in runs})
    budget, search = data.budget, len(data.rates) * data.search_seconds
    return (
        f"{budget.cpu_seconds / 60:g} CPU minutes or {budget.flops / 1e12:g} TFLOP per run, after a search of"
        f" {search:g} CPU seconds per model; {', '.join(sorted({row['cpu'] for row in runs}))}, torch"
        f" {', '.join(sorted({row['torch'] for row in runs}))}, commit {', '.join(commits)}. Figure: {data.unit}."
    )


def _runs(data: Any, rows: Mapping[str, Rows]) -> str:
    header = (
        *("model", "parameters", "evaluations of f", "rates x", "seeds", "at equal CPU time", "at equal FLOPs"),
        *("CPU minutes for the FLOPs", "TFLOP in the CPU time", "peak MiB"),
    )
    lines, digits = [], 3 if data.smaller_is_better else 1
    for name in data.variants:
        own = [row for row in rows["runs"] if row["variant"] == name]
        if not own:
            continue
        evaluations = mean(float(row["evaluations"]) for row in own)
        lines.append(
            (
                *(name, f"{int(own[0]['parameters']):,}", f"{evaluations:.1f}" if evaluations else "none"),
                *(f"{float(own[0]['rate']):g}", str(len(own))),
                *(spread([float(row[f"figure_{budget}"]) for row in own], digits) for budget in ("cpu", "flops")),
                f"{mean(float(row['cpu_minutes_flops']) for row in own):.2f}",
                f"{mean(float(row['tflop_cpu']) for row in own):.2f}",
                f"{float(own[0]['peak_mib']):.1f}",
            )
        )
    return table(header, lines)


def _depths(data: Any, rows: Rows) -> str:
    """The figure by number of evaluations, for the models that have them."""
    names = [name for name in data.variants if any(r["variant"] == name and int(r["evaluations"]) > 1 for r in rows)]
    counts = sorted({int(row["evaluations"]) for row in rows})
    digits = 3 if data.smaller_is_better else 1
    lines = []
    for name in names:
        cells = []
        for count in counts:
            own = [float(r["figure"]) for r in rows if r["variant"] == name and int(r["evaluations"]) == count]
            cells.append(f"{mean(own):.{digits}f}" if own else "")
        lines.append((name, *cells))
    title = "The trained models with another number of evaluations, on a quarter of the split (mean of the seeds):"
    return f"{title}\n\n" + table(("model", *map(str, counts)), lines)


def draw(path: Path, results: Results) -> None:
    with part.figure(path, len(results), 3, (15, 5 * len(results))) as axes:
        for line, (data, rows) in zip(axes, results, strict=True):
            for i, name in enumerate(data.variants):
                points = [row for row in rows["curves"] if row["variant"] == name]
                style = {"color": f"C{i}", "label": name, "marker": "o", "markersize": 3}
                _curve(line[0], points, "cpu_seconds", 1 / 60, style)
                _curve(line[1], points, "flops", 1e-12, style)
                _mean_at(line[2], [row for row in rows["depths"] if row["variant"] == name], style)
            titles = "CPU minutes of training", "TFLOP of training", "evaluations of f"
            for axis, title in zip(line, titles, strict=True):
                axis.set(xlabel=title, ylabel=data.unit)
            line[0].set_title(data.title)
            line[2].set_xscale("log", base=2)
            line[2].set_title("The trained model, other depths")
            line[1].legend(fontsize=8, frameon=False)


def _curve(axis: Any, points: Rows, cost: str, unit: float, style: Mapping[str, Any]) -> None:
    """Mean over the seeds for each point of the curve."""
    by_seed: dict[str, list[Mapping[str, str]]] = {}
    for row in points:
        by_seed.setdefault(row["seed"], []).append(row)
    columns = list(zip(*by_seed.values(), strict=False))
    if columns:
        costs = [unit * mean(float(row[cost]) for row in column) for column in columns]
        axis.plot(costs, [mean(float(row["figure"]) for row in column) for column in columns], **style)


def _mean_at(axis: Any, depths: Rows, style: Mapping[str, Any]) -> None:
    counts = sorted({int(row["evaluations"]) for row in depths})
    figures = [mean(float(row["figure"]) for row in depths if int(row["evaluations"]) == n) for n in counts]
    if len(counts) > 1:
        axis.plot(counts, figures, **style)
    elif counts:
        axis.axhline(figures[0], color=style["color"], linestyle=":")
