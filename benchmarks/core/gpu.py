"""What a GPU does with the core: tests, exactness, overhead, whole training steps. One command, at most 8 minutes.

    python -m benchmarks.core.gpu [--seconds 450] [--quick] [--output DIR]

1. The tests that need a CUDA device.
2. Exactness at full size, where other kernels run than in the tests: elements of z0 that a backward pass does not
   reconstruct, block x precision of f x solver.
3. Overhead: a solve and its backward pass over its bare evaluations of f (each once plain, once with its products), for
   the language model's block and the three stages of configs/cifar10/modern.yaml, under bfloat16 autocast.
4. Training steps of the language model and the classifier, with Muon: the bare evaluations, exact, stored and
   checkpointed backpropagation through time (BPTT), and an explicit model.

Milliseconds are medians of the wall clock: until the device has finished, and until the host has issued everything.
Utilization is the operations of the iteration and its derivative, without repeated evaluations, by the device's peak.
Each section has a share of the time; what no longer fits is not measured. `--quick` runs tiny sizes, also on a CPU.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import part
from benchmarks.core.gpu_steps import SHARES, Bench, Rows, Sizes, steps
from benchmarks.core.reference import bare_evaluations
from benchmarks.measure import paired_ratio, time_interleaved
from benchmarks.requirements import Requirement, at_most
from revdeq_lightning.equilibrium import (
    EquilibriumLayer,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.classifier import ModernConvBlock, PaperConvBlock
from revdeq_lightning.models.transformer_blocks import ModernBlock, PaperBlock

MAX_OVERHEAD_LANGUAGE, MAX_OVERHEAD_IMAGES = 1.05, 1.15


class PyTorchAttention(nn.Module):
    """`f(z, x)` with `nn.MultiheadAttention`, which autocast treats in its own way."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(dim, num_heads, batch_first=True), nn.LayerNorm(dim)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = self.norm(z + x)
        value: Tensor = 0.5 * h + self.attention(h, h, h, need_weights=False)[0]
        return value


