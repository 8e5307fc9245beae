"""Draw gradient_error.png, the figure of the README, from the results of `make bench-core`.

python docs/pictures/gradient_error.py
"""

import csv
import math
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parents[1] / "benchmarks" / "results" / "core_gradients.csv"
CURVES = {  # solver and arithmetic in the results: label, color, style
    ("RevDEQ 0.8", "float32"): ("float32 state, the paper's solver", "tab:red", "s--"),
    ("RevDEQ 0.8", "float64"): ("float64 state (as published), the paper's solver", "tab:orange", "s--"),
    ("RevDEQ 0.8", "exact"): ("exact state, the paper's solver", "tab:blue", "s--"),
    ("momentum 0.125", "exact"): ("exact state, momentum 1/8", "navy", "^:"),
}
TOP = {"float32": 50.0, "float64": 15.0, "exact": 5.0}
"""Where a curve that leaves the picture, or is not finite, is drawn."""


def main() -> None:
    """Draw the error against the depth; a cross marks a gradient that is not finite."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for (solver, arithmetic), (label, color, style) in CURVES.items():
        points = read(solver, arithmetic)
        top = TOP[arithmetic]
        shown = [(n, min(error, top)) for n, error in points if math.isfinite(error) and error > 0]
        axis.plot(*zip(*shown, strict=True), style, color=color, markersize=5, label=label)
        lost = [n for n, error in points if not math.isfinite(error)]
        axis.plot(lost, [top] * len(lost), "x", color=color, markersize=8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks := [2**i for i in range(1, 9)], [str(tick) for tick in ticks])
    axis.set(yscale="log", ylim=(1e-8, 1e2))
    axis.set_xlabel("evaluations of f in the forward pass")
    axis.set_ylabel("relative error of the gradient")
    axis.set_title("Gradient error against depth (attention block, float32 weights; crosses: not finite)", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="center right", bbox_to_anchor=(1, 0.48))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    # No version or date in the file: the same results give the same bytes.
    figure.savefig(FOLDER / "gradient_error.png", dpi=110, metadata={"Software": None})


def read(solver: str, arithmetic: str) -> list[tuple[int, float]]:
    """Evaluations and error of one curve."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = ("attention", solver, arithmetic, "float32")
    return [
        (int(row["evaluations"]), float(row["error"]))
        for row in rows
        if (row["block"], row["solver"], row["arithmetic"], row["compute_dtype"]) == wanted
    ]


if __name__ == "__main__":
    main()
