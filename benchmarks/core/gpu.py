"""What a GPU does with the core: tests, exactness, overhead, whole training steps. One command, at most 8 minutes.

    python -m benchmarks.core.gpu [--seconds 450] [--quick] [--output DIR]

1. The tests that need a CUDA device.
2. Exactness at full size, where other kernels run than in the tests: elements of z0 that a backward pass does not
   reconstruct, block x precision of f x solver x mode.
3. Overhead: a solve and its backward pass over its bare evaluations of f (each once plain, once with its products), for
   the language model's block and the three stages of configs/cifar10/modern.yaml, under bfloat16 autocast.
4. Training steps of the language model and the classifier, with Muon: the bare evaluations, exact, stored and
   checkpointed backpropagation through time (BPTT), and an explicit model.

Milliseconds are medians of the wall clock: until the device has finished, and until the host has issued everything.
Utilization is the operations of the iteration and its derivative, without repeated evaluations, by the device's peak.
Each section has a share of the time; what no longer fits is not measured. `--quick` runs tiny sizes, also on a CPU.
"""

import argparse
import contextlib
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import part
from benchmarks.core.kernels import _synchronizations as count_waits
from benchmarks.core.reference import bare_evaluations
from benchmarks.measure import paired_ratio, time_interleaved
from benchmarks.requirements import Requirement, at_most
from revdeq_lightning.callbacks.peaks import peak_flops
from revdeq_lightning.equilibrium import (
    EquilibriumLayer,
    FixedPointSolution,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.models import ClassifierConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier, build_language_model
from revdeq_lightning.models.classifier import ModernConvBlock, PaperConvBlock
from revdeq_lightning.models.transformer import ModernBlock, PaperBlock
from revdeq_lightning.tasks.optimizers import OptimizerConfig, build_optimizer

NUM_EVALUATIONS = 8
MAX_OVERHEAD_LANGUAGE, MAX_OVERHEAD_IMAGES = 1.05, 1.15
SHARES = {"tests": 0.35, "exactness": 0.6, "overhead": 0.78, "steps": 0.95}
"""Fractions of the time at which each section must end."""
Rows = list[dict[str, Any]]


class Sizes(NamedTuple):
    """Of the blocks and models."""

    dim: int = 768
    num_heads: int = 12
    context: int = 448
    batch: int = 32
    vocabulary: int = 50304
    channels: tuple[int, ...] = (128, 256, 512)
    images: int = 128
    pixels: int = 32


TINY = Sizes(32, 2, 16, 2, 64, (16, 32, 48), 2, 16)


class Bench:
    """The device, the sizes, and the time that is left."""

    def __init__(self, seconds: float, quick: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu, self.quick = self.device.type == "cuda", quick
        self.num_evaluations = 2 if quick else NUM_EVALUATIONS
        self.sizes, self.rounds, self.warmup = (TINY, 2, 1) if quick else (Sizes(), 8, 3)
        self.start, self.seconds = time.monotonic(), seconds

    def has_time(self, section: str) -> bool:
        """Whether the section may measure another row."""
        return time.monotonic() - self.start < SHARES[section] * self.seconds

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def autocast(self, is_bfloat16: bool = True) -> contextlib.AbstractContextManager[Any]:
        """As in training with bf16-mixed."""
        kind, dtype = self.device.type, torch.bfloat16
        return torch.autocast(kind, dtype, cache_enabled=False) if is_bfloat16 else contextlib.nullcontext()


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


class _Evaluations(torch.autograd.Function):
    """f n times plain and n times with its products: what a reversible step cannot do without, and nothing else."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, n: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.f, ctx.n = f, n
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        ctx.save_for_backward(x)
        for _ in range(n):
            value = f(x, x)
        result: Tensor = value.to(x.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), parameters = ctx.saved_tensors, list(ctx.f.parameters())
        for _ in range(ctx.n):
            with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, ctx.autocast, cache_enabled=False):
                z, y = x.detach().requires_grad_(), x.detach().requires_grad_()
                value = ctx.f(z, y)
            _, *products = torch.autograd.grad(value, [z, y, *parameters], grads[0].to(value.dtype))
        return None, None, *products


class BareLayer(nn.Module):
    """In place of an `EquilibriumLayer`."""

    def __init__(self, layer: EquilibriumLayer) -> None:
        super().__init__()
        self.f, self.solver, self.num_parts = layer.f, layer.solver, 1

    def forward(self, x: Tensor, z0: Any = None) -> FixedPointSolution:
        """The value of the last evaluation; there are no statistics."""
        n = self.solver.max_steps * self.solver.evaluations_per_step  # type: ignore[attr-defined]
        return FixedPointSolution(_Evaluations.apply(self.f, n, x, *self.f.parameters()), None)  # type: ignore[arg-type]


def language_step(bench: Bench, solver: SolverConfig) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model of configs/lm/wikitext103_modern.yaml and its loss; the explicit one has as many layers."""
    s = bench.sizes
    sizes: dict[str, Any] = {"vocab_size": s.vocabulary, "context_length": s.context, "d_model": s.dim}
    sizes |= {"num_heads": s.num_heads, "d_mlp": 4 * s.dim, "block": "modern"}
    sizes["num_layers"] = bench.num_evaluations if solver.solver == "none" else 1
    model: Any = build_language_model(TransformerConfig(**sizes), solver).to(bench.device)
    tokens = torch.randint(s.vocabulary, (s.batch, s.context + 1), device=bench.device)
    return model, lambda: model.loss(tokens[:, :-1], tokens[:, 1:]).loss


def image_step(bench: Bench, solver: SolverConfig) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model of configs/cifar10/modern.yaml and its loss; the explicit one is a ResNet-18."""
    s = bench.sizes
    channels: list[int] = list(s.channels)
    architecture = {"architecture": "resnet", "channels": [channels[0] // 2, *channels]}
    network = architecture if solver.solver == "none" else {"channels": channels, "dropout": 0.05}
    model = build_image_classifier(ClassifierConfig(10, **network), solver)  # type: ignore[arg-type]
    model.to(bench.device, memory_format=torch.channels_last)
    images = torch.randn(s.images, 3, s.pixels, s.pixels, device=bench.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (s.images,), device=bench.device)
    return model, lambda: F.cross_entropy(model(images).logits_BV.float(), labels)


def training_step(
    bench: Bench, build: Callable[..., Any], solver: SolverConfig, bare: bool = False
) -> Callable[[], None]:
    """A step as in training, with Muon under bfloat16 autocast."""
    torch.manual_seed(0)
    model, loss = build(bench, solver)
    for module in list(model.modules()) if bare else []:
        for name, child in module.named_children():
            if isinstance(child, EquilibriumLayer):
                setattr(module, name, BareLayer(child))
    optimizer = build_optimizer(model, OptimizerConfig(optimizer="muon"))

    def step() -> None:
        with bench.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(bench: Bench) -> Iterator[dict[str, Any]]:
    n, exact = bench.num_evaluations, SolverConfig(max_steps=bench.num_evaluations)
    cases = {
        "bare evaluations": exact,
        "exact": exact,
        "exact, half of the evaluations stored": SolverConfig(max_steps=n, reversible_stored_evaluations=n // 2),
        "stored BPTT": SolverConfig(max_steps=n, adjoint="backprop"),
        "checkpointed BPTT": SolverConfig(max_steps=n, adjoint="backprop", checkpoint=True),
        "explicit model": SolverConfig(solver="none"),
    }
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if bench.on_gpu else None
    for task, build in (("language model", language_step), ("classifier", image_step)):
        counter = FlopCounterMode(display=False)
        if peak:
            with counter:
                training_step(bench, build, cases["stored BPTT"])()
        for case, solver in cases.items():
            if not bench.has_time("steps"):
                return
            step = training_step(bench, build, solver, bare=case == "bare evaluations")
            explicit = case == "explicit model"  # with other operations
            yield {
                "task": task,
                "case": case,
                **measure(bench, step, 0 if explicit else counter.get_total_flops(), peak),
            }


def measure(bench: Bench, step: Callable[[], None], flops: float, peak: float | None) -> dict[str, Any]:
    """Time of device and host, peak of the memory, utilization, and waits of the host, of one step."""
    for _ in range(bench.warmup):
        step()
    seconds, host = [], []
    if bench.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(bench.rounds):
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        bench.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "ms": 1e3 * median,
        "host ms": 1e3 * statistics.median(host),
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if bench.on_gpu else None,
        "utilization": flops / median / peak if peak and flops else None,
        "waits": count_waits(step) if bench.on_gpu else None,
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
