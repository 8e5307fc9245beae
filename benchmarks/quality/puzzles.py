"""Prefix sums and Sudokus that a reasoner has not seen, longer than those of training, with more evaluations.

    python -m benchmarks.quality.puzzles --checkpoint RUN/checkpoints/best.ckpt [CHECKPOINT ...]

Checkpoints of `configs/reasoning/prefix_sums.yaml` or of a Sudoku configuration, one a seed. Strings are drawn and
summed by NumPy; Sudokus have one solution, come from the generator, and are tested with 1, 2 and 4 times the
evaluations of training. One thread.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import part
from benchmarks.part import Result, Skipped, markdown_table
from benchmarks.quality.extrapolation import batches
from benchmarks.requirements import Requirement
from revdeq_lightning.cli.inference import load_reasoner
from revdeq_lightning.data.puzzles.module import build_kind, make_puzzle

STRINGS = {32: 500, 128: 500, 512: 200, 4096: 20}
REQUIRED_OF_STRINGS = {512: 1.0, 4096: 0.99}
NUM_SUDOKUS, REQUIRED_OF_SUDOKUS = 500, 0.995
Arrays = tuple[NDArray[np.int64], NDArray[np.int64]]


def strings(length: int, count: int) -> Arrays:
    """Random bits, and the parity of each prefix."""
    bits = np.random.default_rng(length).integers(0, 2, (count, length))
    return bits, bits.cumsum(1) % 2


def sudokus(settings: dict[str, Any], count: int) -> Arrays:
    """Sudokus of the test split, of a seed that no training has."""
    kind = build_kind(**settings)
    puzzles = [make_puzzle(kind, 1_000_003, "test", settings["size"], number) for number in range(count)]
    return np.stack([p.inputs for p in puzzles]), np.stack([p.targets for p in puzzles])


def cases(model: Any, settings: dict[str, Any], quick: bool) -> Iterator[tuple[int, Arrays, int]]:
    """Size, puzzles, and evaluations of each test."""
    if settings["puzzle"] == "prefix_sums":
        for length, count in STRINGS.items():
            if length <= (32 if quick else 4096):
                yield length, strings(length, 8 if quick else count), model.steps_for((length,))
    elif settings["puzzle"] == "sudoku":
        puzzles = sudokus(settings, 8 if quick else NUM_SUDOKUS)
        for factor in (1, 2, 4):
            yield settings["size"], puzzles, factor * model.equilibrium.solver.max_steps
    else:
        raise Skipped("mazes are measured by benchmarks.quality.extrapolation")


@torch.no_grad()
def measure(checkpoints: Sequence[Path], quick: bool) -> Result:
    """Solve everything."""
    rows: list[dict[str, Any]] = []
    for seed, checkpoint in enumerate(checkpoints):
        model, settings = load_reasoner(checkpoint)
        parameters = sum(p.numel() for p in model.parameters())
        for size, (inputs, targets), evaluations in cases(model, settings, quick):
            answers = [model(batch, max_steps=evaluations).logits.argmax(1).numpy() for batch in batches(inputs)]
            solved = (np.concatenate(answers) == targets).reshape(len(targets), -1).all(1).mean()
            row = {"puzzle": settings["puzzle"], "parameters": parameters, "seed": seed, "size": size}
            rows.append(row | {"puzzles": len(inputs), "evaluations": evaluations, "solved": float(solved)})
            print(rows[-1], flush=True)
    return Result({"": rows}, judge(rows), ["Fractions of puzzles.", markdown_table(rows)])


def judge(rows: Sequence[dict[str, Any]]) -> list[Requirement]:
    """What the means over the seeds say, of Sudokus with the best number of evaluations."""
    found: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for row in rows:
        found[row["puzzle"], row["size"], row["evaluations"]].append(row["solved"])
    verdict = [
        Requirement(f"strings of {size} bits", f">= {limit:.0%}", f"{mean(solved):.1%}", mean(solved) >= limit)
        for (puzzle, size, _), solved in found.items()
        if puzzle == "prefix_sums" and (limit := REQUIRED_OF_STRINGS.get(size))
    ]
    if of_sudokus := [mean(solved) for (puzzle, size, _), solved in found.items() if (puzzle, size) == ("sudoku", 6)]:
        best, limit = max(of_sudokus), REQUIRED_OF_SUDOKUS
        verdict.append(Requirement("Sudokus of 6 x 6 cells", f">= {limit:.1%}", f"{best:.1%}", best >= limit))
    return verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    parser = part.options(__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[])
    parser.add_argument("--suffix", default="", help="of the results' name: _sudoku6")
    options = parser.parse_args(arguments)

    def run() -> Result:
        if not options.checkpoint:
            raise Skipped("no --checkpoint: train with a configuration of configs/reasoning first")
        return measure(options.checkpoint, options.quick)

    torch.set_num_threads(1)
    needs = f"--checkpoint {' '.join(f'SEED{i}.ckpt' for i in range(len(options.checkpoint)))}"
    if options.suffix:
        needs += f" --suffix {options.suffix}"
    title = "Puzzles longer than those of training, or with more evaluations"
    quick, output = options.quick, options.output
    return part.run("quality.puzzles", title, run, quick=quick, output=output, needs=needs, suffix=options.suffix)


if __name__ == "__main__":
    sys.exit(main())
