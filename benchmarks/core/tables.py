"""The core's measurements as Markdown tables."""

from collections.abc import Iterable

from benchmarks.report import table
from benchmarks.requirements import Rows


def page(gradients: Rows, convergence: Rows, cost: Rows, memory: Rows) -> list[str]:
    return [
        "Written by the program; for the interpretation see [the README](../README.md).",
        "## Gradient error",
        "Relative L2 distance of the whole gradient (parameters, x, z0) from BPTT of the same iteration.",
        *_gradient_tables(gradients),
        "## Distance from the fixed point",
        "Relative, `tanh(W z + x)`, norm(W) = 0.9, d = 64, symmetric / random W; geometric mean over five maps.",
        _convergence_table(convergence),
        "## Time",
        "Ratio of paired CPU times, median and quartiles; 16 evaluations of an attention block. Last: wall clock.",
        _cost_table(cost),
        "## Memory",
        "Peak of the tensors of one training step, in brackets that of the process above its base, MiB.",
        _memory_table(memory),
    ]


def _gradient_tables(rows: Rows) -> Iterable[str]:
    for block in dict.fromkeys(row["block"] for row in rows):
        yield f"{block.capitalize()} block:"
        cells = {}
        for row in rows:
            if row["block"] == block:
                cells[row["solver"], row["steps"], row["arithmetic"], row["compute_dtype"]] = row
        lines = []
        for solver, steps in dict.fromkeys(key[:2] for key in cells):
            line = [solver, str(steps)]
            for arithmetic in ("float32", "float64", "exact"):
                line.append(f"{cells[solver, steps, arithmetic, 'float32']['error']:.0e}")
            line.append(f"{cells[solver, steps, 'exact', 'float64']['error']:.0e}")
            autocast = cells.get((solver, steps, "exact", "bfloat16"))
            line.append(f"{autocast['error']:.1e} / {autocast['bptt_error']:.1e}" if autocast else "")
            lines.append(line)
        header = ("solver", "steps", "float32 state", "float64 state", "exact", "exact, float64 f")
        yield table((*header, "bf16 autocast: exact / BPTT"), lines)


def _convergence_table(rows: Rows) -> str:
    cells = {(row["evaluations"], row["solver"], row["weights"]): row["distance"] for row in rows}
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = [
        [str(n), *(f"{cells[n, s, 'symmetric']:.0e} / {cells[n, s, 'random']:.0e}" for s in solvers)]
        for n in dict.fromkeys(row["evaluations"] for row in rows)
    ]
    return table(("evaluations", *solvers), lines)


def _cost_table(rows: Rows) -> str:
    lines = []
    walls = [row for row in rows if row["clock"] == "wall"]
    for row, wall in zip((row for row in rows if row["clock"] == "process"), walls, strict=True):
        ratios = [
            f"{row[f'over {base} median']:.3f} ({row[f'over {base} lower']:.3f}-{row[f'over {base} upper']:.3f})"
            for base in ("bare", "stored BPTT", "checkpointed BPTT")
        ]
        where = f"d {row['dim']}, {row['batch']} x {row['tokens']} tokens"
        lines.append(
            [where, row["competitor"], f"{row['median_seconds']:.2f}", *ratios, f"{wall['over bare median']:.3f}"]
        )
    return table(
        ("size", "", "CPU seconds", "over bare", "over stored BPTT", "over checkpointed BPTT", "over bare, wall"), lines
    )


def _memory_table(rows: Rows) -> str:
    curves = list(dict.fromkeys((row["method"], row["solver"]) for row in rows))
    cells = {(row["method"], row["solver"], row["steps"]): row for row in rows}
    lines = []
    for steps in dict.fromkeys(row["steps"] for row in rows):
        line = [str(steps)]
        for curve in curves:
            row = cells[*curve, steps]
            line.append(f"{row['tensor_bytes'] / 2**20:.2f} ({row['process_bytes'] / 2**20:.0f})")
        lines.append(line)
    return table(("steps", *(f"{method}, {solver}" for method, solver in curves)), lines)
