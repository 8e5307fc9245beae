"""Environment of a run: commit, versions, hardware, command. Readable without PyTorch."""

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "lightning", "torchmetrics", "numpy", "wandb", "datasets", "tokenizers"),
    *("jsonargparse", "omegaconf", "safetensors", "scikit-learn", "pillow", "matplotlib", "tensorboard"),
)
"""Packages whose versions are recorded."""


def describe_environment(num_processes: int = 1) -> dict[str, Any]:
    """Environment in plain containers, for `environment.json` and the configuration of a W&B run."""
    import torch

    from revdeq_lightning import __version__

    # An installed package may be inside an unrelated repository.
    is_tracked = bool(git("ls-files", Path(__file__).name))
    versions = {"revdeq-lightning": __version__}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "num_processes": num_processes,
        "git_commit": git("rev-parse", "HEAD") if is_tracked else None,
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")) if is_tracked else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "hardware": {
            "hostname": platform.node(),
            "cpu": cpu_name(),
            "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "num_threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write_environment(path: Path, environment: dict[str, Any]) -> None:
    """Write the environment; those of earlier starts of a resumed run move to `earlier_starts`."""
    earlier: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, AttributeError, TypeError):  # missing or damaged
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier_starts", []), before]
    content = environment | ({"earlier_starts": earlier} if earlier else {})
    replace_text(path, json.dumps(content, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: a kill or a full disk leaves the old one intact."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def cpu_name() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git(*arguments: str) -> str:
    """Output of git in the folder of this package, empty if it fails."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
