"""Classifiers: time, memory and gradient of the reversible adjoint beside back-propagation through a plain loop.

    python -m benchmarks.classifier_cost

Batch 64 of 32x32 images, one thread, CPU time. Writes `benchmarks/results/classifier_cost.{csv,md}`.

"Least possible" is BPTT's time and that of the forward evaluations of f once more, which every reversible method makes.
The limit of the time is for the released model with its 4 steps a stage; ours has so cheap an f (few channels) that the
least possible is near it.

The gradient is compared in float32 with BPTT through the same iterates (`BackpropAdjoint`), and in float64 with a plain
loop that shares no code, on 8 images. In float32 two loops that round differently do not agree to 1e-5 on millions of
ReLUs: wherever one of them is on the other side of its kink, an element's derivative is another.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import paired_ratio, peak_tensor_bytes, provenance, time_interleaved, write_csv
from benchmarks.reference import with_plain_loops
from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.models import ClassifierConfig, build_classifier

BATCH, CLASSES = 64, 10
PAPER = ClassifierConfig(CLASSES, architecture="paper_stages", channels=[32, 64, 64, 32], widths=[1, 3, 3, 1])
OURS = ClassifierConfig(CLASSES, channels=[48, 96, 192], stem_stride=2)
RELEASED = "released multi-scale, channels 32-64-64-32, beta 0.8"
RELEASED_STEPS = 4
MODELS: dict[str, tuple[ClassifierConfig, Callable[[int], Any]]] = {
    RELEASED: (PAPER, lambda n: ReversibleSolver(beta=0.8, max_steps=n)),
    "the same, compiled=True": (PAPER, lambda n: ReversibleSolver(beta=0.8, max_steps=n, compiled=True)),
    "cifar10/cpu.yaml, momentum 1/8": (OURS, lambda n: MomentumSolver(max_steps=n)),
    "cifar10/cpu.yaml, compiled=True": (OURS, lambda n: MomentumSolver(max_steps=n, compiled=True)),
}
STEPS = (1, 2, 4, 8)
MOST_TIME, MOST_ERROR, MOST_GROWTH = 1.33, 1e-5, 1.02


def build(name: str, num_steps: int, *, plain: bool) -> nn.Module:
    """A model with the same weights in every call, not those of the start, at which parts of f do nothing."""
    config, solver = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = build_classifier(config, solver(num_steps), ReversibleAdjoint(mismatch="raise"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return with_plain_loops(model) if plain else model


def step(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients of the loss."""
    loss = F.cross_entropy(model(images).logits_BV, labels)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of all gradients as one vector."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)]).norm()
    return float(difference / torch.cat([b.flatten() for b in theirs]).norm())


def evaluate_again(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """The forward evaluations of f alone: what every reversible method makes once more than BPTT."""
    states: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.f.register_forward_hook(lambda f, inputs, value: states.append((f, inputs[1].detach())))
        for layer in model.modules()
        if isinstance(layer, EquilibriumLayer)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        with torch.no_grad():
            for f, x in states:
                f(x, x)

    return run


def measure(name: str, num_steps: int, rounds: int) -> dict[str, Any]:
    """One row."""
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))
    ours, theirs = build(name, num_steps, plain=False), build(name, num_steps, plain=True)
    same_iterates = build(name, num_steps, plain=False)
    for layer in same_iterates.modules():
        if isinstance(layer, EquilibriumLayer):
            layer.adjoint = BackpropAdjoint()
    error = relative_error(step(ours, images, labels), step(same_iterates, images, labels))
    few = slice(0, 8)
    wide = [copy.deepcopy(model).double() for model in (ours, theirs)]
    error_float64 = relative_error(*(step(model, images[few].double(), labels[few]) for model in wide))
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: step(ours, images, labels),
        "bptt": lambda: step(theirs, images, labels),
        "again": evaluate_again(ours, images),
    }
    timings = time_interleaved(runs, rounds)
    seconds = {key: timing.process_seconds for key, timing in timings.items()}
    ratio = paired_ratio(seconds["ours"], seconds["bptt"])
    return {
        "model": name,
        "steps a stage": num_steps,
        "seconds": round(sorted(seconds["ours"])[rounds // 2], 3),
        "time over BPTT": round(ratio.median, 3),
        "lower quartile": round(ratio.lower, 3),
        "upper quartile": round(ratio.upper, 3),
        "least possible": round(1 + paired_ratio(seconds["again"], seconds["bptt"]).median, 3),
        "peak MiB": round(peak_tensor_bytes(runs["ours"]) / 2**20, 1),
        "peak MiB of BPTT": round(peak_tensor_bytes(runs["bptt"]) / 2**20, 1),
        "gradient error": float(f"{error:.2e}"),
        "gradient error, float64": float(f"{error_float64:.2e}"),
    }


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as required."""
    faults = []
    for row in rows:
        where = f"{row['model']}, {row['steps a stage']} steps"
        two = next(r for r in rows if r["model"] == row["model"] and r["steps a stage"] == 2)
        if row["model"] == RELEASED and row["steps a stage"] == RELEASED_STEPS and row["time over BPTT"] > MOST_TIME:
            faults.append(f"time {row['time over BPTT']} > {MOST_TIME}: {where}")
        for key in ("gradient error", "gradient error, float64"):
            if row[key] > MOST_ERROR:
                faults.append(f"{key} {row[key]} > {MOST_ERROR}: {where}")
        if row["steps a stage"] >= 2 and row["peak MiB"] >= row["peak MiB of BPTT"]:
            faults.append(f"peak memory not below that of BPTT: {where}")
        if row["steps a stage"] >= 2 and row["peak MiB"] > MOST_GROWTH * two["peak MiB"]:
            faults.append(f"peak memory grows with the steps: {where}")
    return faults


def main() -> None:
    """Measure, write, print; exit with 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = provenance("python -m benchmarks.classifier_cost")
    rows = []
    for name in MODELS:
        for num_steps in STEPS:
            rows.append(measure(name, num_steps, arguments.rounds))
            print(rows[-1], flush=True)
    faults = judge(rows)
    write_csv(arguments.output / "classifier_cost.csv", rows)
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(row[key]) for key in header) + " |" for row in rows]
    origin = (
        f"`{facts['command']}`, {facts['date']}, {facts['hardware']['cpu']}, one thread, torch "
        f"{facts['versions']['torch']}, commit {facts['commit'][:7]}"
        f"{' with uncommitted changes' if facts['uncommitted_changes'] else ''}."
    )
    verdict = "Not as required:\n\n" + "\n".join(f"- {fault}" for fault in faults) if faults else "All as required."
    text = f"# Classifiers: cost of the reversible adjoint\n\n{origin}\n\n" + "\n".join(lines) + f"\n\n{verdict}\n"
    (arguments.output / "classifier_cost.md").write_text(text)
    print(verdict)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
