"""Preparing text of any size: peak memory, speed of encoding, and the start of a run.

    python -m benchmarks.quality.text [--quick] [--largest MB] [--output DIR]

A text of made-up words with Zipf's frequencies, as lines that end in " . ", as JSON lines, and as a single line. The
memory is the largest resident size of the process that prepares it, with PyTorch and Lightning; there are no others.
What a run keeps is its own memory after 200 batches, without the pages of the memory map, which the system can drop.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from benchmarks import part
from benchmarks.requirements import Requirement, at_most
from revdeq_lightning.data.text.tokenizers import BytePairTokenizer

KINDS = {"lines": "txt", "JSON lines": "jsonl", "one line": "txt"}
MAX_BYTES, MAX_GROWTH_BYTES, MIN_SPEED, MAX_SECONDS = 1.5e9, 50e6, 0.8, 2.0
CHILD = """
import itertools, json, sys, time
from revdeq_lightning.data.text.module import TextDataModule
def size(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
imported, anonymous, start = size("VmHWM"), size("RssAnon"), time.perf_counter()
data = TextDataModule("files", sys.argv[1], tokenizer=sys.argv[2], cache_dir=sys.argv[3], context_length=128)
data.setup("fit")
peak = size("VmHWM")  # the batches come from a memory map, whose pages would count
batches = iter(data.train_dataloader())
next(batches)
seconds = time.perf_counter() - start
for _ in itertools.islice(batches, 200):
    pass
found = {"peak_bytes": peak, "kept_bytes": size("RssAnon") - anonymous, "imported_bytes": imported}
print(json.dumps(found | {"seconds": seconds, "tokens": sum(data.found()["tokens"].values())}))
"""


class Prepared(NamedTuple):
    """A text and where its tokens are."""

    path: Path
    tokenizer: str
    cache: Path

    def start(self) -> dict[str, Any]:
        """What a process reports that starts a run on the text, and prepares it the first time."""
        command = [sys.executable, "-c", CHILD, str(self.path), self.tokenizer, str(self.cache)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of made-up words, each with a number of its own."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = ["".join(draw.choices(syllables, k=1 + draw.randrange(5))) for _ in range(20_000)]
    weights = np.cumsum(1 / np.arange(1, len(words) + 1)).tolist()
    return [f"{' '.join(draw.choices(words, cum_weights=weights, k=20))} {number}" for number in range(count)]


def write(path: Path, kind: str, num_bytes: float) -> None:
    lines = [f"{sentence} . " for sentence in sentences(100_000)]
    if kind == "JSON lines":
        lines = [json.dumps({"id": number, "text": line}) for number, line in enumerate(lines)]
    text = ("" if kind == "one line" else "\n").join([*lines, ""])
    with path.open("w") as file:
        while (left := int(num_bytes) - file.tell()) > 0:
            file.write(text if left > len(text) else text[: text.find("}\n", left) + 2 if "}" in text else left])


def encoding_speed(tokenizer: BytePairTokenizer, num_lines: int, rounds: int) -> dict[str, float]:
    """Median megabytes a second of ours and of the library's batches of lines, one after the other in each round."""
    lines = [f"{sentence} . \n" for sentence in sentences(num_lines, seed=1)]
    text, library = "".join(lines), Tokenizer.from_str(tokenizer.state()["definition"])
    runs = {
        "ours": lambda: sum(len(ids) for ids in tokenizer.encode_parts([text])),
        "encode_batch": lambda: len(library.encode_batch(lines)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: len(text) / 1e6 / median(values[1:]) for name, values in seconds.items()}


def measure(megabytes: Sequence[float], quick: bool) -> part.Result:
    """Prepare each kind in each size, and start runs from the smallest and the largest text of lines."""
    memory, starts = [], []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sample = "".join(f"{sentence} . \n" for sentence in sentences(3000 if quick else 60_000, seed=2))
        learned = BytePairTokenizer.train([sample], 8192)
        speed = encoding_speed(learned, 2000 if quick else 6000, 8)
        stored = folder / "tokenizer.json"
        stored.write_text(learned.state()["definition"])
        for kind, suffix in KINDS.items():
            for size in megabytes:
                text = Prepared(folder / f"text.{suffix}", "bpe" if kind == "lines" else str(stored), folder / "cache")
                write(text.path, kind, size * 1e6)
                found = text.start()
                memory.append({"kind": kind, "megabytes": size, "tokenizer": Path(text.tokenizer).name} | found)
                print(memory[-1], flush=True)
                if kind == "lines" and size in (megabytes[0], megabytes[-1]):
                    again = [text.start() for _ in range(3)]
                    starts.append(
                        {"megabytes": size} | {n: median(a[n] for a in again) for n in ("seconds", "kept_bytes")}
                    )
                shutil.rmtree(text.cache)
    tables = {"memory": memory, "starts": starts, "speed": [speed]}
    return part.Result(tables, judge(memory, starts, speed, quick), page(memory, starts, speed), packages=PACKAGES)


PACKAGES = ("tokenizers", "datasets", "pyarrow")


def judge(
    memory: Sequence[dict[str, Any]], starts: Sequence[dict[str, Any]], speed: dict[str, float], quick: bool
) -> list[Requirement]:
    verdict = []
    for kind in KINDS:
        own = [row for row in memory if row["kind"] == kind]
        peak, growth = max(row["peak_bytes"] for row in own), own[-1]["peak_bytes"] - own[0]["peak_bytes"]
        verdict.append(at_most(f"{kind}: peak memory, bytes", peak, MAX_BYTES, "{:.3g}"))
        what = f"{kind}: growth from {own[0]['megabytes']:g} to {own[-1]['megabytes']:g} MB, bytes"
        verdict.append(at_most(what, growth, MAX_GROWTH_BYTES, "{:.2g}", not quick))
    ratio = speed["encode_batch"] / speed["ours"]
    verdict.append(at_most("time of encoding over encode_batch", ratio, 1 / MIN_SPEED, "{:.2f}", not quick))
    small, large = starts[0], starts[-1]
    name = f"start of a run: {large['megabytes']:g} MB over {small['megabytes']:g} MB"
    verdict.append(at_most(f"{name}, s", large["seconds"] - small["seconds"], MAX_SECONDS, "{:.2f}"))
    grown = large["kept_bytes"] - small["kept_bytes"]
    verdict.append(at_most(f"{name}, bytes kept", grown, MAX_GROWTH_BYTES, "{:.2g}"))
    return verdict


def page(memory: Sequence[dict[str, Any]], starts: Sequence[dict[str, Any]], speed: dict[str, float]) -> list[str]:
    rows = [
        {
            "text": row["kind"],
            "MB": row["megabytes"],
            "tokenizer": row["tokenizer"],
            "tokens": f"{row['tokens']:,}",
            "seconds": round(row["seconds"]),
            "peak, MB": round(row["peak_bytes"] / 1e6),
            "of which imports, MB": round(row["imported_bytes"] / 1e6),
        }
        for row in memory
    ]
    started = [
        {
            "MB": row["megabytes"],
            "seconds to the first batch": row["seconds"],
            "kept after 200 batches, MB": round(row["kept_bytes"] / 1e6, 1),
        }
        for row in starts
    ]
    return [
        "Preparing a text: reading, learning the BPE (`bpe`; else from a tokenizer.json), encoding, writing.",
        part.markdown_table(rows),
        f"Encoding: {speed['ours']:.2f} MB/s; `encode_batch` of the lines {speed['encode_batch']:.2f} MB/s.",
        "Starting a run on a prepared text:",
        part.markdown_table(started),
    ]


def run(options: argparse.Namespace) -> part.Result:
    os.environ["TQDM_DISABLE"] = "1"
    sizes = (1, 3) if options.quick else (*(s for s in (100, 300) if s < options.largest), options.largest)
    return measure(sizes, options.quick)


LARGEST = {"type": float, "default": 1000, "metavar": "MB", "help": "size of the largest text"}
main = part.command(
    "quality.text",
    "Preparing text of any size",
    __doc__,
    run,
    options={"--largest": LARGEST},
    needs=lambda options: f"--largest {options.largest:g}",
)

if __name__ == "__main__":
    sys.exit(main())
