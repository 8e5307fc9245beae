"""Files of rows with their optimizer step; a resumed run drops the rows after its checkpoint."""

import csv
import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revdeq_lightning.errors import RecordWarning
from revdeq_lightning.runs.environment import replace_text


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append to a CSV file, adding columns where needed, or to a `.jsonl` file with a JSON object per line.

    If it fails, for instance on a full disk, the file is left unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: list[str] = []
    if path.suffix == ".csv" and path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
    if path.suffix == ".csv" and not set().union(*rows) <= set(columns):
        write_rows(path, [*read_rows(path), *rows])
        return
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(_text(path, columns, rows))
    except OSError:
        if path.is_file():
            os.truncate(path, size)  # remove a partial row
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all rows, those of a CSV file as text; none without the file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]  # a kill may have cut the last one
    return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(lines))


def read_table(path: Path) -> list[dict[str, float]]:
    """Read the rows of a CSV file of numbers; an empty field is NaN."""
    try:
        return [{key: float(text or math.nan) for key, text in row.items()} for row in read_rows(path)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of numbers: {error}") from None


def rewind_rows(path: Path, step: int) -> None:
    """Drop the rows of this step and later ones. A damaged file is moved aside with a warning."""
    try:
        rows = read_rows(path)
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a row has too few or too many fields")
        kept = [row for row in rows if int(row["step"]) < step]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        names = (path.with_name(f"{path.stem}.damaged-{n}{path.suffix}") for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        path.replace(aside)
        text = f"{path} is damaged ({error!r}): moved to {aside.name}, and a new file is started"
        warnings.warn(text, RecordWarning, stacklevel=2)
        return
    if kept:
        write_rows(path, kept)
    else:
        path.unlink(missing_ok=True)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of these rows atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    header = [{key: key for key in columns}] if path.suffix == ".csv" else []
    replace_text(path, _text(path, columns, [*header, *rows]))


def _text(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    file = io.StringIO()
    csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)
    return file.getvalue()
