"""Mazes larger than those of training, mazes made otherwise, solves that stop by themselves or start anywhere.

    python -m benchmarks.quality.extrapolation --checkpoint RUN/checkpoints/best.ckpt [CHECKPOINT ...] [--count 200]

Mazes made by Wilson's algorithm and those with a random start stop by themselves, which takes less time.
Checkpoints of `make train-maze`, one a seed. One thread.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks import part
from benchmarks.part import Result, Skipped, markdown_table
from benchmarks.requirements import Requirement
from revdeq_lightning.cli.inference import ModelSettings, SolverSteps, load_reasoner
from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.puzzles.kinds import FREE, GOAL, START, WALL, shortest_path
from revdeq_lightning.data.puzzles.module import build_kind, make_puzzle

REQUIRED = {5: 0.995, 9: 0.99, 13: 0.99, 19: 0.97, 29: 0.95}
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
ENOUGH_FROM_RANDOM = 0.95
Puzzles = tuple[NDArray[np.int64], NDArray[np.int64]]


def generated(
    settings: Mapping[str, Any], size: int, count: int, train_size: int | None = None, split: str = "test"
) -> Puzzles:
    """Puzzles of the package's generator, of a seed that no training and no choice of settings has."""
    kind = build_kind(**settings)
    puzzles = [make_puzzle(kind, 3_000_017, split, size, i, train_size=train_size) for i in range(count)]
    return np.stack([p.inputs for p in puzzles]), np.stack([p.targets for p in puzzles])


def own_mazes(size: int, count: int, split: str = "test") -> Puzzles:
    settings = {"puzzle": "mazes", "size": 5, "algorithm": "mixed", "loops": 0.0, "num_empty": 1}
    return generated(settings, size, count, train_size=5, split=split)


