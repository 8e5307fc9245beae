"""Measure the core: exactness, convergence, cost, and memory.

    python -m benchmarks.core [--quick] [--output DIR] [--threads 1]

Writes `core_*.csv`, `core.json` (where and how it was measured), `core.md`, and `core.png`; prints the required and
measured values, and exits with 1 if a requirement is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.core import convergence, cost, figure, gradient_error, memory
from benchmarks.measure import provenance, write_csv
from benchmarks.part import RESULTS
from benchmarks.report import VERDICT_HEADER, aligned, markdown, verdict_lines
from benchmarks.requirements import judge


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.core", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that it works; times are meaningless"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--threads", type=int, default=1, help="number of torch threads; CPU time is a fair measure only with 1"
    )
    options = parser.parse_args(arguments)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(options.output, options.quick)
    finally:
        torch.set_num_threads(threads_before)


def _run(output: Path, quick: bool) -> int:
    output.mkdir(parents=True, exist_ok=True)
    origin = provenance("python -m benchmarks.core" + (" --quick" if quick else ""))
    start = time.perf_counter()
    results = {}
    # Times come first, before the other parts have touched memory.
    for name, part in (("cost", cost), ("gradients", gradient_error), ("convergence", convergence), ("memory", memory)):
        part_start = time.perf_counter()
        print(f"{name} ...", end=" ", flush=True)
        results[name] = part.measure(quick)
        print(f"{time.perf_counter() - part_start:.0f} s", flush=True)
        write_csv(output / f"core_{name}.csv", results[name])
    origin["seconds"] = round(time.perf_counter() - start)
    verdict = judge(results["gradients"], results["cost"], results["memory"], quick)
    origin["verdict"] = [r._asdict() for r in verdict]
    (output / "core.json").write_text(json.dumps(origin, indent=2) + "\n")
    curves = (results["gradients"], results["convergence"], results["cost"], results["memory"])
    (output / "core.md").write_text(markdown(origin, *curves, verdict))
    figure.draw(output / "core.png", *curves)
    print()
    print(aligned(VERDICT_HEADER, verdict_lines(verdict)))
    print(f"\n{output / 'core.md'}")
    return int(any(r.is_judged and not r.is_met for r in verdict))


if __name__ == "__main__":
    sys.exit(main())
