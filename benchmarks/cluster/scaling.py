"""Time and memory of a process on 8 to 1,024 GPUs: `python -m benchmarks.cluster.scaling [--measure]`.

See `../scaling.md`.

Counts (parameters, operations, bytes) are taken from the models themselves, and the time to issue a step is measured on
this machine; for GPUs, the model of `scaling.md` applies, with the constants below. Writes `results/scaling.md`.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cluster.issuing import issue
from benchmarks.measure import provenance
from benchmarks.part import RESULTS
from benchmarks.quality.budget import settings_of
from revdeq_lightning.equilibrium import EquilibriumLayer
from revdeq_lightning.models import ClassifierConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier, build_language_model
from revdeq_lightning.tasks.optimizers import group_parameters

PAGE = RESULTS / "scaling.md"
GPUS_A_NODE = 8
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
PEAK = 989e12  # operations/s, bfloat16 dense; NVIDIA's data sheet of the H100 SXM
UTILIZATION = {"tokens": 0.40, "images": 0.11}  # fraction of PEAK on filled GPUs; measured by others, see scaling.md
NVLINK, NETWORK = 370.8e9, 46e9  # bytes/s per GPU and direction that NCCL reaches, of 450 and 50; see scaling.md
BASE, INTRA, INTER = 8.4e-6, 3.4e-6, 14e-6  # seconds, protocol Simple; NCCL, src/graph/tuning.cc
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # bytes that DDP reduces at a time (defaults)
IMAGE_BYTES = 115e3  # per JPEG file: ImageNet's 1.28 M training images take about 148 GB


@dataclasses.dataclass
class Counted:
    """Counts of a model, per sample (a sequence or an image)."""

    name: str
    batch_size: int
    unit: str
    units: int
    parameters: int
    layers: list[int]
    matrices: int
    averaged: bool
    muon: bool
    read_bytes: float
    flops: float = 0.0
    kept_bytes: float = 0.0
    issue_seconds: float = 0.0
    operations: int = 0

    @property
    def in_layers(self) -> int:
        return sum(self.layers)


def load(path: Path) -> tuple[Counted, nn.Module, Any]:
    """The model of a configuration for its data, its counts, and one sample."""
    settings = settings_of([str(path)])
    solver = SolverConfig(**settings["model"]["solver"])
    data, network = settings["data"], settings["model"]["network"]
    torch.manual_seed(0)
    if "context_length" in data:
        length = data["context_length"]
        model: Any = build_language_model(TransformerConfig(50304, length, **network), solver)
        tokens = torch.randint(50304, (1, length + 1))
        sample: Any = (tokens[:, :-1], tokens[:, 1:])
        what = ("tokens", length, 2.0 * length)
    else:
        model = build_image_classifier(ClassifierConfig(num_classes=1000, **network), solver)
        sample = (torch.randn(1, 3, data["image_size"], data["image_size"]),)
        what = ("images", 1, IMAGE_BYTES)
    layers = [m for m in model.modules() if isinstance(m, EquilibriumLayer)]
    matrices, *_ = group_parameters(model)
    counted = Counted(
        name=str(path),
        batch_size=data["batch_size"],
        unit=what[0],
        units=what[1],
        parameters=count(model.parameters()),
        layers=[count(layer.parameters()) for layer in layers],
        matrices=count(matrices),
        averaged=settings["model"]["optimizer"].get("ema_decay", 0) > 0,
        muon=settings["model"]["optimizer"]["optimizer"] == "muon",
        read_bytes=what[2],
    )
    return counted, model, sample


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


@contextmanager
def saved(exclude: nn.Module) -> Iterator[dict[int, int]]:
    """Context in which the bytes of each storage that autograd keeps are recorded, except parameters."""
    own = {p.untyped_storage()._cdata for p in exclude.parameters()}
    kept: dict[int, int] = {}
    tensors: list[Tensor] = []  # kept alive, so that no storage's address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def take_counts(counted: Counted, model: Any, sample: Any) -> None:
    """Count operations of a training step and bytes kept for its backward pass, both per sample.

    Backward pass: f is evaluated again at each state (1) and differentiated (2); the rest is only differentiated.
    """
    seen: list[tuple[EquilibriumLayer, Any, Any]] = []
    layers = [m for m in model.modules() if isinstance(m, EquilibriumLayer)]

    def note(layer: Any, args: Any, output: Any) -> None:
        seen.append((layer, args[0], output))

    handles = [layer.register_forward_hook(note) for layer in layers]
    # Batch normalization needs more than one value per channel, so use its running statistics.
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as forward, saved(model) as kept:
        (model.loss(*sample).loss if len(sample) == 2 else model(*sample).logits_BV.sum()).detach()
    in_solves, largest = 0.0, 0.0
    for layer, x, solution in seen:
        with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as once, saved(model) as of_f:
            layer.f(solution.value.detach(), x.detach())
        in_solves += once.get_total_flops() * solution.stats.forward_nfe
        largest = max(largest, sum(of_f.values()))
    for handle in handles:
        handle.remove()
    counted.flops = 3 * (forward.get_total_flops() - in_solves) + 4 * in_solves
    counted.kept_bytes = sum(kept.values()) + largest


def memory(c: Counted, ranks: int, strategy: str, batch: float) -> float:
    """Bytes per process: parameters, gradients, optimizer state, averages, and the batch."""
    adam = c.parameters - c.matrices if c.muon else c.parameters
    state = 4 * (2 * c.parameters + 2 * adam + (c.matrices if c.muon else 0) + (c.parameters if c.averaged else 0))
    if strategy == "fsdp2":
        state = (
            state / ranks + 8 * c.parameters
        )  # gathered parameters and their gradients, at most of all units at once
    return state + batch * c.kept_bytes


def gather(num_bytes: float, ranks: int) -> float:
    """Seconds of an all-gather or reduce-scatter by ring: its steps grow with the ranks."""
    nodes = max(1, ranks // GPUS_A_NODE)
    return BASE + (ranks - nodes) * INTRA + (nodes - 1) * INTER + (ranks - 1) / ranks * num_bytes / bandwidth(nodes)


def all_reduce(num_bytes: float, ranks: int) -> float:
    """Seconds of an all-reduce by tree: its steps grow with the logarithm of the nodes."""
    nodes, gpus = max(1, ranks // GPUS_A_NODE), min(ranks, GPUS_A_NODE)
    latency = BASE + 2 * ((gpus - 1) * INTRA + math.log2(nodes) * INTER)
    return latency + 2 * (ranks - 1) / ranks * num_bytes / bandwidth(nodes)


def bandwidth(nodes: int) -> float:
    """Bytes/s per GPU: data crosses each node's boundary once, in parallel over all of its ports."""
    return NVLINK if nodes == 1 else min(NVLINK, GPUS_A_NODE * NETWORK)