def wilson_mazes(size: int, count: int) -> Puzzles:
    """Uniformly random mazes by Wilson's algorithm: loop-erased random walks. Nothing of the generator is used."""
    inputs = []
    for number in range(count):
        draws = Draws(2_000_003, size, number)
        pixels = np.full((2 * size + 1, 2 * size + 1), WALL)
        cells = [(r, c) for r in range(size) for c in range(size)]
        inside = {cells[int(draws.integers(len(cells), 1)[0])]}
        for start in cells:
            walk = [start]
            while walk[-1] not in inside:
                r, c = walk[-1]
                moves = [(r + a, c + b) for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))]
                moves = [m for m in moves if 0 <= m[0] < size and 0 <= m[1] < size]
                step = moves[int(draws.integers(len(moves), 1)[0])]
                walk = walk[: walk.index(step) + 1] if step in walk else [*walk, step]
            inside.update(walk)
            for (r, c), (s, d) in pairwise(walk):
                pixels[r + s + 1, c + d + 1] = FREE
        pixels[1::2, 1::2] = FREE
        for cell, symbol in zip(draws.permutation(size * size)[:2].tolist(), (START, GOAL), strict=True):
            pixels[2 * (cell // size) + 1, 2 * (cell % size) + 1] = symbol
        inputs.append(pixels)
    paths = [shortest_path(pixels) for pixels in inputs]
    return np.stack(inputs), np.stack([path for path in paths if path is not None])


def longest_dead_end(pixels: NDArray[np.int64]) -> int:
    """Pixels of a perfect maze that vanish one after another when all dead ends are filled from their tips at once."""
    filled, rounds = pixels == WALL, 0
    while True:
        padded = np.pad(filled, 1, constant_values=True).astype(int)
        walls = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        tips = (walls >= 3) & ~filled & (pixels == FREE)
        if not tips.any():
            return rounds
        filled, rounds = filled | tips, rounds + 1


@torch.no_grad()
def solve(model: Any, puzzles: Puzzles, random: bool = False, **settings: Any) -> tuple[NDArray[np.bool_], list[int]]:
    """Whether each puzzle is solved, and the evaluations of f that it took."""
    inputs, targets = puzzles
    answers: list[NDArray[np.int64]] = []
    made: list[int] = []
    generator = torch.Generator().manual_seed(0)
    count = max(4, 32 * 441 // inputs[0].size)  # smaller batches of large puzzles
    for batch in torch.from_numpy(inputs).split(count):
        start = {"z0": model.random_state(batch, generator)} if random else {}
        output = model(batch, **start, **settings)
        answers.append(output.logits.argmax(1).numpy())
        made += output.evaluations.tolist()
    right = (np.concatenate(answers) == targets).reshape(len(targets), -1).all(1)
    return right, made


def stopping_at(checkpoint: Path, rtol: float) -> Any:
    """The reasoner with a tolerance."""
    return load_reasoner(checkpoint, model=ModelSettings(SolverSteps(rtol=rtol)))[0]


def choose_tolerance(checkpoint: Path, validation: Puzzles) -> float:
    """A tenth of the largest tolerance with which as many mazes of the training size are solved as without one."""
    wanted = solve(load_reasoner(checkpoint)[0], validation)[0].mean()
    for rtol in TOLERANCES:
        if solve(stopping_at(checkpoint, rtol), validation)[0].mean() >= wanted:
            return rtol / 10
    return TOLERANCES[-1]


def loaded(checkpoints: Sequence[Path]) -> Iterator[tuple[int, Path, Any, dict[str, Any]]]:
    """Seed, path, model, and settings of its data, of each checkpoint."""
    if not checkpoints:
        raise Skipped("no --checkpoint: train with `make train-maze`, or a configuration of configs/reasoning, first")
    for seed, checkpoint in enumerate(checkpoints):
        yield seed, checkpoint, *load_reasoner(checkpoint)


def measure(options: argparse.Namespace) -> Result:
    rows: list[dict[str, Any]] = []
    for seed, checkpoint, fixed, _ in loaded(options.checkpoint):
        rtol = choose_tolerance(checkpoint, own_mazes(5, options.count, "validation"))
        stopping = stopping_at(checkpoint, rtol)
        for size in options.sizes:
            mazes = own_mazes(size, options.count)
            solved, made = solve(fixed, mazes)
            by_itself, until = solve(stopping, mazes)
            few = mazes[0][: max(1, options.count // 4)], mazes[1][: max(1, options.count // 4)]
            lengths = mazes[1].sum((1, 2))
            dead_ends = [longest_dead_end(pixels) for pixels in mazes[0]]
            row = {
                "seed": seed, "size": size, "mazes": options.count, "evaluations": made[0],
                "solved": float(solved.mean()),
                "rtol": rtol, "solved by itself": float(by_itself.mean()),
                "median evaluations by itself": float(np.median(until)),
                "Wilson": float(solve(stopping, wilson_mazes(size, options.count))[0].mean()),
                "from random": float(solve(stopping, few, random=True)[0].mean()),
                "rank correlation with path": rank_correlation(until, lengths),
                "rank correlation with dead end": rank_correlation(until, dead_ends),
            }  # fmt: skip
            print(row, flush=True)
            rows.append(row)
    note = "Fractions of mazes; Wilson and random: stopping by itself."
    return Result({"": rows}, judge(rows), [note, markdown_table(rows)], packages=["scipy"])


def rank_correlation(a: Any, b: Any) -> float | None:
    """Spearman's; None where one of them does not vary."""
    return None if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


def judge(rows: Sequence[dict[str, Any]]) -> list[Requirement]:
    """What the means over the seeds say."""
    by_size: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_size[row["size"]].append(row)
    verdict = []
    for size, found in by_size.items():
        solved, other, alone = (mean(r[key] for r in found) for key in ("solved", "Wilson", "solved by itself"))
        limit = REQUIRED.get(size, 0.0)
        name = f"{size} x {size} cells"
        verdict += [
            Requirement(f"solved, {name}", f">= {limit:.1%}", f"{solved:.1%}", solved >= limit),
            Requirement(
                f"made by Wilson's algorithm, {name}", "within 3 points", f"{other:.1%}", other >= alone - 0.03
            ),
            Requirement(f"stopping by itself, {name}", "within 1 point", f"{alone:.1%}", alone >= solved - 0.01),
        ]
    if 5 in by_size:
        start = mean(r["from random"] for r in by_size[5])
        limit = ENOUGH_FROM_RANDOM
        verdict.append(Requirement("from a random start, 5 x 5", f">= {limit:.0%}", f"{start:.1%}", start >= limit))
    return verdict


CHECKPOINTS = {"type": Path, "nargs": "+", "default": [], "help": "one a seed"}


def shown(options: argparse.Namespace) -> str:
    """The words of the command, without the paths of this machine."""
    return f"--checkpoint {' '.join(f'SEED{i}.ckpt' for i in range(len(options.checkpoint)))}"


main = part.command(
    "quality.extrapolation",
    "Mazes larger than those of training",
    __doc__,
    measure,
    options={
        "--checkpoint": CHECKPOINTS,
        "--sizes": {"type": int, "nargs": "+", "default": list(REQUIRED)},
        "--count": {"type": int, "default": 200, "help": "mazes of each size"},
    },
    needs=lambda options: f"{shown(options)} --sizes {' '.join(map(str, options.sizes))} --count {options.count}",
)

if __name__ == "__main__":
    sys.exit(main())
