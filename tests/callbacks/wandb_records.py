"""Offline W&B runs, read back through W&B's own command."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def read_back(folder: Path) -> "Records":
    """What `wandb leet inspect` says of a folder that holds one run, perhaps in several parts."""
    lines: list[dict[str, Any]] = []
    for part in sorted((folder / "wandb").glob("offline-run-*")):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(part)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        lines += [json.loads(line) for line in result.stdout.splitlines()]
    return Records(lines)


class Records:
    """The records of a run."""

    def __init__(self, lines: list[dict[str, Any]]):
        self.of = {kind: [line[kind] for line in lines if line["type"] == kind] for kind in {x["type"] for x in lines}}

    @property
    def history(self) -> list[dict[str, Any]]:
        return [record["item"] for record in self.of["history"]]

    @property
    def keys(self) -> set[str]:
        """Keys of numbers, and of media by their own names."""
        own = {key.split("._")[0] if "._" in key else key for item in self.history for key in item}
        media = {key.rsplit(".", 1)[0] for item in self.history for key in item if key.endswith("._type")}
        fields = {key for key in own if key.rsplit(".", 1)[0] in media}
        return {key for key in (own - fields) | media if not key.startswith("_")}

    def values(self, key: str) -> list[tuple[int, float]]:
        """(x axis, value) of a number."""
        return [(item["trainer/global_step"], item[key]) for item in self.history if key in item]

    def media(self, key: str) -> list[dict[str, Any]]:
        """What was logged of a medium each time."""
        prefix = f"{key}."
        found = [{k.removeprefix(prefix): v for k, v in item.items() if k.startswith(prefix)} for item in self.history]
        return [fields for fields in found if fields]

    @property
    def config(self) -> dict[str, Any]:
        return {key: value for record in self.of["config"] for key, value in record["update"].items()}

    @property
    def files(self) -> set[str]:
        return {file["path"] for record in self.of["files"] for file in record["files"]}


def wandb_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each key of `wandb_metrics.csv`."""
    found: dict[str, list[tuple[int, float]]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key != "step":
                    found.setdefault(key, []).append((int(row["step"]), float(value)))
    return found
