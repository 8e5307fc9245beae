"""Cost of a reversible step besides f: update, inverse, remainders, conversions, residual.

    python -m benchmarks.core.kernels [--quick] [--device cpu|cuda] [--output DIR]

On CUDA the paper's sizes (language model: d 768, context 448, batch 32, f under bfloat16 autocast; classifier: 256
channels, width 3, batch 64), on a CPU smaller ones in float32. Times: wall clock with synchronization on CUDA, CPU time
of one thread on a CPU. Percentages are relative to the two evaluations of f that a reversible method makes per
evaluation: one plain, one with its vector-Jacobian products.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import part
from benchmarks.core.reference import bare_evaluations
from benchmarks.measure import paired_ratio, peak_tensor_bytes, time_interleaved
from benchmarks.requirements import MAX_BITS_RATIO, Requirement, at_most
from revdeq_lightning.equilibrium import ReversibleAdjoint, ReversibleSolver, solve_fixed_point
from revdeq_lightning.equilibrium.norms import extremes, residual
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.classifier import PaperConvBlock
from revdeq_lightning.models.transformer_blocks import PaperBlock

STEPS = (4, 8, 16)
MAX_OVERHEAD, MAX_SYNCHRONISATIONS = 1.05, 0
RADIX = {"language": 2, "classifier": 5}  # of the remainders, by the case's beta
REPEATS = 4
Kernel = Callable[[], Any]


class Case(NamedTuple):
    """A block with the shape of its state."""

    name: str
    f: nn.Module
    shape: tuple[int, ...]
    beta: float
    autocast: bool


def cases(device: str, quick: bool) -> list[Case]:
    """Language model and classifier in sizes for the device."""
    large = device == "cuda" and not quick
    dim, heads, context, batch = (768, 12, 448, 32) if large else (32, 2, 16, 2) if quick else (256, 8, 128, 8)
    channels, images, size = (256, 64, 16) if large else (16, 2, 8) if quick else (64, 16, 16)
    config = TransformerConfig(
        vocab_size=2, context_length=context, d_model=dim, num_heads=heads, block="paper", double_projection=True
    )
    torch.manual_seed(0)
    return [
        Case(f"language, d {dim}, {batch} x {context}", PaperBlock(config), (batch, context, dim), 0.5, large),
        Case(
            f"classifier, {channels} channels, {images} x {size} x {size}",
            PaperConvBlock(channels, 3),
            (images, channels, size, size),
            0.8,
            False,
        ),
    ]


def kernels(case: Case, device: str) -> dict[str, Kernel]:
    """The operations of one evaluation, forward and backward, by part."""
    solver = ReversibleSolver(beta=case.beta)
    arithmetic = solver.state_arithmetic([torch.float32])
    value, z = (torch.randn(case.shape, device=device) for _ in range(2))
    state, current = arithmetic.encode(z), arithmetic.encode(value)
    remainders = arithmetic.remainders()
    assert remainders is not None
    digits = torch.zeros_like(state)
    g_current, g_previous = (torch.randn_like(z) for _ in range(2))

    def update_and_inverse() -> None:
        arithmetic.invert_(arithmetic.advance(state, current, value, remainders), current, value, remainders)

    def store_and_take() -> None:
        remainders.push(digits)
        remainders.pop()

    return {
        "update and inverse": update_and_inverse,
        "of these, remainders": store_and_take,
        "gradient's recurrence": lambda: solver.carry_([g_previous], [g_current], [value]),
        "conversion to f's precision, twice": lambda: [arithmetic.decode(current, z.dtype) for _ in range(2)],
        "range of the state": lambda: extremes([value, current]),
        "residual (once a solve)": lambda: residual([value], [z]),
    }


def measure(device: str, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Tables `parts` (each kernel) and `solve` (overhead, memory, and synchronizations of complete solves)."""
    tables: dict[str, list[dict[str, Any]]] = {"parts": [], "solve": []}
    rounds = 2 if quick else 9
    for case in cases(device, quick)[: 1 if quick else None]:
        f = case.f.to(device)
        x = torch.randn(case.shape, device=device)
        context = torch.autocast(device, torch.bfloat16) if case.autocast else nullcontext()
        with warnings.catch_warnings(), context:
            warnings.filterwarnings("ignore", module="torch")  # the compiler's hints
            tables["parts"] += _parts(case, f, x, device, rounds)
            tables["solve"] += _solves(case, f, x, device, rounds)
    return tables


