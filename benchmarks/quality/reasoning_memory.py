"""Memory of a training step on mazes, by gradient and number of evaluations of f (or of layers).

    python -m benchmarks.quality.reasoning_memory [--quick] [--output DIR]

The model and batch of configs/reasoning/mazes.yaml. Bytes of the tensors that the forward and backward pass create, as
in the part `core`: an integer, the same in every repetition. Weights and optimizer are not included.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import part
from benchmarks.core.memory import PROMISES
from benchmarks.measure import peak_tensor_bytes
from benchmarks.quality import mazes
from benchmarks.quality.__main__ import Variant
from benchmarks.quality.budget import settings_of
from benchmarks.quality.mazes import EXACT, PAPER, STORED, TINY
from benchmarks.requirements import MAX_BITS_RATIO, Requirement, Rows, at_most
from revdeq_lightning.data.puzzles.kinds import Mazes
from revdeq_lightning.models import ReasonerConfig
from revdeq_lightning.models.build import SolverConfig, build_reasoner

BASE, EVALUATIONS = 4, (16, 32, 64, 128)
MORE = (BASE, 512)
KEPT = mazes.SETTINGS["model"]["solver"]["reversible_stored_evaluations"]
AS_CONFIGURED = f"{EXACT}, {KEPT} evaluations stored"
MORE_FOR = (EXACT, PAPER, AS_CONFIGURED, STORED)
"""Gradients that are also measured with `MORE` evaluations."""


def variants(evaluations: int, changes: Mapping[str, Any] | None = None) -> dict[str, Variant]:
    """The competitors, and the configuration as it is: it stores evaluations to save time."""
    found = mazes.variants(evaluations, changes)
    stored = {"model.solver.reversible_stored_evaluations": KEPT}
    return found | {AS_CONFIGURED: found[EXACT]._replace(changes=found[EXACT].changes | stored)}


def training_step(name: str, evaluations: int, changes: Mapping[str, Any] | None) -> tuple[Callable[[], Any], int]:
    """Forward and backward pass of a batch of mazes, and the elements of its state."""
    variant = variants(evaluations, changes)[name]
    settings = settings_of(variant.configs, variant.changes)
    data, network = settings["data"], settings["model"]["network"]
    shape = Mazes("mixed", 0.0).shape(data["size"])
    torch.manual_seed(0)
    inputs, targets = (torch.randint(n, (data["batch_size"], *shape)) for n in (Mazes.num_symbols, Mazes.num_answers))
    config = ReasonerConfig(num_symbols=Mazes.num_symbols, num_answers=Mazes.num_answers, shape=list(shape), **network)
    model = build_reasoner(config, SolverConfig(**settings["model"]["solver"]))

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(inputs).logits, targets), list(model.parameters()))

    return step, network["channels"] * inputs.numel()


def measure(quick: bool) -> list[dict[str, Any]]:
    changes = TINY if quick else None
    rows = []
    for evaluations in (BASE, 8) if quick else sorted({*EVALUATIONS, *MORE}):
        for name in MORE_FOR if quick or evaluations in MORE else variants(evaluations):
            step, elements = training_step(name, evaluations, changes)
            training_step(name, BASE, changes)[0]()  # exclude what torch allocates once and keeps
            found = {"gradient": name, "evaluations": evaluations, "bytes": peak_tensor_bytes(step)}
            rows.append(found | {"state_elements": elements})
    return rows


def judge(rows: Rows) -> list[Requirement]:
    """Memory grows by no more than the bits of the remainders."""
    verdict = []
    for name, promise in ((EXACT, PROMISES[2]), (PAPER, PROMISES[0])):
        own = {row["evaluations"]: row for row in rows if row["gradient"] == name}
        base = own[BASE]
        bits = [
            8 * (row["bytes"] - base["bytes"]) / row["state_elements"] / (n - BASE)
            for n, row in own.items()
            if n > BASE
        ]
        what = f"{name}: growth, bits per element of the state and evaluation"
        verdict.append(at_most(what, max(bits), MAX_BITS_RATIO * math.log2(promise.radix), "{:.2f}"))
    return verdict


def page(rows: Rows) -> list[str]:
    """Gradients down, evaluations across, MiB."""
    lines: dict[str, dict[str, Any]] = {}
    counts = sorted({row["evaluations"] for row in rows})
    for row in rows:
        line = lines.setdefault(row["gradient"], {"gradient": row["gradient"], **dict.fromkeys(map(str, counts))})
        line[str(row["evaluations"])] = f"{row['bytes'] / 2**20:.1f}"
    return [
        "Peak of the tensors of one training step of `configs/reasoning/mazes.yaml` (16 mazes of 11 x 11 pixels), MiB,"
        " by evaluations of f; for explicit stacks by layers, whose weights have gradients of their own. Momentum and"
        " BPTT make the same iteration, the exact state in integers, BPTT in float32. The configuration itself stores"
        f" {KEPT} evaluations, which saves time.",
        part.markdown_table(list(lines.values())),
    ]


def run(options: argparse.Namespace) -> part.Result:
    rows = measure(options.quick)
    return part.Result({"": rows}, judge(rows), page(rows))


main = part.command("quality.reasoning_memory", "Memory of a training step on mazes", __doc__, run)

if __name__ == "__main__":
    sys.exit(main())
