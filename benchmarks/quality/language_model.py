"""Character-level tiny Shakespeare, 2000 iterations: solvers and depths compared with an explicit stack.

    python -m benchmarks.quality.language_model --data tinyshakespeare.txt [--only NAME ...] [--seeds 0 1 2] [--jobs 2]

Each run is `python -m revdeq_lightning fit --config configs/lm/tinyshakespeare.yaml` with the options of its row, on
one thread. Runs that are already in the output are skipped, so that the table can be filled in parts.
"""

import os
import sys

from benchmarks.quality.training import Table, Variant, run


def momentum(evaluations: int, limit: float | None = None) -> Variant:
    """The config's momentum solver with this many evaluations."""
    return Variant(evaluations, [f"--model.solver.max_steps={evaluations}"], limit)


def paper(beta: float, num_steps: int) -> Variant:
    """The paper's solver, 2 evaluations per step."""
    solver = ["--model.solver.solver=reversible", "--model.solver.momentum=null", f"--model.solver.beta={beta}"]
    return Variant(2 * num_steps, [*solver, f"--model.solver.max_steps={num_steps}"])


EXPLICIT = [
    "--model.solver.solver=none",
    "--model.solver.momentum=null",
    "--model.solver.beta=null",
    "--model.network.num_layers=4",
]
HALF = ["--model.optimizer.lr=0.005", "--model.optimizer.muon_lr=0.01"]
TABLE = Table(
    title="Tiny Shakespeare",
    command=["fit", "--config", "configs/lm/tinyshakespeare.yaml", "--run.sample_tokens=0"],
    variants={
        # Limits for at most 8 and at most 4 evaluations; the better of these two counts for the first.
        "momentum-4": momentum(4, limit=1.57),
        "momentum-8": momentum(8),
        "paper-0.5-8": paper(0.5, 4),
        "paper-0.8-8": paper(0.8, 4),
        "momentum-1": momentum(1),
        "momentum-2": momentum(2),
        "momentum-16": momentum(16),
        "explicit-4-layers": Variant(1, EXPLICIT),
        "explicit-4-layers-half-rates": Variant(1, [*EXPLICIT, *HALF]),
        "explicit-4-layers-muon-0.01": Variant(1, [*EXPLICIT, "--model.optimizer.muon_lr=0.01"]),
    },
    metric="val/loss",
    unit="val loss, nats per character",
    smaller_is_better=True,
)


if __name__ == "__main__":
    sys.exit(
        run(TABLE, __doc__, "language_model", seeds=[0, 1, 2], jobs=os.cpu_count() or 1, data="tinyshakespeare.txt")
    )
