"""What a reversible step costs besides f: update, inverse, remainders, conversions, residual; eager and compiled.

    python -m benchmarks.kernels [--quick] [--device cpu|cuda] [--output DIR]

On CUDA the paper's sizes (language model: d 768, context 448, batch 32, f under bfloat16 autocast; classifier: 256
channels, width 3, batch 64), on a CPU smaller ones in float32. Times: wall clock with synchronisation on CUDA, CPU time
of one thread on a CPU. Percent are of the two evaluations of f that a reversible method makes for each evaluation: one
plain, one with its vector-Jacobian products.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import part
from benchmarks.measure import paired_ratio, peak_tensor_bytes, time_interleaved
from benchmarks.reference import bare_evaluations
from benchmarks.requirements import Requirement, Rows, at_most
from revdeq_lightning.equilibrium import ReversibleAdjoint, ReversibleSolver, solve_fixed_point
from revdeq_lightning.equilibrium.arithmetic import ExactArithmetic
from revdeq_lightning.equilibrium.norms import residual
from revdeq_lightning.equilibrium.remainders import Remainders
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
    """Language model and classifier in the sizes for the device."""
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


def kernels(case: Case, device: str, compiled: bool) -> dict[str, Kernel]:
    """The work of one evaluation, forward and backward, by part."""
    arithmetic = ExactArithmetic()
    recurrence = ReversibleSolver(beta=case.beta).recurrence
    value, z = (torch.randn(case.shape, device=device) for _ in range(2))
    previous, current = arithmetic.encode(z), arithmetic.encode(value)
    state = {"previous": previous.clone(), "even": torch.zeros_like(previous), "odd": torch.zeros_like(previous)}
    g_current, g_previous = (torch.randn_like(previous) for _ in range(2))

    # The whole state is made anew from tensors, as a compiler wants it.
    def advance(previous: Tensor, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        remainders = Remainders([even, odd], [], recurrence.a.denominator, 0)
        following = arithmetic.advance_(previous, current, value, recurrence, remainders)
        return following, *remainders.words

    def invert(following: Tensor, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        remainders = Remainders([even, odd], [], recurrence.a.denominator, 1)
        before = arithmetic.invert_(following, current, value, recurrence, remainders)
        return before, *remainders.words

    def store(digits: Tensor, even: Tensor, odd: Tensor) -> tuple[Tensor, ...]:
        remainders = Remainders([even, odd], [], recurrence.a.denominator, 0)
        remainders.push_(digits)
        return tuple(remainders.words)

    def take(even: Tensor, odd: Tensor) -> tuple[Tensor, ...]:
        remainders = Remainders([even, odd], [], recurrence.a.denominator, 1)
        return remainders.pop_(), *remainders.words

    def decode(u: Tensor) -> Tensor:
        return arithmetic.decode(u, z.dtype)

    def propagate(g_current: Tensor, g_previous: Tensor, product: Tensor) -> Tensor:
        g_previous.add_(product, alpha=recurrence.b)
        g_current.mul_(float(recurrence.a))
        return g_previous.to(product.dtype)

    def final_residual(value: Tensor, z: Tensor) -> Tensor:
        return residual([value], [z]).relative

    use: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
    advance, invert, store, take, decode, propagate, extremes, final_residual = map(  # type: ignore[misc]
        use, (advance, invert, store, take, decode, propagate, torch.aminmax, final_residual)
    )

    def update_and_inverse() -> None:
        following, even, odd = advance(state["previous"], state["even"], state["odd"])
        state["previous"], state["even"], state["odd"] = invert(following, even, odd)

    digits = torch.zeros_like(previous)

    def store_and_take() -> None:
        even, odd = store(digits, state["even"], state["odd"])
        _, state["even"], state["odd"] = take(even, odd)

    def check() -> bool:
        update_and_inverse()
        return torch.equal(state["previous"], previous) and not state["even"].any() and not state["odd"].any()

    return {
        "update and inverse": update_and_inverse,
        "of these, remainders": store_and_take,
        "conversion to f's precision, twice": lambda: (decode(current), decode(current)),
        "range of the state": lambda: extremes(z),
        "recurrence of the gradient": lambda: propagate(g_current, g_previous, value),
        "residual (once a solve)": lambda: final_residual(value, z),
        "undone bit for bit": check,
    }


def measure(device: str, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Tables `parts` (each kernel) and `solve` (overhead, memory and synchronisations of whole solves)."""
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
    parameters = list(f.parameters())
    runs: dict[str, Kernel] = {"bare": lambda: bare_evaluations(f, x, x, parameters, REPEATS)}
    exact = {}
    for mode in ("eager", "compiled"):
        torch._dynamo.reset()
        for name, kernel in kernels(case, device, mode == "compiled").items():
            if name == "undone bit for bit":
                exact[mode] = kernel()
            else:
                runs[f"{mode}: {name}"] = lambda kernel=kernel: [kernel() for _ in range(REPEATS)]  # type: ignore[misc]
    x.requires_grad_()
    seconds = _seconds(runs, device, rounds)
    rows = []
    for key in runs:
        if key == "bare":
            continue
        mode, name = key.split(": ", 1)
        ratio = paired_ratio(seconds[key], seconds["bare"])
        row = {"case": case.name, "part": name, "mode": mode, "percent of f": 100 * ratio.median}
        rows.append(row | {"milliseconds": 1e3 * sorted(seconds[key])[rounds // 2] / REPEATS, "exact": exact[mode]})
    return rows


def _solves(case: Case, f: nn.Module, x: Tensor, device: str, rounds: int) -> list[dict[str, Any]]:
    """Whole solves, forward and backward, over the bare evaluations."""
    parameters = list(f.parameters())

    def solve(num_steps: int) -> None:
        solver, adjoint = ReversibleSolver(beta=case.beta, max_steps=num_steps), ReversibleAdjoint(mismatch="raise")
        value = solve_fixed_point(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint).value
        torch.autograd.grad(value, [x, *parameters], x.detach())

    rows = []
    for num_steps in STEPS[:2] if rounds < 5 else STEPS:
        runs: dict[str, Kernel] = {
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
                "synchronisations": _synchronisations(runs["solve"]) if device == "cuda" else None,
            }
        )
    return rows


def _seconds(runs: dict[str, Kernel], device: str, rounds: int) -> dict[str, list[float]]:
    if device == "cuda":

        def synchronised(run: Kernel) -> Kernel:
            return lambda: (run(), torch.cuda.synchronize())

        timings = time_interleaved({name: synchronised(run) for name, run in runs.items()}, rounds)
        return {name: timing.wall_seconds for name, timing in timings.items()}
    return {name: timing.process_seconds for name, timing in time_interleaved(runs, rounds).items()}


def _peak_bytes(run: Kernel, device: str) -> int:
    if device != "cuda":
        return peak_tensor_bytes(run)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - base


def _synchronisations(run: Kernel) -> int:
    """How often the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def judge(tables: dict[str, list[dict[str, Any]]], device: str, quick: bool) -> list[Requirement]:
    """Overhead is judged on CUDA: that of a CPU, with its one core, is the core benchmark's."""
    verdict = []
    for name in dict.fromkeys(row["case"] for row in tables["solve"]):
        rows = [row for row in tables["solve"] if row["case"] == name]
        over = max(row["over bare evaluations"] for row in rows)
        judged = device == "cuda" and not quick
        verdict.append(at_most(f"{name}: time over bare evaluations", over, MAX_OVERHEAD, "{:.3f}", judged))
        growth = max(row["peak bytes"] for row in rows) / rows[0]["peak bytes"]
        verdict.append(at_most(f"{name}: growth of the peak with N", growth, MAX_GROWTH, "{:.4f}"))
        if device == "cuda":
            extra = rows[-1]["synchronisations"] - rows[0]["synchronisations"]
            verdict.append(at_most(f"{name}: synchronisations with N", extra, MAX_SYNCHRONISATIONS, "{:.0f}"))
    exact = [row["exact"] for row in tables["parts"]]
    verdict.append(Requirement("update undone bit for bit, eager and compiled", "yes", _word(exact), all(exact)))
    return verdict


def _word(exact: Sequence[bool]) -> str:
    return "yes" if all(exact) else "no"


def page(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Both tables."""
    rows: Rows = tables["parts"]
    cells = {(row["case"], row["part"], row["mode"]): row for row in rows}
    lines = [
        {
            "block": case,
            "part": name,
            **{
                mode: f"{cells[case, name, mode]['percent of f']:.1f} % ({cells[case, name, mode]['milliseconds']:.2f} ms)"
                for mode in ("eager", "compiled")
            },
        }
        for case, name in dict.fromkeys((row["case"], row["part"]) for row in rows)
    ]
    return [
        "Parts of one evaluation, in percent of its two evaluations of f:",
        part.markdown_table(lines),
        "Whole solves, eager, forward and backward pass:",
        part.markdown_table(tables["solve"]),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    parser = part.options(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; leave the option out to measure on the CPU")
    torch.set_num_threads(1)

    def run() -> part.Result:
        tables = measure(options.device, options.quick)
        return part.Result(tables, judge(tables, options.device, options.quick), page(tables))

    name = "kernels" if options.device == "cpu" else "kernels_cuda"
    return part.run(name, f"Kernels ({options.device})", run, quick=options.quick, output=options.output)


if __name__ == "__main__":
    sys.exit(main())