def blocks(sizes: Sizes) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Blocks and the shapes of their states."""

    def transformer(block: type[nn.Module], num_heads: int) -> Callable[[], nn.Module]:
        name = "paper" if block is PaperBlock else "modern"
        settings: dict[str, Any] = {"vocab_size": 2, "context_length": sizes.context, "d_model": sizes.dim}
        return lambda: block(TransformerConfig(**settings, num_heads=num_heads, block=name))

    text = (min(sizes.batch, 8), sizes.context, sizes.dim)
    images = (min(sizes.images, 32), sizes.channels[0], sizes.pixels, sizes.pixels)
    few_heads = max(1, sizes.dim // 192)
    return {
        "language, modern": (transformer(ModernBlock, sizes.num_heads), text),
        "language, paper": (transformer(PaperBlock, sizes.num_heads), text),
        f"language, modern, heads of {sizes.dim // few_heads}": (transformer(ModernBlock, few_heads), text),
        "nn.MultiheadAttention": (lambda: PyTorchAttention(sizes.dim, sizes.num_heads), text),
        "convolution, modern": (lambda: ModernConvBlock(sizes.channels[0], 1, 0.05, 16), images),
        "convolution, paper": (lambda: PaperConvBlock(sizes.channels[0], 3), images),
    }


def block_and_input(bench: Bench, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """A block on the device, convolutions in channels_last; no weight is zero, as some are initially."""
    torch.manual_seed(0)
    f = make()
    for p in f.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.5 / p[0].numel() ** 0.5)
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x = torch.randn(shape, device=bench.device).contiguous(memory_format=order)
    return f.to(bench.device, memory_format=order), x.requires_grad_()


def exactness(bench: Bench) -> Iterator[dict[str, Any]]:
    n = bench.num_evaluations
    for name, (make, shape) in blocks(bench.sizes).items():
        for is_bfloat16 in (True, False):
            solvers: tuple[Any, ...] = (MomentumSolver(max_steps=n), ReversibleSolver(max_steps=n // 2))
            for solver in solvers:
                if not bench.has_time("exactness"):
                    return
                f, x = block_and_input(bench, make, shape)
                layer = EquilibriumLayer(f, solver=solver, adjoint=ReversibleAdjoint(mismatch="ignore"))
                with bench.autocast(is_bfloat16):
                    solution = layer(x)
                solution.value.float().square().mean().backward()
                yield {
                    "block": name,
                    "f in": "bfloat16" if is_bfloat16 else "float32",
                    "solver": type(solver).__name__,
                    "elements not reconstructed": int(solution.stats.reconstruction_mismatch),
                    "of": 2 * x.numel(),
                }


def overhead(bench: Bench) -> Iterator[dict[str, Any]]:
    """Times of solves and of their bare evaluations, interleaved."""
    sizes, n = bench.sizes, bench.num_evaluations
    language, (_, context, dim) = blocks(sizes)["language, modern"]
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
        (f"language, {batch} x {context}", language, (batch, context, dim)) for batch in {sizes.batch, 4}
    ]
    for stage, channels in reversed(list(enumerate(sizes.channels))):  # the one that is judged first
        side = sizes.pixels >> stage
        shape = (sizes.images, channels, side, side)
        cases.append((f"convolution, {channels} channels", lambda c=channels: ModernConvBlock(c, 1, 0.05, 16), shape))  # type: ignore[misc]
    for name, make, shape in cases:
        if not bench.has_time("overhead"):
            return
        f, x = block_and_input(bench, make, shape)
        layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=n))
        sources = [x, *f.parameters()]

        def solve(layer: nn.Module = layer, x: Tensor = x, sources: Sequence[Tensor] = sources) -> None:
            torch.autograd.grad(layer(x).value, sources, x.detach())

        def bare(f: Any = f, x: Tensor = x, sources: Sequence[Tensor] = sources) -> None:
            bare_evaluations(f, x, x, sources[1:], n)

        with bench.autocast():
            timings = time_interleaved({"": solve, "bare": bare}, bench.rounds, bench.warmup, bench.synchronize)
        ours, theirs = timings[""].wall_seconds, timings["bare"].wall_seconds
        ratio = paired_ratio(ours, theirs)
        yield {
            "case": name,
            "ms": 1e3 * statistics.median(ours),
            "ms of the bare evaluations": 1e3 * statistics.median(theirs),
            "over bare evaluations": ratio.median,
            "lower quartile": ratio.lower,
            "upper quartile": ratio.upper,
        }


def cuda_tests(seconds: float) -> tuple[str, bool]:
    """The last line of the tests that need a CUDA device, and whether they passed."""
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.cuda" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4"]  # most of the time goes to the compiler
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s", False
    print(result.stdout, flush=True)
    return (result.stdout.strip().splitlines() or [result.stderr[-200:]])[-1], result.returncode == 0


def judge(bench: Bench, tests: tuple[str, bool] | None, tables: dict[str, Rows]) -> list[Requirement]:
    """The requirements; exactness is judged everywhere, times and tests on a GPU only."""
    is_judged = bench.on_gpu and not bench.quick
    verdict = [Requirement("CUDA tests", "all pass", *(tests or ("no GPU", False)), is_judged)]
    wrong = sum(row["elements not reconstructed"] > 0 for row in tables["exactness"])
    what = f"inexact gradients, of {len(tables['exactness'])}"
    verdict.append(Requirement(what, "0", str(wrong), bool(tables["exactness"]) and not wrong))
    widest = max(bench.sizes.channels)
    for name, key, limit in (
        ("language model", f"language, {bench.sizes.batch} x", MAX_OVERHEAD_LANGUAGE),
        ("widest convolution stage", f"convolution, {widest} channels", MAX_OVERHEAD_IMAGES),
    ):
        found = [row["over bare evaluations"] for row in tables["overhead"] if row["case"].startswith(key)]
        best = min(found, default=float("inf"))
        verdict.append(at_most(f"{name}: time over bare evaluations", best, limit, "{:.3f}", is_judged))
    return verdict


def page(bench: Bench, tables: dict[str, Rows]) -> list[str]:
    if bench.on_gpu:
        cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
        where = f"On {torch.cuda.get_device_name()}, CUDA {cuda}, cuDNN {cudnn}."
    else:
        where = (
            "No GPU has run this yet: these are tiny sizes on a CPU, which show that the program works; no time counts."
        )
    titles = {"exactness": "Exactness", "overhead": "Overhead", "steps": "Training steps"}
    sections = [(f"## {titles[name]}", part.markdown_table(rows)) for name, rows in tables.items() if rows]
    return [where, *(text for section in sections for text in section)]


def run(options: argparse.Namespace) -> part.Result:
    bench = Bench(options.seconds, options.quick)
    if not (bench.on_gpu or bench.quick):
        raise part.Skipped("this machine has no CUDA device; --quick runs tiny sizes on the CPU")
    tests = cuda_tests(SHARES["tests"] * options.seconds) if bench.on_gpu else None
    tables: dict[str, Rows] = {"exactness": [], "overhead": [], "steps": []}
    for name, section in (("exactness", exactness), ("overhead", overhead), ("steps", steps)):
        for row in section(bench):
            tables[name].append(row)
            print(row, flush=True)
    return part.Result({k: v for k, v in tables.items() if v}, judge(bench, tests, tables), page(bench, tables))


SECONDS = {"type": float, "default": 450.0, "help": "time for all sections"}
main = part.command("core.gpu", "On a GPU", __doc__, run, options={"--seconds": SECONDS})

if __name__ == "__main__":
    sys.exit(main())
