"""Cost of a reversible step besides f: update, inverse, remainders, conversions, residual; eager and compiled.

    python -m benchmarks.core.kernels [--quick] [--device cpu|cuda] [--output DIR]

On CUDA the paper's sizes (language model: d 768, context 448, batch 32, f under bfloat16 autocast; classifier: 256
channels, width 3, batch 64), on a CPU smaller ones in float32. Times: wall clock with synchronization on CUDA, CPU time
of one thread on a CPU. Percentages are relative to the two evaluations of f that a reversible method makes per
evaluation: one plain, one with its vector-Jacobian products.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import part
from benchmarks.core.reference import bare_evaluations
from benchmarks.measure import paired_ratio, peak_tensor_bytes, time_interleaved
from benchmarks.requirements import Requirement, at_most
from revdeq_lightning.equilibrium import ReversibleAdjoint, ReversibleSolver, solve_fixed_point
from revdeq_lightning.equilibrium.exact import kernels as core
from revdeq_lightning.equilibrium.exact.arithmetic import ExactArithmetic
from revdeq_lightning.equilibrium.norms import residual
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.classifier import PaperConvBlock
from revdeq_lightning.models.transformer import PaperBlock

STEPS = (4, 8, 16)
MAX_OVERHEAD, MAX_GROWTH, MAX_SYNCHRONISATIONS = 1.05, 1.02, 0
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


def kernels(case: Case, device: str) -> dict[tuple[str, str], Kernel]:
    """The operations of one evaluation, forward and backward, by part and mode."""
    recurrence = ReversibleSolver(beta=case.beta).recurrence
    a, _, b = recurrence
    value, z = (torch.randn(case.shape, device=device) for _ in range(2))
    eager, compiled = ExactArithmetic(recurrence), ExactArithmetic(recurrence, compiled=True)
    state, current = eager.encode(z), eager.encode(value)
    remainders = eager.remainders(state)
    digits = torch.zeros_like(state)
    g_current, g_previous = (torch.randn_like(state) for _ in range(2))

    def update_and_inverse(arithmetic: ExactArithmetic) -> None:
        following = arithmetic.advance_(state, current, value, remainders)
        arithmetic.invert_(following, current, value, remainders)

    def store_and_take() -> None:
        remainders.push_(digits)
        remainders.pop_()

    def propagate() -> None:
        g_previous.add_(value, alpha=b)
        g_current.mul_(float(a))

    return {
        ("update and inverse", "eager"): lambda: update_and_inverse(eager),
        ("update and inverse", "compiled"): lambda: update_and_inverse(compiled),
        ("of these, remainders", "eager"): store_and_take,
        ("gradient's recurrence", "eager"): propagate,
        ("gradient's recurrence", "compiled"): lambda: core.run(
            core.carry_, g_previous, g_current, value, float(a), 0.0, b
        ),
        ("conversion to f's precision, twice", "eager"): lambda: [eager.decode(current, z.dtype) for _ in range(2)],
        ("range of the state", "eager"): lambda: torch.aminmax(z),
        ("residual (once a solve)", "eager"): lambda: residual([value], [z]),
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
    bare: tuple[str, str] = ("f", "")
    seconds = _seconds({**runs, bare: lambda: bare_evaluations(f, x, x, parameters, REPEATS)}, device, rounds)
    rows = []
    for name, mode in parts:
        own = seconds[name, mode]
        row = {"case": case.name, "part": name, "mode": mode, "milliseconds": 1e3 * sorted(own)[rounds // 2] / REPEATS}
        rows.append(row | {"percent of f": 100 * paired_ratio(own, seconds[bare]).median})
    return rows


def _solves(case: Case, f: nn.Module, x: Tensor, device: str, rounds: int) -> list[dict[str, Any]]:
    """Complete solves, forward and backward, over the bare evaluations."""
    parameters = list(f.parameters())
    adjoint = ReversibleAdjoint(mismatch="raise")

    def solve(num_steps: int, compiled: bool) -> None:
        solver = ReversibleSolver(beta=case.beta, max_steps=num_steps, compiled=compiled)
        value = solve_fixed_point(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint).value
        torch.autograd.grad(value, [x, *parameters], x.detach())

    rows = []
    for num_steps in STEPS[:2] if rounds < 5 else STEPS:
        runs = {
            "bare": lambda n=num_steps: bare_evaluations(f, x, x, parameters, 2 * n),  # type: ignore[misc]
            "eager": lambda n=num_steps: solve(n, False),  # type: ignore[misc]
            "compiled": lambda n=num_steps: solve(n, True),  # type: ignore[misc]
        }
        seconds = _seconds(runs, device, rounds)
        for mode in ("eager", "compiled"):
            ratio = paired_ratio(seconds[mode], seconds["bare"])
            rows.append(
                {
                    "case": case.name,
                    "mode": mode,
                    "steps": num_steps,
                    "seconds": sorted(seconds[mode])[rounds // 2],
                    "over bare evaluations": ratio.median,
                    "lower quartile": ratio.lower,
                    "upper quartile": ratio.upper,
                    "peak bytes": _peak_bytes(runs[mode], device),
                    "synchronizations": _synchronizations(runs[mode]) if device == "cuda" else None,
                }
            )
    return rows


def _seconds(runs: Mapping[Any, Kernel], device: str, rounds: int) -> dict[Any, list[float]]:
    if device == "cuda":

        def synchronized(run: Kernel) -> Kernel:
            return lambda: (run(), torch.cuda.synchronize())

        timings = time_interleaved({name: synchronized(run) for name, run in runs.items()}, rounds)
        return {name: timing.wall_seconds for name, timing in timings.items()}
    return {name: timing.process_seconds for name, timing in time_interleaved(runs, rounds).items()}


def _peak_bytes(run: Kernel, device: str) -> int:
    if device != "cuda":
        return peak_tensor_bytes(run)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - base


def _synchronizations(run: Kernel) -> int:
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
    for name, mode in dict.fromkeys((row["case"], row["mode"]) for row in tables["solve"]):
        rows = [row for row in tables["solve"] if (row["case"], row["mode"]) == (name, mode)]
        over = max(row["over bare evaluations"] for row in rows)
        # The requirement applies to the faster of the two.
        judged = device == "cuda" and not quick and mode == "compiled"
        verdict.append(at_most(f"{name}, {mode}: time over bare evaluations", over, MAX_OVERHEAD, "{:.3f}", judged))
        growth = max(row["peak bytes"] for row in rows) / rows[0]["peak bytes"]
        verdict.append(at_most(f"{name}, {mode}: growth of the peak with N", growth, MAX_GROWTH, "{:.4f}"))
        if device == "cuda":
            extra = rows[-1]["synchronizations"] - rows[0]["synchronizations"]
            verdict.append(at_most(f"{name}, {mode}: synchronizations with N", extra, MAX_SYNCHRONISATIONS, "{:.0f}"))
    return verdict


def page(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Both tables."""
    return [
        "Parts of one evaluation, in percent of its two evaluations of f:",
        part.markdown_table(tables["parts"]),
        "Complete solves, forward and backward pass, reconstructed bit for bit (otherwise the run stops):",
        part.markdown_table(tables["solve"]),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = part.options(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; omit the option to measure on the CPU")
    torch.set_num_threads(1)

    def run() -> part.Result:
        tables = measure(options.device, options.quick)
        return part.Result(tables, judge(tables, options.device, options.quick), page(tables))

    needs, suffix = ("", "") if options.device == "cpu" else ("--device cuda", "_cuda")
    title, where = f"Kernels ({options.device})", {"quick": options.quick, "output": options.output}
    return part.run("core.kernels", title, run, needs=needs, suffix=suffix, **where)


if __name__ == "__main__":
    sys.exit(main())
