"""Gradient error by the unit of the state's whole numbers: from 2^-16 in 32 bits to 2^-32 in 64.

    python -m benchmarks.core.precision [--quick] [--output DIR]

Largest relative error of the whole gradient, with f in float32, over the solvers and blocks of `gradient_error` and up
to 128 evaluations of f. The package has units of 2^-21 (32 bits) and 2^-32 (64).
"""

import argparse
import math
import sys
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import part
from benchmarks.core.gradient_error import BLOCKS, MEMBERS, bptt, error, make_problem, reversible
from benchmarks.requirements import at_most, largest
from revdeq_lightning.equilibrium import DivergenceError
from revdeq_lightning.equilibrium.exact import arithmetic

UNITS = {"exact": (torch.int32, (16, 17, 18, 19, 20, 21, 22, 24)), "exact64": (torch.float64, (24, 26, 28, 30, 32))}
OWN_UNIT, MOST_ERROR = 21, 1e-5


def run(options: argparse.Namespace) -> part.Result:
    steps, members = ((1, 4), MEMBERS[1:6:4]) if options.quick else ((1, 8, 64), MEMBERS)
    cases = [(block, member, n) for block in BLOCKS for member in members for n in steps]
    problems = {block: make_problem(block, torch.float32) for block in BLOCKS}
    references = [bptt(problems[block], member, n) for block, member, n in cases]
    rows: list[dict[str, Any]] = []
    own: dict[str, float] = {}
    for name, (dtype, units) in UNITS.items():
        for unit in units:
            found: dict[str, list[float]] = {block: [] for block in BLOCKS}
            left = dict.fromkeys(BLOCKS, 0)
            row: dict[str, Any] = {"unit": f"2^-{unit}", "bits of the state": 32 if name == "exact" else 64}
            for (block, member, n), reference in zip(cases, references, strict=True):
                try:
                    with patch.dict(arithmetic.FRACTION_BITS, {dtype: unit}):
                        gradient, mismatch = reversible(problems[block], member, n, name)
                except DivergenceError:
                    left[block] += 1
                    continue
                assert mismatch == 0
                found[block].append(error(gradient, reference))
            for block, errors in found.items():
                worst = largest(errors or [math.nan])
                row[block] = f"{worst:.1e}" + f" ({left[block]} left the range)" * bool(left[block])
                if (name, unit) == ("exact", OWN_UNIT):
                    own[block] = math.inf if left[block] else worst
            rows.append(row)
            print(row, flush=True)
    verdict = [at_most(f"{block}, unit 2^-{OWN_UNIT}", worst, MOST_ERROR, "{:.1e}") for block, worst in own.items()]
    return part.Result({"": rows}, verdict, [part.markdown_table(rows)])


main = part.command("core.precision", "Gradient error by the unit of the state", __doc__, run)

if __name__ == "__main__":
    sys.exit(main())
