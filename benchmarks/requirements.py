"""Requirements on the core, compared with the measurements."""

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

from benchmarks.core.memory import BASE_STEPS, PROMISES

Rows = Sequence[dict[str, Any]]

MAX_COST, MAX_OVER_BPTT = 1.02, 1.33
MAX_RATIO, MAX_BITS_RATIO = 1.02, 1.35


class Requirement(NamedTuple):
    """One line of the verdict; `is_judged` is False if a smoke run cannot decide it."""

    name: str
    required: str
    measured: str
    is_met: bool
    is_judged: bool = True

    @property
    def verdict(self) -> str:
        return ("met" if self.is_met else "MISSED") if self.is_judged else "not judged"


def judge(gradients: Rows, costs: Rows, memory: Rows, quick: bool) -> list[Requirement]:
    return [*_gradient(gradients), *_cost(costs, quick), *_memory(memory, quick)]


def _gradient(rows: Rows) -> list[Requirement]:
    exact = [row for row in rows if row["arithmetic"] == "exact"]
    verdicts = []
    for dtype, limit in (("float32", 1e-5), ("float64", 1e-8)):
        worst = largest([row["error"] for row in exact if row["compute_dtype"] == dtype])
        verdicts.append(at_most(f"gradient error, exact, {dtype} f, largest", worst, limit, "{:.1e}"))
    autocast = [row for row in exact if row["compute_dtype"] == "bfloat16"]
    ratio = largest([row["error"] / row["bptt_error"] for row in autocast])
    verdicts.append(at_most("bfloat16 autocast: error over BPTT's, largest", ratio, 1.5, "{:.3f}"))
    mismatch = max(row["reconstruction_mismatch"] for row in exact)
    verdicts.append(Requirement("reconstruction mismatch, exact, largest", "0", str(mismatch), mismatch == 0))
    return verdicts


def _cost(rows: Rows, quick: bool) -> list[Requirement]:
    verdicts = []
    for row in rows:
        if row["clock"] != "process" or not row["competitor"].endswith("exact"):
            continue
        where = f"{row['competitor']}, d {row['dim']}, {row['batch']} x {row['tokens']}"
        cost, over = row["over bare median"], row["over stored BPTT median"]
        verdicts.append(at_most(f"time over bare evaluations, {where}", cost, MAX_COST, "{:.3f}", not quick))
        verdicts.append(at_most(f"time over stored BPTT, {where}", over, MAX_OVER_BPTT, "{:.3f}", not quick))
    return verdicts


def _memory(rows: Rows, quick: bool) -> list[Requirement]:
    verdicts = []
    for promise in PROMISES:
        curve = [r for r in rows if r["solver"] == promise.member.label and r["method"] == "reversible exact"]
        if not curve:  # a smoke run has only one
            continue
        base = next(r for r in curve if r["steps"] == BASE_STEPS)
        where = f"peak less the remainders over N = {BASE_STEPS}, {promise.member.label}"
        for kind in ("tensor", "process"):
            rest = [
                r[f"{kind}_bytes"] - r["state_elements"] * promise.digit_bytes(r["evaluations"]) for r in (base, *curve)
            ]
            judged = not quick or kind == "tensor"
            verdicts.append(at_most(f"{kind} {where}", max(rest) / rest[0], MAX_RATIO, "{:.4f}", judged))
        name, bits = promise.member.label, max(r["growth_bits"] for r in curve)
        limit = MAX_BITS_RATIO * promise.bits
        verdicts.append(at_most(f"growth, bits per element and evaluation, {name}", bits, limit, "{:.2f}"))
    return verdicts


def at_most(name: str, measured: float, limit: float, style: str, is_judged: bool = True) -> Requirement:
    """The requirement `measured <= limit`."""
    required = f"<= {limit:.0e}" if limit < 1e-3 else f"<= {limit:.4g}"
    return Requirement(name, required, style.format(measured), measured <= limit, is_judged)


def largest(values: Sequence[float]) -> float:
    """The maximum; infinite if a value is not finite."""
    return max(v if isfinite(v) else float("inf") for v in values)
