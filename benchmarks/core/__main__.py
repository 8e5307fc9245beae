"""Measure the core: exactness, convergence, cost, and memory.

    python -m benchmarks.core [--quick] [--output DIR]

Writes `core_*.csv`, `core.json` (where and how it was measured), `core.md`, and `core.png`; prints the required and
measured values, and exits with 1 if a requirement is missed.
"""

import argparse
import sys
import time

from benchmarks import part
from benchmarks.core import convergence, cost, figure, gradient_error, memory, tables
from benchmarks.requirements import judge


def run(options: argparse.Namespace) -> part.Result:
    results = {}
    # Times come first, before the other parts have touched memory.
    parts = {"cost": cost, "gradients": gradient_error, "convergence": convergence, "memory": memory}
    for name, measured in parts.items():
        start = time.perf_counter()
        print(f"{name} ...", end=" ", flush=True)
        results[name] = measured.measure(options.quick)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    verdict = judge(results["gradients"], results["cost"], results["memory"], options.quick)
    return part.Result(results, verdict, tables.page(**results), lambda path: figure.draw(path, **results))


main = part.command("core", "The core, measured", __doc__, run)

if __name__ == "__main__":
    sys.exit(main())
