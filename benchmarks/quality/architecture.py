"""Language models of Python source: layers before and after the equilibrium, its initial state, tied embeddings.

    python -m benchmarks.quality.architecture [--quick] [--only NAME ...] [--seeds 0 1 2] [--times N]

All models have the data and the optimizer of `lm/default.yaml`, at a constant rate with averaged weights, and a width
of 128. Each is trained until 1,000 steps (2 million tokens), 20 TFLOP and 240 CPU seconds are all spent, or for 3,000
CPU seconds, and evaluated when each was. One process, one thread. The graphs of all evaluations are stored, which
changes no bit of the gradient and takes least time. Runs that are already in the output are skipped, so that the table
can be filled in parts. With `--times 5` all of these budgets are five times as large, and the table is another one.

The page also says how many layers of its own an evaluation is worth: with the loss of explicit stacks of n layers at
equal tokens, interpolated in log(n), a model of L layers evaluated N times is worth `L * N**phi` layers
(arXiv:2604.21106).
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import part
from benchmarks.quality.__main__ import Files, Part, Variant, make_text, nats, train
from benchmarks.quality.budget import Budget, settings_of
from benchmarks.quality.training import facts_of, origins
from benchmarks.report import spread, table
from revdeq_lightning.cli.quiet import quieten_lightning

CONFIG = "configs/lm/default.yaml"
SETTINGS = settings_of([CONFIG], {"model.optimizer.ema_decay": 0.995})
SIZES = {"block": "modern", "d_model": 128, "num_heads": 2, "d_mlp": 352}
MOMENTUM = {"solver": "momentum"}
LOOPED = {"solver": "picard", "adjoint": "backprop"}
BUDGETS = {"steps": "At equal tokens", "flops": "At equal FLOPs", "cpu": "At equal CPU time"}
Rows = Sequence[Mapping[str, str]]


def explicit(num_layers: int) -> Variant:
    changes = {"model.network": {**SIZES, "num_layers": num_layers}, "model.solver": {"solver": "none"}}
    return Variant((CONFIG,), changes)


def equilibrium(num_layers: int, evaluations: int, solver: Mapping[str, Any] = MOMENTUM, outside: int = 0) -> Variant:
    """A map of so many layers, with so many layers before it and as many after it."""
    network = {**SIZES, "num_layers": num_layers, "num_prelude_layers": outside, "num_coda_layers": outside}
    stored = {"reversible_stored_evaluations": evaluations} if solver == MOMENTUM else {}
    return Variant(
        (CONFIG,), {"model.network": network, "model.solver": {**solver, "max_steps": evaluations, **stored}}
    )


LAST = {**LOOPED, "backprop_evaluations": 1}
TIED, FROM_INPUT = "tied", "from the input"
"""The output projection has the weights of the token embedding; the solve starts from the input of f instead of zero.
The package offers neither."""
STACKS = {n: f"explicit, {n} layer{'s' * (n > 1)}" for n in (1, 2, 3, 4, 8)}
VARIANTS = {
    **{name: explicit(n) for n, name in STACKS.items()},
    "RevDEQ, 1 x 4": equilibrium(1, 4),
    f"RevDEQ, 1 x 4, {FROM_INPUT}": equilibrium(1, 4),
    "RevDEQ, 2 x 4": equilibrium(2, 4),
    "1 + RevDEQ, 1 x 4 + 1": equilibrium(1, 4, outside=1),
    "1 + RevDEQ, 2 x 2 + 1": equilibrium(2, 2, outside=1),
    "1 + RevDEQ, 2 x 4 + 1": equilibrium(2, 4, outside=1),
    f"1 + RevDEQ, 2 x 4 + 1, {FROM_INPUT}": equilibrium(2, 4, outside=1),
    "1 + RevDEQ, 2 x 8 + 1": equilibrium(2, 8, outside=1),
    "1 + looped, 2 x 4 + 1": equilibrium(2, 4, LOOPED, outside=1),
    "1 + looped, 2 x 4 + 1, last evaluation": equilibrium(2, 4, LAST, outside=1),
    f"explicit, 4 layers, {TIED}": explicit(4),
    f"1 + RevDEQ, 2 x 4 + 1, {TIED}": equilibrium(2, 4, outside=1),
    "RevDEQ, 1 x 8": equilibrium(1, 8),
    "RevDEQ, 2 x 8": equilibrium(2, 8),
    "1 + RevDEQ, 2 x 16 + 1": equilibrium(2, 16, outside=1),
}
SHAPES = {  # layers outside and inside of the equilibrium, evaluations
    name: (2 * network.get("num_prelude_layers", 0), network["num_layers"], v.changes["model.solver"]["max_steps"])
    for name, v in VARIANTS.items()
    if "max_steps" in v.changes["model.solver"] and (network := v.changes["model.network"])
}


def make_tied(*arguments: Any) -> tuple[Any, Any]:
    task: Any
    task, data = make_text(*arguments)
    task.model.head.weight = task.model.embedding.token.weight
    return task, data


def make_from_input(*arguments: Any) -> tuple[Any, Any]:
    task: Any
    task, data = make_text(*arguments)
    task.model.equilibrium.register_forward_pre_hook(lambda layer, arguments: (arguments[0], arguments[0]))
    return task, data


MAKERS = {TIED: make_tied, FROM_INPUT: make_from_input}


def comparison(quick: bool, times: int) -> Part:
    longer = Budget(240 * times, 2e13 * times, 3000 * times, 0, 1000 * times)
    return Part(
        name="architecture",
        title="Layers around the equilibrium",
        variants=VARIANTS,
        optimizer=SETTINGS["model"]["optimizer"],
        make=make_text,
        figure=nats,
        unit="validation loss, nats per token",
        smaller_is_better=True,
        budget=Budget(0.5, 1e9, 60, 0, 2) if quick else longer,
        search_seconds=0,
        every=(200, 200) if quick else (1, 1),
        clip=SETTINGS["trainer"]["gradient_clip_val"],
    )


def stem(times: int) -> str:
    return "architecture" if times == 1 else f"architecture_x{times}"


def fill(options: Any) -> Rows:
    files = Files({"runs": options.output / f"{stem(options.times)}.csv"})
    chosen = comparison(options.quick, options.times)
    for seed in options.seeds:
        for name in options.only:
            if files.has("runs", variant=name, seed=seed):
                continue
            own = chosen._replace(make=MAKERS.get(name.rpartition(", ")[2], chosen.make))
            outcome = train(own, name, 1.0, seed, chosen.budget, options)
            row: dict[str, Any] = {"variant": name, "seed": seed, "parameters": outcome.parameters}
            for budget in BUDGETS:
                seconds, flops, steps = outcome.spent.get(budget, (float("nan"),) * 3)
                row |= {f"figure_{budget}": f"{outcome.at.get(budget, float('nan')):.4f}", f"steps_{budget}": steps}
                row |= {f"cpu_seconds_{budget}": f"{seconds:.1f}", f"tflop_{budget}": f"{flops / 1e12:.5g}"}
            times = f" --times {options.times}" if options.times > 1 else ""
            files.add("runs", [row | facts_of(f"python -m benchmarks.quality.architecture{times}")])
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return files.rows["runs"]


def of(rows: Rows, name: str, column: str) -> dict[int, float]:
    """A column of a model, by seed."""
    return {int(row["seed"]): float(row[column]) for row in rows if row["variant"] == name}


def phi(losses: Mapping[int, float], shape: tuple[int, int, int], loss: float) -> float | None:
    """The exponent with which an evaluation counts; None if the loss is outside of those of the stacks.

    Args:
        losses: Of explicit stacks, by their number of layers; they must fall with it.
        shape: Layers outside and inside of the equilibrium, evaluations.
        loss: Of the model.
    """
    depths = sorted(losses)
    if any(losses[a] <= losses[b] for a, b in itertools.pairwise(depths)):
        return None
    outside, inside, evaluations = shape
    for a, b in itertools.pairwise(depths):
        if losses[b] <= loss <= losses[a]:
            share = (losses[a] - loss) / (losses[a] - losses[b])
            layers = math.exp((1 - share) * math.log(a) + share * math.log(b))
            return math.log((layers - outside) / inside) / math.log(evaluations) if layers > outside else None
    return None


def exponents(rows: Rows, name: str) -> list[float]:
    """`phi` of each seed for which it is known."""
    found = []
    for seed, loss in of(rows, name, "figure_steps").items() if name in SHAPES else ():
        stacks = {n: of(rows, stack, "figure_steps").get(seed) for n, stack in STACKS.items()}
        exponent = phi({n: value for n, value in stacks.items() if value is not None}, SHAPES[name], loss)
        found += [] if exponent is None else [exponent]
    return found


def page(rows: Rows) -> str:
    sections = [
        "# Layers around the equilibrium",
        f"Written by `{rows[0]['command']}`; for the interpretation see [the README](../README.md)."
        f" {origins(rows)}. Validation loss in nats per token, mean of the seeds"
        " (minimum - maximum); averaged weights at a constant learning rate; all evaluations stored. `1 + RevDEQ, 2 x 4"
        " + 1`: one layer before the equilibrium of f with two layers, 4 evaluations, and one layer after it. phi: N"
        " evaluations of f count as `N^phi` times its layers in an explicit stack, interpolated, mean of the"
        " seeds for which it is known; empty outside of the stacks measured.",
    ]
    for budget, title in BUDGETS.items():
        lines: list[Sequence[str]] = []
        for name in VARIANTS:
            if not (found := of(rows, name, f"figure_{budget}")):
                continue
            steps, tflop, seconds = (
                mean(of(rows, name, f"{kind}_{budget}").values()) for kind in ("steps", "tflop", "cpu_seconds")
            )
            parameters = int(max(of(rows, name, "parameters").values()))
            worth = exponents(rows, name) if budget == "steps" else []
            exponent = (
                spread(worth, 2) + f", {len(worth)} of {len(found)} seeds" * (len(worth) < len(found)) if worth else ""
            )
            facts = (name, f"{parameters:,}", str(len(found)), f"{steps:.0f}", f"{tflop:.1f}", f"{seconds:.0f}")
            lines.append((*facts, spread(list(found.values()), 4), exponent))
        header = ("model", "parameters", "seeds", "steps", "TFLOP", "CPU seconds", "loss", "phi")
        sections += [f"## {title}", table(header, lines)]
    return "\n\n".join(sections) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = part.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--times", type=int, default=1, help="multiply all budgets; into a table of its own")
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder for prepared data")
    options = parser.parse_args(arguments)
    part.refuse_quick_results(parser, options)
    options.seeds = options.seeds[:1] if options.quick else options.seeds
    torch.set_num_threads(1)
    quieten_lightning()
    rows = fill(options)
    (options.output / f"{stem(options.times)}.md").write_text(page(rows))
    print(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
