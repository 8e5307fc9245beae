"""Time of forward and backward pass relative to the necessary evaluations and to BPTT."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.core.problems import attention_problem, bptt_step, momentum, revdeq, reversible_step
from benchmarks.core.reference import bare_evaluations
from benchmarks.measure import paired_ratio, time_interleaved

NUM_EVALUATIONS = 16


class Setting(NamedTuple):
    """Size of the block, and number of timing rounds."""

    dim: int
    batch: int
    tokens: int
    num_rounds: int


SETTINGS = (Setting(192, 1, 1024, 7), Setting(256, 1, 1024, 5), Setting(192, 4, 256, 5))
QUICK = (Setting(32, 1, 64, 2),)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Quartiles of paired time ratios for the paper's N = 8 steps, and for momentum with as many evaluations."""
    rows: list[dict[str, Any]] = []
    for setting in QUICK if quick else SETTINGS:
        timings = time_interleaved(_competitors(setting), setting.num_rounds)
        for clock in ("process", "wall"):
            seconds = {name: getattr(timing, f"{clock}_seconds") for name, timing in timings.items()}
            for name in seconds:
                row: dict[str, Any] = setting._asdict() | {"clock": clock, "competitor": name}
                row["evaluations"] = NUM_EVALUATIONS
                row["median_seconds"] = round(sorted(seconds[name])[len(seconds[name]) // 2], 4)
                for base in ("bare", "stored BPTT", "checkpointed BPTT"):
                    ratio = paired_ratio(seconds[name], seconds[base])
                    row |= {f"over {base} {quartile}": round(value, 4) for quartile, value in ratio._asdict().items()}
                rows.append(row)
    return rows


def _competitors(setting: Setting) -> dict[str, Callable[[], Any]]:
    problem = attention_problem(setting.batch, setting.tokens, setting.dim, setting.dim // 32)
    paper, heavy_ball = revdeq(0.8), momentum(1 / 8)
    steps = NUM_EVALUATIONS // 2
    state = torch.randn_like(problem.z0)
    parameters = list(problem.f.parameters())
    return {
        "bare": lambda: bare_evaluations(problem.f, state, problem.x, parameters, NUM_EVALUATIONS),
        "RevDEQ 0.8 exact": reversible_step(problem, paper, steps, "exact"),
        "RevDEQ 0.8 float64": reversible_step(problem, paper, steps, "float64"),
        "momentum 1/8 exact": reversible_step(problem, heavy_ball, NUM_EVALUATIONS, "exact"),
        "the same with a trace": reversible_step(problem, heavy_ball, NUM_EVALUATIONS, "exact", mismatch="trace"),
        "stored BPTT": bptt_step(problem, paper, steps),
        "checkpointed BPTT": bptt_step(problem, paper, steps, checkpoint=True),
    }
