"""Files of rows that carry their optimizer step; a resumed run drops what came after its checkpoint."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append to a CSV file, or to one of JSON objects, a line each (`.jsonl`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
            return
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What was appended; of a CSV file strings."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))


def rewind_rows(path: Path, step: int) -> None:
    """Drop the rows of this step and later ones."""
    rows = read_rows(path)
    kept = [row for row in rows if int(row["step"]) < step]
    if len(kept) < len(rows):
        path.unlink()
        if kept:
            append_rows(path, kept)
