"""Common code of the parts of `make bench`: the command line and the output files.

`NAME.json` (command, date, hardware, versions, commit, verdict), `NAME.md` (the page), `NAME_TABLE.csv` (`NAME.csv` for
a table without a name) and, from parts with a figure, `NAME.png`. The exit code is 1 if a requirement is missed.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.measure import provenance, write_csv
from benchmarks.report import VERDICT_HEADER, aligned, origin, table, verdict_lines
from benchmarks.requirements import Requirement, Rows

RESULTS = Path(__file__).parent / "results"


class Skipped(Exception):
    """The part cannot run here; the message says why and what to do."""


class Result(NamedTuple):
    """Results of a part."""

    tables: Mapping[str, Rows]
    verdict: Sequence[Requirement]
    page: Sequence[str]
    """Paragraphs of Markdown that follow title, provenance, and verdict."""
    draw: Callable[[Path], None] | None = None
    packages: Sequence[str] = ()
    """Distributions whose versions matter, besides torch."""


class Misused(Exception):
    """The options cannot be meant so; the message says why."""


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that it works; times are meaningless"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="output folder")
    return parser


def refuse_quick_results(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where a smoke run would be written among the results."""
    if options.quick and options.output == RESULTS:
        parser.error("--quick produces meaningless figures: choose another folder with --output")


def command(
    module: str,
    title: str,
    description: str | None,
    measure: Callable[[argparse.Namespace], Result],
    *,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    needs: Callable[[argparse.Namespace], str] = lambda options: "",
    suffix: Callable[[argparse.Namespace], str] = lambda options: "",
) -> Callable[[Sequence[str] | None], int]:
    """The function `main` of a part: parse the options, measure on one thread, write and print; returns the exit code.

    Args:
        module: Module of the part within `benchmarks`; its last name is the name of the results.
        title: Title of the page.
        description: Text of `--help`.
        measure: Function of the options that measures.
        options: The part's own options, and how the parser takes them.
        needs: Words of the command that the page shows, besides its module.
        suffix: Suffix of the results' name.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        own = parser(description)
        for name, settings in options.items():
            own.add_argument(name, **settings)
        given = own.parse_args(arguments)
        torch.set_num_threads(1)
        name = module.rsplit(".", 1)[-1] + suffix(given)
        words = ["python -m", f"benchmarks.{module}", *needs(given).split(), *["--quick"] * given.quick]
        facts, start = provenance(" ".join(words)), time.perf_counter()
        try:
            result = measure(given)
        except Skipped as reason:
            print(f"skipped: {reason}")
            return 0
        except Misused as error:
            own.error(str(error))
        facts["seconds"] = round(time.perf_counter() - start)
        return write(given.output, name, title, facts, result)

    return main


def write(output: Path, name: str, title: str, facts: dict[str, Any], result: Result) -> int:
    output.mkdir(parents=True, exist_ok=True)
    facts["versions"] |= {package: metadata.version(package) for package in result.packages}
    facts["verdict"] = [r._asdict() for r in result.verdict]
    (output / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    for key, rows in result.tables.items():
        write_csv(output / (f"{name}_{key}.csv" if key else f"{name}.csv"), rows)
    paragraphs = [f"# {title}", origin(facts)]
    if result.verdict:
        paragraphs.append(table(VERDICT_HEADER, verdict_lines(result.verdict)))
    if result.draw is not None:
        result.draw(output / f"{name}.png")
        paragraphs.append(f"![{title}]({name}.png)")
    (output / f"{name}.md").write_text("\n\n".join([*paragraphs, *result.page]) + "\n")
    print("\n\n".join(result.page))
    if result.verdict:
        print("\n" + aligned(VERDICT_HEADER, verdict_lines(result.verdict)))
    print(f"\n{output / f'{name}.md'}")
    return int(any(r.is_judged and not r.is_met for r in result.verdict))


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float], **settings: Any) -> Iterator[Any]:
    """Axes to draw on, in an array of this shape; drawn without frames, with a grid, and saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **settings)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return table(list(rows[0]), [[shown(value) for value in row.values()] for row in rows])


def shown(value: Any) -> str:
    """Text of a cell; floats with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
