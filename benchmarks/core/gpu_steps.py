"""The device, sizes, and time of `benchmarks.core.gpu`, and whole training steps on it."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revdeq_lightning.callbacks.peaks import peak_flops
from revdeq_lightning.equilibrium import EquilibriumLayer, FixedPointSolution
from revdeq_lightning.models import ClassifierConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier, build_language_model
from revdeq_lightning.tasks.optimizers import OptimizerConfig, build_optimizer

NUM_EVALUATIONS = 8
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


def count_waits(step: Callable[[], Any]) -> int:
    """Number of times the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
