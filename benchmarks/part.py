"""Common code of the parts of `make bench`: the command line and the output files.

`NAME.json` (command, date, hardware, versions, commit, verdict), `NAME.md` (the page), `NAME_TABLE.csv` (`NAME.csv` for
a table without a name) and, from parts with a figure, `NAME.png`. The exit code is 1 if a requirement is missed.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

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


def options(description: str) -> argparse.ArgumentParser:
    """Parser with the common options of all parts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that it works; times are meaningless"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="output folder")
    return parser


def run(
    module: str,
    title: str,
    measure: Callable[[], Result],
    *,
    quick: bool,
    output: Path,
    needs: str = "",
    suffix: str = "",
) -> int:
    """Measure, write and print the results, and return the exit code.

    Args:
        module: Module of the part within `benchmarks`; its last name is the name of the results.
        title: Title of the page.
        measure: Function that measures.
        quick: Whether sizes are tiny.
        output: Output folder.
        needs: Options of the command, shown on the page.
        suffix: Suffix of the results' name.
    """
    name = module.rsplit(".", 1)[-1] + suffix
    output.mkdir(parents=True, exist_ok=True)
    facts = provenance(" ".join(["python -m", f"benchmarks.{module}", *needs.split(), *["--quick"] * quick]))
    start = time.perf_counter()
    try:
        result = measure()
    except Skipped as reason:
        print(f"skipped: {reason}")
        return 0
    facts["seconds"] = round(time.perf_counter() - start)
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


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, with the keys as header."""
    return table(list(rows[0]), [[shown(value) for value in row.values()] for row in rows])


def shown(value: Any) -> str:
    """Text of a cell; floats with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
