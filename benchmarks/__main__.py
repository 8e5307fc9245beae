"""Run all benchmarks in turn and write their verdicts to the page.

    python -m benchmarks [--quick] [--repository PATH] [--text FILE] [--images PATH] [--only PART ...] [--output DIR]

Each part is a separate command (`python -m benchmarks.PART`). A part whose requirements (the authors' repository, jax,
torchdeq, a data set) are missing is skipped and reports the reason. The exit code is 1 if any part missed a requirement
or failed. `--quick` takes less than ten minutes on two cores and checks that everything works: its times are
meaningless, and nothing is written to the repository.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.part import RESULTS
from benchmarks.report import aligned, table

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- verdict: written by `make bench` -->", "<!-- end of the verdict -->"


class Part(NamedTuple):
    """A command and what it measures."""

    module: str
    """Module within `benchmarks`; its last name is the name of the part and its results."""
    title: str
    needs: tuple[str, ...] = ()
    """Options of this program to pass on; the part is skipped if none of them is given."""

    @property
    def name(self) -> str:
        return self.module.rsplit(".", 1)[-1]


PARTS = (
    Part("core", "the core: exactness, convergence, cost, memory"),
    Part("core.precision", "gradient error by the unit of the state"),
    Part("core.classifier_cost", "classifiers compared with plain backpropagation"),
    Part("peers.authors", "the authors' JAX code", ("repository",)),
    Part("peers.torchdeq_peer", "torchdeq"),
    Part("core.depth", "which gradient at which depth"),
    Part("core.pairs", "every solver with every adjoint"),
    Part("core.gpu", "a GPU: its tests, exactness, overhead, training steps"),
    Part("quality", "quality at equal cost", ("text", "images")),
    Part("quality.reasoning_memory", "memory of a training step of a reasoner"),
    Part("quality.reasoning", "mazes: which gradient at equal steps, time, and memory"),
)


class Outcome(NamedTuple):
    """How a part ended: `met`, `MISSED`, `skipped` or `FAILED`."""

    part: Part
    verdict: str
    reason: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything works")
    parser.add_argument("--repository", type=Path, help="checkout of the authors' repository")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare, for the part quality")
    parser.add_argument("--images", type=Path, help="CIFAR-10 as train/CLASS/*, for the part quality")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    for name in ("repository", "text", "images"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: no such file or folder")
    output = options.output or (Path(tempfile.mkdtemp(prefix="bench-quick-")) if options.quick else RESULTS)
    outcomes = [run(part, options, output) for part in PARTS if options.only is None or part.name in options.only]
    if output == RESULTS:
        write_verdict(PAGE, RESULTS)
    rows = [(o.part.name, o.part.title, f"{o.verdict} {o.reason}", f"{o.seconds:.0f}") for o in outcomes]
    print("\n" + aligned(("part", "", "verdict", "seconds"), rows))
    return int(any(o.verdict in ("MISSED", "FAILED") for o in outcomes))


def run(part: Part, options: argparse.Namespace, output: Path) -> Outcome:
    """Run one part in a separate process and print its output as it arrives."""
    print(f"\n== {part.name}: {part.title}", flush=True)
    if importlib.util.find_spec(f"benchmarks.{part.module}") is None:
        return Outcome(part, "skipped", "(no such module)", 0.0)
    command = [sys.executable, "-m", f"benchmarks.{part.module}", "--output", str(output)]
    if options.quick:
        command.append("--quick")
    given = [name for name in part.needs if getattr(options, name) is not None]
    if part.needs and not given:
        reason = f"(no {' or '.join(f'--{name}' for name in part.needs)})"
        print(f"skipped: {reason}")
        return Outcome(part, "skipped", reason, 0.0)
    for name in given:
        command += [f"--{name}", str(getattr(options, name))]
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    skipped = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("skipped: "):
                skipped = line.removeprefix("skipped: ").strip()
    code = process.returncode
    seconds = time.monotonic() - start
    if code == 0:
        return Outcome(part, "skipped" if skipped else "met", f"({skipped})" if skipped else "", seconds)
    return Outcome(part, "MISSED" if code == 1 else "FAILED", "" if code == 1 else f"(exit code {code})", seconds)


def write_verdict(page: Path, results: Path) -> None:
    """Write the verdicts of the latest results between the two markers of the page: first of the parts, then others."""
    rows = []
    names = [name for part in PARTS for name in (part.name, f"{part.name}_cuda")]
    names += sorted({path.stem for path in results.glob("*.json")} - set(names))
    for name in names:
        path = results / f"{name}.json"
        facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for requirement in facts.get("verdict", []):
            verdict = "not judged" if not requirement["is_judged"] else "met" if requirement["is_met"] else "MISSED"
            origin = f"{facts['date'][:10]}, {facts['commit'][:7]}"
            link = f"[{name}](results/{name}.md)"
            rows.append((link, requirement["name"], requirement["required"], requirement["measured"], verdict, origin))
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} must contain the lines {BEGIN} and {END}, between which the verdict is written")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    verdict = table(("part", "what", "required", "measured", "verdict", "date, commit"), rows)
    page.write_text(f"{before}{BEGIN}\n\n{verdict}\n\n{after}")


if __name__ == "__main__":
    sys.exit(main())
