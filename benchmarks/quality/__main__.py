"""Quality at equal cost: explicit, looped, DEQ and RevDEQ models at equal training FLOPs and at equal CPU time.

    python -m benchmarks.quality --text tinyshakespeare.txt [--images cifar10-train.tar.xz] [--quick]
                                 [--only NAME ...] [--seeds 0 1 2]

All models have the same optimizer. First, three short runs of each model compare its learning rates times 1/4, 1/2, and
1, with the same seed and CPU time. With the best rates, it is trained until both budgets are spent, once per seed. One
process, one thread. Runs that are already in the output are skipped, so that the tables can be filled in parts.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning import LightningModule

from benchmarks.measure import write_csv
from benchmarks.part import parser as parser_of_parts, refuse_quick_results
from benchmarks.quality.budget import Budget, Outcome, scaled, settings_of, spend
from benchmarks.quality.page import draw, page
from benchmarks.quality.training import facts_of, read
from revdeq_lightning.cli.quiet import quieten_lightning
from revdeq_lightning.data.images.augmentation import AugmentationConfig
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.models import ClassifierConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig

SEARCH_SEED = 100


class Variant(NamedTuple):
    """A model of the comparison: configuration files, each overriding the previous ones, and changed settings."""

    configs: tuple[str, ...]
    changes: Mapping[str, Any] = MappingProxyType({})


class Part(NamedTuple):
    """A data set with its models and budgets.

    Attributes:
        name: Name of the option and the files.
        title: Heading.
        variants: Models by name.
        optimizer: Settings of the optimizer that all models use.
        make: `(settings, data path, seed, cache)` returns task and data.
        figure: `(task, batch)` returns the sum over the batch and the number of items.
        unit: Description of the figure.
        smaller_is_better: Whether a smaller figure is better.
        budget: Budget of a run.
        search_seconds: CPU seconds of a run of the learning-rate search.
        rates: Factors of the learning rates to try.
        every: Curves and depths use every `every[0]`th batch of the validation split, the final figures every
            `every[1]`th.
        clip: Largest norm of the gradient.
    """

    name: str
    title: str
    variants: Mapping[str, Variant]
    optimizer: Mapping[str, Any]
    make: Callable[[dict[str, Any], Any, int, Path], tuple[LightningModule, Any]]
    figure: Callable[[Any, Any], tuple[float, float]]
    unit: str
    smaller_is_better: bool
    budget: Budget
    search_seconds: float
    rates: tuple[float, ...] = (0.25, 0.5, 1.0)
    every: tuple[int, int] = (4, 1)
    clip: float | None = None


def make_text(settings: dict[str, Any], path: Path | None, seed: int, cache: Path) -> tuple[LightningModule, Any]:
    own = {"path": None if path is None else str(path), "seed": seed, "cache_dir": str(cache)}
    data = TextDataModule(**settings["data"] | own)
    model = settings["model"]
    sizes = {"vocab_size": data.vocab_size, "context_length": settings["data"]["context_length"]}
    options = (TransformerConfig(**sizes, **model["network"]), SolverConfig(**model["solver"]))
    weight = model.get("jacobian_weight", 0.0)
    return LanguageModelingTask(*options, OptimizerConfig(**model["optimizer"]), jacobian_weight=weight), data


def nats(task: Any, batch: Any) -> tuple[float, float]:
    output = task.model.loss(batch.tokens, batch.targets)
    return float(output.loss * output.num_targets), float(output.num_targets)


def make_images(settings: dict[str, Any], path: Path, seed: int, cache: Path) -> tuple[LightningModule, Any]:
    chosen = {"source": "folder", "path": str(path), "seed": seed, "cache_dir": str(cache)}
    chosen["augmentation"] = AugmentationConfig(**settings["data"]["augmentation"])
    data = ImageDataModule(**settings["data"] | chosen)
    data.prepare_data()
    data.setup("fit")
    model = settings["model"]
    network = ClassifierConfig(num_classes=data.num_classes, num_channels=data.num_channels, **model["network"])
    options = {"label_smoothing": model["label_smoothing"], "jacobian_weight": model.get("jacobian_weight", 0.0)}
    task = ClassificationTask(
        network, SolverConfig(**model["solver"]), OptimizerConfig(**model["optimizer"]), **options
    )
    return task, data


def accuracy(task: Any, batch: Any) -> tuple[float, float]:
    sums = task.evaluation_sums(batch)
    return float(100 * sums["accuracy"]), float(sums["count"])


LM = "configs/lm/tinyshakespeare.yaml"


def text(name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Variant:
    """An overlay of the language model's configuration file."""
    return Variant((LM, LM.replace(".yaml", f"{name}.yaml")), changes)


