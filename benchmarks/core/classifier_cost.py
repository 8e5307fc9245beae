"""Classifiers: time, memory, and gradient of the reversible adjoint compared with backpropagation through a plain loop.

    python -m benchmarks.core.classifier_cost [--quick] [--output DIR]

Batch 64 of 32x32 images, one thread, CPU time.

"Least possible" is the time of BPTT plus that of the forward evaluations of f, which every reversible method repeats.
In ours f is so cheap (few channels) that the least possible time is near the limit.

The gradient is compared in float32 with BPTT through the same iterates (`BackpropAdjoint`), and in float64 with a plain
loop that shares no code, on 8 images. In float32, two loops that round differently do not agree to 1e-5 on millions of
ReLUs: the derivative differs for every element that falls on the other side of the kink.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import part
from benchmarks.core.reference import with_plain_loops
from benchmarks.measure import paired_ratio, peak_tensor_bytes, time_interleaved
from benchmarks.requirements import Requirement, at_most
from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    FixedPointSolution,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.models import ClassifierConfig, build_classifier

BATCH, CLASSES = 64, 10
PAPER = ClassifierConfig(CLASSES, architecture="paper_stages", channels=[32, 64, 64, 32], widths=[1, 3, 3, 1])
OURS = ClassifierConfig(CLASSES, channels=[48, 96, 192], stem_stride=2)
RELEASED, SMALL = "released multi-scale, channels 32-64-64-32, beta 0.8", "cifar10/cpu.yaml, momentum 1/8"
TIMED_STEPS = {RELEASED: 4, SMALL: 2}
"""Those of the released model and of the configuration."""
MODELS: dict[str, tuple[ClassifierConfig, Callable[[int], Any]]] = {
    RELEASED: (PAPER, lambda n: ReversibleSolver(beta=0.8, max_steps=n)),
    SMALL: (OURS, lambda n: MomentumSolver(max_steps=n)),
}
STEPS = (1, 2, 4, 8)
MOST_TIME, MOST_ERROR, MOST_GROWTH = 1.33, 1e-5, 1.02
DIGIT_BITS = 3
"""Of a digit in radix 5 or 8, those of the two solvers."""


def build(name: str, num_steps: int, *, plain: bool) -> nn.Module:
    """Create a model with the same weights in every call; not the initial ones, at which parts of f have no effect."""
    config, solver = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = build_classifier(config, solver(num_steps), ReversibleAdjoint(mismatch="raise"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return with_plain_loops(model) if plain else model


def step(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(model(images).logits_BV, labels)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    difference = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)]).norm()
    return float(difference / torch.cat([b.flatten() for b in theirs]).norm())


def evaluate_again(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Only the forward evaluations of f, which every reversible method makes in addition to BPTT."""
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


def remainder_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of all digits that a training step keeps, which every solve holds until its backward pass."""
    found: list[int] = []

    def count(layer: nn.Module, inputs: Any, solution: FixedPointSolution) -> None:
        evaluations: int = layer.solver.num_evaluations  # type: ignore[union-attr, assignment]
        found.append(solution.value.numel() * ceil(DIGIT_BITS * evaluations / 8))

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, EquilibriumLayer)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return sum(found)


def measure(name: str, num_steps: int, rounds: int) -> dict[str, Any]:
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
        "remainders MiB": round(remainder_bytes(ours, images) / 2**20, 1),
        "peak MiB of BPTT": round(peak_tensor_bytes(runs["bptt"]) / 2**20, 1),
        "gradient error": float(f"{error:.2e}"),
        "gradient error, float64": float(f"{error_float64:.2e}"),
    }


def judge(rows: list[dict[str, Any]], quick: bool) -> list[Requirement]:
    verdict = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        deep = [row for row in own if row["steps a stage"] >= 2]
        for key in ("gradient error", "gradient error, float64"):
            verdict.append(at_most(f"{name}: {key}", max(row[key] for row in own), MOST_ERROR, "{:.1e}"))
        over = max(row["peak MiB"] / row["peak MiB of BPTT"] for row in deep)
        without = [row["peak MiB"] - row["remainders MiB"] for row in deep]
        verdict.append(at_most(f"{name}: peak memory over BPTT's, from 2 steps on", over, 1.0, "{:.3f}"))
        what = f"{name}: growth of the peak beyond that of all remainders, from 2 steps on"
        verdict.append(at_most(what, max(without) / without[0], MOST_GROWTH, "{:.4f}"))
        for row in own:
            if row["steps a stage"] == TIMED_STEPS[name]:
                what = f"{name}: time over BPTT, {TIMED_STEPS[name]} steps"
                verdict.append(at_most(what, row["time over BPTT"], MOST_TIME, "{:.3f}", not quick))
    return verdict


def run(options: argparse.Namespace) -> part.Result:
    steps, rounds = (STEPS[:2], 1) if options.quick else (STEPS, options.rounds)
    rows = []
    for name in list(MODELS)[: 1 if options.quick else None]:
        for num_steps in steps:
            rows.append(measure(name, num_steps, rounds))
            print(rows[-1], flush=True)
    return part.Result({"": rows}, judge(rows, options.quick), [part.markdown_table(rows)])


TITLE = "Classifiers: cost of the reversible adjoint"
main = part.command("core.classifier_cost", TITLE, __doc__, run, options={"--rounds": {"type": int, "default": 5}})

if __name__ == "__main__":
    sys.exit(main())
