"""Format measurements as Markdown tables, with the verdict."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.requirements import Requirement, Rows

VERDICT_HEADER = ("what", "required", "measured", "verdict")


def markdown(
    provenance: dict[str, Any],
    gradients: Rows,
    convergence: Rows,
    costs: Rows,
    memory: Rows,
    verdict: Sequence[Requirement],
) -> str:
    """The whole page."""
    sections = [
        "# The core, measured",
        origin(provenance) + " Written by the program; for the interpretation see [the README](../README.md).",
        "![At a glance](core.png)",
        "## Verdict",
        table(VERDICT_HEADER, verdict_lines(verdict)),
        "## Gradient error",
        "Relative L2 distance of the whole gradient (parameters, x, z0) from BPTT of the same iteration.",
        *_gradient_tables(gradients),
        "## Distance from the fixed point",
        "Relative, `tanh(W z + x)`, norm(W) = 0.9, d = 64, symmetric / random W; geometric mean over five maps.",
        _convergence_table(convergence),
        "## Time",
        "Ratio of paired CPU times, median and quartiles; 16 evaluations of an attention block. Last: wall clock.",
        _cost_table(costs),
        "## Memory",
        "Peak of the tensors of one training step, in brackets that of the process above its base, MiB.",
        _memory_table(memory),
    ]
    return "\n\n".join(sections) + "\n"


def origin(provenance: dict[str, Any]) -> str:
    """Where, when, and how a result was measured, in a sentence."""
    hardware = provenance["hardware"]
    changes = " with uncommitted changes" if provenance["uncommitted_changes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return (
        f"`{provenance['command']}`, {provenance['date']}, {provenance['seconds']} s on {hardware['cpu']},"
        f" {hardware['cores']} cores, {hardware['threads']} thread(s), load {hardware['load_average']} at the start;"
        f" {versions}; commit {provenance['commit']}{changes}."
    )


def verdict_lines(verdict: Sequence[Requirement]) -> list[tuple[str, str, str, str]]:
    """The cells under `VERDICT_HEADER`."""
    return [(r.name, r.required, r.measured, r.verdict) for r in verdict]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (header, *rows)
    )


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
        yield table(
            (
                "solver",
                "steps",
                "float32 state",
                "float64 state",
                "exact",
                "exact, float64 f",
                "bf16 autocast: exact / BPTT",
            ),
            lines,
        )


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