def _parts(case: Case, f: nn.Module, x: Tensor, device: str, rounds: int) -> list[dict[str, Any]]:
    x.requires_grad_()
    parameters = list(f.parameters())
    parts = kernels(case, device)
    runs = {key: lambda kernel=kernel: [kernel() for _ in range(REPEATS)] for key, kernel in parts.items()}  # type: ignore[misc]
    bare = "f"
    seconds = _seconds({**runs, bare: lambda: bare_evaluations(f, x, x, parameters, REPEATS)}, device, rounds)
    rows = []
    for name in parts:
        own = seconds[name]
        row = {"case": case.name, "part": name, "milliseconds": 1e3 * sorted(own)[rounds // 2] / REPEATS}
        rows.append(row | {"percent of f": 100 * paired_ratio(own, seconds[bare]).median})
    return rows


def _solves(case: Case, f: nn.Module, x: Tensor, device: str, rounds: int) -> list[dict[str, Any]]:
    """Complete solves, forward and backward, over the bare evaluations."""
    parameters = list(f.parameters())
    adjoint = ReversibleAdjoint(mismatch="raise")

    def solve(num_steps: int) -> None:
        solver = ReversibleSolver(beta=case.beta, max_steps=num_steps)
        value = solve_fixed_point(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint).value
        torch.autograd.grad(value, [x, *parameters], x.detach())

    rows = []
    for num_steps in STEPS[:2] if rounds < 5 else STEPS:
        runs = {
            "bare": lambda n=num_steps: bare_evaluations(f, x, x, parameters, 2 * n),  # type: ignore[misc]
            "solve": lambda n=num_steps: solve(n),  # type: ignore[misc]
        }
        seconds = _seconds(runs, device, rounds)
        ratio = paired_ratio(seconds["solve"], seconds["bare"])
        rows.append(
            {
                "case": case.name,
                "steps": num_steps,
                "seconds": sorted(seconds["solve"])[rounds // 2],
                "over bare evaluations": ratio.median,
                "lower quartile": ratio.lower,
                "upper quartile": ratio.upper,
                "peak bytes": _peak_bytes(runs["solve"], device),
                "state elements": x.numel(),
                "synchronizations": count_waits(runs["solve"]) if device == "cuda" else None,
            }
        )
    return rows


def _seconds(runs: Mapping[Any, Kernel], device: str, rounds: int) -> dict[Any, list[float]]:
    if device == "cuda":
        timings = time_interleaved(runs, rounds, synchronize=torch.cuda.synchronize)
        return {name: timing.wall_seconds for name, timing in timings.items()}
    return {name: timing.process_seconds for name, timing in time_interleaved(runs, rounds).items()}


def _peak_bytes(run: Kernel, device: str) -> int:
    if device != "cuda":
        return peak_tensor_bytes(run)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - base


def count_waits(run: Kernel) -> int:
    """Number of times the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def judge(tables: dict[str, list[dict[str, Any]]], device: str, quick: bool) -> list[Requirement]:
    """Overhead is judged on CUDA; on a CPU the core benchmark judges it."""
    verdict = []
    for name in dict.fromkeys(row["case"] for row in tables["solve"]):
        rows = [row for row in tables["solve"] if row["case"] == name]
        over = max(row["over bare evaluations"] for row in rows)
        judged = device == "cuda" and not quick
        verdict.append(at_most(f"{name}: time over bare evaluations", over, MAX_OVERHEAD, "{:.3f}", judged))
        deepest, base = rows[-1], rows[0]
        bits = 8 * (deepest["peak bytes"] - base["peak bytes"]) / deepest["state elements"]
        bits /= 2 * (deepest["steps"] - base["steps"])
        limit = MAX_BITS_RATIO * math.log2(RADIX[name.split(",")[0]])
        verdict.append(at_most(f"{name}: growth, bits per element and evaluation", bits, limit, "{:.2f}"))
        if device == "cuda":
            extra = deepest["synchronizations"] - base["synchronizations"]
            verdict.append(at_most(f"{name}: synchronizations with N", extra, MAX_SYNCHRONISATIONS, "{:.0f}"))
    return verdict


def page(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [
        "Parts of one evaluation, in percent of its two evaluations of f:",
        part.markdown_table(tables["parts"]),
        "Complete solves, forward and backward pass, reconstructed bit for bit (otherwise the run stops):",
        part.markdown_table(tables["solve"]),
    ]


def run(options: argparse.Namespace) -> part.Result:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise part.Misused("--device cuda: this machine has no CUDA device; omit the option to measure on the CPU")
    tables = measure(options.device, options.quick)
    return part.Result(tables, judge(tables, options.device, options.quick), page(tables))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
main = part.command(
    "core.kernels",
    "Kernels",
    __doc__,
    run,
    options={"--device": {"choices": ("cpu", "cuda"), "default": DEVICE}},
    needs=lambda options: "" if options.device == "cpu" else "--device cuda",
    suffix=lambda options: "" if options.device == "cpu" else "_cuda",
)

if __name__ == "__main__":
    sys.exit(main())
