"""Format measurements as Markdown tables, with the verdict."""

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from benchmarks.requirements import Requirement

VERDICT_HEADER = ("what", "required", "measured", "verdict")


def origin(provenance: dict[str, Any]) -> str:
    """Where, when, and how a result was measured, in a sentence."""
    hardware = provenance["hardware"]
    changes = " with uncommitted changes" if provenance["uncommitted_changes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return (
        f"`{provenance['command']}`, {provenance['date']}, {provenance['seconds']} s on {hardware['cpu']},"
        f" {hardware['cores']} cores, {hardware['threads']} thread(s), load {hardware['load_average']} at the start;"
        f" {versions}; commit {provenance['commit']}{changes}."
    )


def verdict_lines(verdict: Sequence[Requirement]) -> list[tuple[str, str, str, str]]:
    return [(r.name, r.required, r.measured, r.verdict) for r in verdict]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (header, *rows)
    )


def spread(values: Sequence[float], digits: int, of_extremes: int | None = None) -> str:
    """The mean, and in parentheses minimum and maximum if there are several; "not reached" if one is nan."""
    if any(value != value for value in values):
        return "not reached"
    fine = digits if of_extremes is None else of_extremes
    extremes = f" ({min(values):.{fine}f} - {max(values):.{fine}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{extremes}"
