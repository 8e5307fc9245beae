"""Figure of gradient error, memory, cost, and convergence."""

import math
from pathlib import Path
from typing import Any

from benchmarks import part
from benchmarks.requirements import MAX_COST, Rows

COLORS = {"float32": "tab:red", "float64": "tab:orange", "exact": "tab:blue"}


def draw(path: Path, gradients: Rows, convergence: Rows, cost: Rows, memory: Rows) -> None:
    with part.figure(path, 2, 2, (13, 9.5)) as axes:
        _gradients(axes[0, 0], gradients)
        _memory(axes[0, 1], memory)
        _convergence(axes[1, 0], convergence)
        _costs(axes[1, 1], cost)


def _gradients(axis: Any, rows: Rows) -> None:
    styles = {"RevDEQ 0.5": "o-", "RevDEQ 0.8": "s--", "momentum 0.125": "^:"}
    top = 30.0
    for arithmetic, color in COLORS.items():
        for solver, style in styles.items():
            curve = [
                (row["evaluations"], row["error"])
                for row in rows
                if (row["block"], row["solver"], row["arithmetic"], row["compute_dtype"])
                == ("attention", solver, arithmetic, "float32")
            ]
            finite = [(n, min(e, top)) for n, e in curve if math.isfinite(e) and e > 0]
            lost = [n for n, e in curve if not math.isfinite(e)]
            axis.plot(
                *zip(*finite, strict=True), style, color=color, markersize=5, label=f"{arithmetic} state, {solver}"
            )
            axis.plot(lost, [top] * len(lost), "x", color=color, markersize=8)
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set(xscale="log", yscale="log", ylim=(1e-9, 1e2), xlabel="evaluations of f in the forward pass (count)")
    axis.set_xscale("log", base=2)
    axis.set_ylabel("relative error of the gradient (dimensionless)")
    axis.set_title("Floating-point states break with depth, the exact one does not\n(attention block; crosses: nan)")
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def _memory(axis: Any, rows: Rows) -> None:
    for method, solver in dict.fromkeys((row["method"], row["solver"]) for row in rows):
        curve = [
            (r["evaluations"], r["tensor_bytes"] / 2**20)
            for r in rows
            if (r["method"], r["solver"]) == (method, solver)
        ]
        style = "o-" if method.startswith("rev") else "s--"
        label = f"{method}, {solver}" if method.startswith("rev") else method
        axis.plot(*zip(*curve, strict=True), style, markersize=4, label=label)
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlabel="evaluations of f in the forward pass (count)", ylabel="peak of the tensors (MiB)")
    axis.set_title("Memory of one training step")
    axis.legend(fontsize=9, loc="upper left", frameon=False)


def _convergence(axis: Any, rows: Rows) -> None:
    for i, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
        for weights, style in (("symmetric", "-"), ("random", ":")):
            curve = [
                (r["evaluations"], r["distance"]) for r in rows if (r["solver"], r["weights"]) == (solver, weights)
            ]
            label = solver if weights == "symmetric" else None
            axis.plot(*zip(*curve, strict=True), style, color=f"C{i}", label=label)
    axis.set(
        yscale="log", xlabel="evaluations of f (count)", ylabel="relative distance from the fixed point (dimensionless)"
    )
    axis.set_title("Convergence, tanh map of norm 0.9\n(solid: symmetric weights, dotted: random)")
    axis.legend(fontsize=9, loc="lower left", frameon=False)


def _costs(axis: Any, rows: Rows) -> None:
    rows = [row for row in rows if row["clock"] == "process"]
    names = [name for name in dict.fromkeys(row["competitor"] for row in rows) if name != "bare"]
    sizes = list(dict.fromkeys((row["dim"], row["batch"], row["tokens"]) for row in rows))
    height = 0.8 / len(sizes)
    for j, size in enumerate(sizes):
        curve = {r["competitor"]: r for r in rows if (r["dim"], r["batch"], r["tokens"]) == size}
        medians = [curve[name]["over bare median"] for name in names]
        errors = [
            [max(0.0, m - curve[n]["over bare lower"]) for m, n in zip(medians, names, strict=True)],
            [max(0.0, curve[n]["over bare upper"] - m) for m, n in zip(medians, names, strict=True)],
        ]
        places = [i + (j - (len(sizes) - 1) / 2) * height for i in range(len(names))]
        dim, batch, tokens = size
        axis.barh(places, medians, height * 0.9, xerr=errors, label=f"d {dim}, {batch} x {tokens} tokens", capsize=2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.axvline(MAX_COST, color="tab:red", linestyle="--", linewidth=1)
    axis.text(MAX_COST + 0.005, len(names) - 0.45, f"limit {MAX_COST}", color="tab:red", fontsize=9, va="bottom")
    axis.set(
        xlim=(0.6, 1.2),
        ylim=(-0.6, len(names) - 0.1),
        xlabel="CPU time over that of the bare evaluations (dimensionless)",
    )
    axis.set_yticks(range(len(names)), names)
    axis.set_title("Cost of forward and backward pass, 16 evaluations\n(median and quartiles)")
    axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, frameon=False)