TEXT = Part(
    name="text",
    title="Tiny Shakespeare",
    variants={
        "explicit, 4 layers": text("_explicit"),
        "explicit, 1 layer": text("_explicit", {"model.network.num_layers": 1}),
        "looped": text("_looped"),
        "looped, truncated": text("_looped_truncated"),
        "DEQ": text("_deq"),
        "DEQ, Jacobian": text("_deq_jacobian"),
        "RevDEQ, paper's solver": text("_revdeq"),
        "RevDEQ, momentum": Variant((LM,)),
    },
    optimizer=settings_of([LM])["model"]["optimizer"],
    make=make_text,
    figure=nats,
    unit="validation loss, nats per character",
    smaller_is_better=True,
    budget=Budget(cpu_seconds=90, flops=5.0e12, longest=180),
    search_seconds=20,
)
SMALL = {"model.network.channels": [16, 32, 64]}
STAGES = "configs/cifar10/cpu.yaml"


def stages(**solver: Any) -> Variant:
    """The same stages with a different solver or adjoint."""
    return Variant((STAGES,), SMALL | {"model.solver": solver})


DEQ = settings_of(["configs/cifar10/mdeq.yaml"])["model"]["solver"]
IMAGES = Part(
    name="images",
    title="CIFAR-10",
    variants={
        "ResNet": Variant(("configs/cifar10/resnet_matched.yaml",), {"model.network.channels": [32, 48, 64]}),
        "looped": stages(solver="picard", max_steps=4, adjoint="backprop"),
        "looped, truncated": stages(solver="picard", max_steps=8, adjoint="backprop", backprop_evaluations=2),
        "DEQ": stages(**DEQ),
        "DEQ, Jacobian": Variant((STAGES,), SMALL | {"model.solver": DEQ, "model.jacobian_weight": 0.1}),
        "MDEQ": Variant(("configs/cifar10/mdeq.yaml",), SMALL),
        "RevDEQ, paper's solver": stages(solver="reversible", beta=0.8, max_steps=2),
        "RevDEQ, momentum": stages(solver="momentum", max_steps=4),
    },
    optimizer=settings_of([STAGES])["model"]["optimizer"],
    make=make_images,
    figure=accuracy,
    unit="validation accuracy, %",
    smaller_is_better=False,
    budget=Budget(cpu_seconds=150, flops=1.2e13, longest=300),
    search_seconds=30,
)
PARTS = (TEXT, IMAGES)


def quick(part: Part) -> Part:
    """Reduce the part to a smoke run, whose figures are meaningless."""
    budget = part.budget._replace(cpu_seconds=2, flops=part.budget.flops / 100, longest=3, num_points=2)
    return part._replace(budget=budget, search_seconds=0.5, rates=(1.0,), every=(40, 10))


class Files:
    """Tables of results, by kind, that are written after each run."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = paths
        self.rows = {kind: read(path) for kind, path in paths.items()}

    def has(self, kind: str, **key: Any) -> bool:
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows[kind])

    def add(self, kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to their file immediately."""
        self.rows[kind] += [{name: str(value) for name, value in row.items()} for row in rows]
        if self.rows[kind]:
            self.paths[kind].parent.mkdir(parents=True, exist_ok=True)
            write_csv(self.paths[kind], self.rows[kind])


def train(
    part: Part,
    name: str,
    rate: float,
    seed: int,
    budget: Budget,
    options: argparse.Namespace,
    evaluate: Callable[[LightningModule, Any, bool], Any] | None = None,
) -> Outcome:
    """Make one run; `evaluate` instead of the part's figure on the validation split."""
    variant = part.variants[name]
    settings = settings_of(variant.configs, variant.changes)
    settings["model"]["optimizer"] = scaled(part.optimizer, rate)
    path = getattr(options, part.name, None)

    def validate(task: LightningModule, data: Any, whole: bool) -> float:
        sums = [0.0, 0.0]
        for i, batch in enumerate(data.val_dataloader()):
            if i % part.every[whole] == 0:
                found = part.figure(task, data.on_after_batch_transfer(batch, 0))
                sums = [a + b for a, b in zip(sums, found, strict=True)]
        return sums[0] / sums[1]

    return spend(lambda: part.make(settings, path, seed, options.cache), evaluate or validate, budget, seed, part.clip)