def communication(c: Counted, ranks: int, strategy: str) -> float:
    """Seconds that are not overlapped: a layer's gradients arrive together at the end of its backward pass."""
    if strategy == "ddp":
        buckets = 1 + math.ceil((4 * c.parameters - FIRST_BUCKET) / BUCKET)
        return buckets * all_reduce(4 * c.parameters / buckets, ranks)
    return 3 * sum(gather(4 * p, ranks) for p in c.layers) + 2 * gather(4 * (c.parameters - c.in_layers), ranks)


def compute(c: Counted, batch: float) -> float:
    """Seconds of a step without communication: computing on the GPU or issuing on the host, whichever is longer."""
    return max(batch * c.flops / (UTILIZATION[c.unit] * PEAK), c.issue_seconds)


def table(c: Counted, *, strong: bool) -> list[str]:
    """Rows of a configuration, with a constant global batch (strong) or a constant batch per GPU (weak)."""
    lines = [
        f"| GPUs | {c.unit} per GPU | ms of GPU | ms per step, DDP | efficiency | ms per step, FSDP2 | efficiency"
        " | GiB DDP | GiB FSDP2 | read |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        batch = c.batch_size * RANKS[0] / ranks if strong else c.batch_size
        if batch < 1:
            break
        # A single GPU with the whole global batch in one step, or with the batch of each GPU.
        alone = compute(c, batch * ranks) / ranks if strong else compute(c, batch)
        busy = batch * c.flops / (UTILIZATION[c.unit] * PEAK)
        cells = [f"{ranks:,}", f"{batch * c.units:,.0f}", f"{1e3 * busy:.1f}"]
        for strategy in ("ddp", "fsdp2"):
            seconds = compute(c, batch) + communication(c, ranks, strategy)
            cells += [f"{1e3 * seconds:.1f}", f"{alone / seconds:.0%}"]
        cells += [f"{memory(c, ranks, s, batch) / 2**30:.1f}" for s in ("ddp", "fsdp2")]
        rate = ranks * batch * c.read_bytes / (compute(c, batch) + communication(c, ranks, "ddp"))
        cells.append(f"{rate / 1e9:.2g} GB/s" if rate < 1e11 else f"{rate / 1e9:.0f} GB/s")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured() -> list[str]:
    """Time one and two processes on this machine's CPU, each with the same batch and the task of the command line."""
    from benchmarks.cluster.scaling_point import STEPS, WARMUP

    load, results = os.getloadavg()[0], {}
    for ranks in (1, 2):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cluster.scaling_point", str(ranks)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[ranks] = [float(word) for word in output.split()[-3:]]
    rows = []
    for ranks, (seconds, reduce_seconds, num_bytes) in results.items():
        rows.append(f"| {ranks} | {1e3 * seconds:.0f} | {1e3 * reduce_seconds:.1f} | {num_bytes / 1e6:.1f} |")
    efficiency = results[1][0] / results[2][0]
    hardware = provenance("")["hardware"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return [
        f"Measured {time.strftime('%Y-%m-%d')}, gloo, `configs/lm/default.yaml`'s model and batch in each process,"
        f" median of {STEPS} steps after {WARMUP}: efficiency {efficiency:.0%}. {hardware['cpu']},"
        f" {hardware['cores']} cores, torch"
        f" {torch.__version__}, commit {commit or 'unknown'}; other processes: load {load:.1f} at the start"
        " (the times are meaningful only if it is close to 0).",
        "",
        "| processes | ms per step | ms of an all-reduce of the gradients alone | MB |",
        "|---|---|---|---|",
        *rows,
    ]


def reading(c: Counted, image_size: int) -> list[str]:
    """Images decoded by one core of this machine, and the number of cores that a node of GPUs needs."""
    from benchmarks.cluster.decoding import HEIGHT, IMAGES, WIDTH, decode

    speed, file_bytes = decode(c.read_bytes, image_size)
    step = compute(c, c.batch_size) + communication(c, GPUS_A_NODE, "ddp")
    wanted = GPUS_A_NODE * c.batch_size / step
    return [
        f"One core reads, decodes, crops and resizes {speed:.0f} images per second (JPEG files of {WIDTH} x {HEIGHT}"
        f" pixels and {file_bytes / 1e3:.0f} kB to {image_size} pixels; processor time, {IMAGES} files that the system"
        f" holds in memory). Eight GPUs need {wanted:,.0f}: {wanted / speed:.0f} such cores.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="also time processes and decoding on this CPU")
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    lines = [
        "<!-- Written by `python -m benchmarks.cluster.scaling`; the model and its constants: ../scaling.md -->",
        "",
    ]
    for path in (Path("configs/lm/wikitext103.yaml"), Path("configs/imagenet/modern.yaml")):
        counted, model, sample = load(path)
        counted.issue_seconds, counted.operations = issue(settings_of([str(path)]))
        take_counts(counted, model, sample)
        lines += [
            f"## {path}",
            "",
            f"{counted.parameters / 1e6:.1f} M parameters, {counted.in_layers / 1e6:.1f} M of them in equilibrium"
            f" layers; {counted.flops / counted.units / 1e9:.2f} GFLOP and"
            f" {counted.kept_bytes / counted.units / 2**20:.2f} MiB per {counted.unit.removesuffix('s')} in a training"
            f" step. A step consists of {counted.operations:,} PyTorch operations, which one core of this machine"
            f" issues in {1e3 * counted.issue_seconds:.0f} ms.",
            "",
            f"Constant batch of {counted.batch_size} per GPU (the global batch grows):",
            "",
            *table(counted, strong=False),
            "",
            f"Constant global batch of {counted.batch_size * RANKS[0]:,}:",
            "",
            *table(counted, strong=True),
            "",
        ]
    if arguments.measure:
        lines += ["## On this machine", "", *measured(), "", *reading(counted, sample[0].shape[-1])]
    arguments.output.write_text("\n".join(lines).rstrip() + "\n")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
