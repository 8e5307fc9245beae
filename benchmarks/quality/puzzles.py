"""Prefix sums and Sudokus that a reasoner has not seen, longer than those of training, with more evaluations.

    python -m benchmarks.quality.puzzles --checkpoint RUN/checkpoints/best.ckpt [CHECKPOINT ...]

Checkpoints of `configs/reasoning/prefix_sums.yaml` or of a Sudoku configuration, one a seed. Strings are drawn and
summed by NumPy; Sudokus have one solution, come from the generator, and are tested with 1, 2 and 4 times the
evaluations of training. One thread.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks import part
from benchmarks.part import Result, Skipped, markdown_table
from benchmarks.quality.extrapolation import CHECKPOINTS, Puzzles, generated, loaded, shown, solve
from benchmarks.requirements import Requirement

STRINGS = {32: 500, 128: 500, 512: 200, 4096: 20}
REQUIRED_OF_STRINGS = {512: 1.0, 4096: 0.99}
NUM_SUDOKUS, REQUIRED_OF_SUDOKUS = 500, 0.995


def strings(length: int, count: int) -> Puzzles:
    """Random bits, and the parity of each prefix."""
    bits = np.random.default_rng(length).integers(0, 2, (count, length))
    return bits, bits.cumsum(1) % 2


def cases(model: Any, settings: dict[str, Any], quick: bool) -> Iterator[tuple[int, Puzzles, int]]:
    """Size, puzzles, and evaluations of each test."""
    if settings["puzzle"] == "prefix_sums":
        for length, count in STRINGS.items():
            if length <= (32 if quick else 4096):
                yield length, strings(length, 8 if quick else count), model.steps_for((length,))
    elif settings["puzzle"] == "sudoku":
        size = settings["size"]
        puzzles = generated(settings, size, 8 if quick else NUM_SUDOKUS)
        for factor in (1, 2, 4):
            yield size, puzzles, factor * model.equilibrium.solver.max_steps
    else:
        raise Skipped("mazes are measured by benchmarks.quality.extrapolation")


def measure(options: argparse.Namespace) -> Result:
    rows: list[dict[str, Any]] = []
    for seed, _, model, settings in loaded(options.checkpoint):
        parameters = sum(p.numel() for p in model.parameters())
        for size, puzzles, evaluations in cases(model, settings, options.quick):
            solved = float(solve(model, puzzles, max_steps=evaluations)[0].mean())
            row = {"puzzle": settings["puzzle"], "parameters": parameters, "seed": seed, "size": size}
            rows.append(row | {"puzzles": len(puzzles[0]), "evaluations": evaluations, "solved": solved})
            print(rows[-1], flush=True)
    return Result({"": rows}, judge(rows), ["Fractions of puzzles.", markdown_table(rows)])


def judge(rows: Sequence[dict[str, Any]]) -> list[Requirement]:
    """What the means over the seeds say, of Sudokus with the most evaluations."""
    found: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for row in rows:
        found[row["puzzle"], row["size"], row["evaluations"]].append(row["solved"])
    verdict = [
        Requirement(f"strings of {size} bits", f">= {limit:.0%}", f"{mean(solved):.1%}", mean(solved) >= limit)
        for (puzzle, size, _), solved in found.items()
        if puzzle == "prefix_sums" and (limit := REQUIRED_OF_STRINGS.get(size))
    ]
    if of_sudokus := {
        n: mean(solved) for (puzzle, size, n), solved in found.items() if (puzzle, size) == ("sudoku", 6)
    }:
        (most, measured), limit = max(of_sudokus.items()), REQUIRED_OF_SUDOKUS
        what = f"Sudokus of 6 x 6 cells, {most} evaluations"
        verdict.append(Requirement(what, f">= {limit:.1%}", f"{measured:.1%}", measured >= limit))
    return verdict


main = part.command(
    "quality.puzzles",
    "Puzzles longer than those of training, or with more evaluations",
    __doc__,
    measure,
    options={
        "--checkpoint": CHECKPOINTS,
        "--suffix": {"default": "", "help": "of the results' name: _sudoku6"},
    },
    needs=lambda options: shown(options) + (f" --suffix {options.suffix}" if options.suffix else ""),
    suffix=lambda options: options.suffix,
)

if __name__ == "__main__":
    sys.exit(main())