def best_rate(part: Part, name: str, files: Files, options: argparse.Namespace) -> float:
    """Find the best factor of the learning rates, making missing search runs."""
    seconds = part.search_seconds
    budget = Budget(cpu_seconds=seconds, flops=float("inf"), longest=seconds, num_points=0)
    for rate in part.rates:
        if not files.has("search", variant=name, rate=rate):
            outcome = train(part, name, rate, SEARCH_SEED, budget, options)
            figure = outcome.at.get("cpu", float("nan"))
            files.add("search", [{"variant": name, "rate": rate, "figure": f"{figure:.4f}"}])
            print(f"{part.name}: {name}, rates x {rate}: {figure:.4f}", flush=True)
    found = {float(r["rate"]): float(r["figure"]) for r in files.rows["search"] if r["variant"] == name}
    usable = {rate: figure for rate, figure in found.items() if figure == figure}
    if not usable:
        raise RuntimeError(f"{name}: no rate of {part.rates} gave a finite figure")
    return (min if part.smaller_is_better else max)(usable, key=usable.__getitem__)


def fill(part: Part, options: argparse.Namespace) -> Files:
    kinds = ("search", "runs", "curves", "depths")
    files = Files({kind: options.output / f"quality_{part.name}_{kind}.csv" for kind in kinds})
    names = [name for name in part.variants if not options.only or name in options.only]
    rates = {name: best_rate(part, name, files, options) for name in names}
    for seed in options.seeds:
        for name in names:
            if files.has("runs", variant=name, seed=seed):
                continue
            outcome = train(part, name, rates[name], seed, part.budget, options)
            row = row_of(name, seed, rates[name], outcome)
            key = {"variant": name, "seed": seed}
            columns = ("cpu_seconds", "flops", "steps", "figure")
            files.add("curves", [key | dict(zip(columns, point, strict=True)) for point in outcome.curve])
            files.add("depths", [key | {"evaluations": n, "figure": figure} for n, figure in outcome.depths])
            told = f"python -m benchmarks.quality --{part.name} {getattr(options, part.name).name}"
            files.add("runs", [row | facts_of(told)])
            print(
                f"{part.name}: {name}, seed {seed}: {row['figure_cpu']} after {row['cpu_minutes_cpu']} CPU minutes,"
                f" {row['figure_flops']} after {row['tflop_flops']} TFLOP ({row['cpu_minutes_flops']} minutes)",
                flush=True,
            )
    return files


def row_of(name: str, seed: int, rate: float, outcome: Outcome) -> dict[str, Any]:
    """The outcome of a run as a row."""
    row: dict[str, Any] = {"variant": name, "seed": seed, "rate": rate, "parameters": outcome.parameters}
    row |= {"evaluations": f"{outcome.forward_nfe:.2f}", "peak_mib": f"{outcome.peak_bytes / 2**20:.1f}"}
    for budget in ("cpu", "flops"):
        seconds, flops, steps = outcome.spent.get(budget, (float("nan"),) * 3)
        row |= {
            f"figure_{budget}": f"{outcome.at.get(budget, float('nan')):.4f}",
            f"cpu_minutes_{budget}": f"{seconds / 60:.2f}",
            f"tflop_{budget}": f"{flops / 1e12:.6g}",
            f"steps_{budget}": steps,
        }
    return row


def main() -> None:
    parser = parser_of_parts(__doc__)
    parser.add_argument("--text", type=Path, help="tiny Shakespeare, a text file")
    parser.add_argument("--images", type=Path, help="CIFAR-10, a folder or tar archive with train/CLASS/*")
    parser.add_argument("--only", nargs="+", choices=[name for part in PARTS for name in part.variants])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder for prepared data")
    options = parser.parse_args()
    if options.text is None and options.images is None:
        print("skipped: no data; pass --text FILE (tiny Shakespeare), --images PATH (CIFAR-10), or both")
        return
    refuse_quick_results(parser, options)
    options.seeds = options.seeds[:1] if options.quick else options.seeds
    for path in (options.text, options.images):
        if path is not None and not path.exists():
            parser.error(f"no such file or folder: {path}")
    torch.set_num_threads(1)
    quieten_lightning()
    results: list[tuple[Part, dict[str, Any]]] = []
    for part in PARTS:
        if getattr(options, part.name) is None:
            print(f"{part.title}: skipped, no --{part.name} PATH", file=sys.stderr)
            continue
        part = quick(part) if options.quick else part
        results.append((part, fill(part, options).rows))
    if results:
        (options.output / "quality.md").write_text(page(results))
        draw(options.output / "quality.png", results)
        print(page(results))


if __name__ == "__main__":
    main()
