"""Where and with what a run was made: commit, versions, hardware, command; no PyTorch needed to read it."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "lightning", "torchmetrics", "numpy", "wandb", "datasets", "tokenizers"),
    *("jsonargparse", "omegaconf", "safetensors", "scikit-learn", "pillow", "matplotlib", "tensorboard"),
)
"""Those whose versions are kept."""


def describe_environment(num_processes: int = 1) -> dict[str, Any]:
    """Plain containers, as they stand in `environment.json` and in the configuration of a W&B run."""
    import torch

    from revdeq_lightning import __version__

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(_command()),
        "num_processes": num_processes,
        "git_commit": git("rev-parse", "HEAD") if _is_tracked() else None,
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")) if _is_tracked() else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"revdeq-lightning": __version__} | _versions(),
        "hardware": {
            "hostname": platform.node(),
            "cpu": cpu_name(),
            "num_cpus": _num_cpus(),
            "num_threads": torch.get_num_threads(),
            "memory_bytes": _memory_bytes(),
            "gpus": gpus,
        },
    }


def write_environment(path: Path, environment: dict[str, Any]) -> None:
    """Write it; where the file is there already, a run was resumed, what it held comes under `earlier_starts`."""
    earlier: list[dict[str, Any]] = []
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier_starts", []), before]
    content = environment | ({"earlier_starts": earlier} if earlier else {})
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git(*arguments: str) -> str:
    """What git says in the folder of this package, nothing where it fails."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _is_tracked() -> bool:
    """Whether this file is under git: an installed package may lie in a folder of somebody else's repository."""
    return bool(git("ls-files", Path(__file__).name))


def _command() -> list[str]:
    """As typed: `python -m PACKAGE` shows the path of its file in `sys.argv`."""
    program, *arguments = sys.argv
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        return ["python", program, *arguments] if program.endswith(".py") else [program, *arguments]
    return ["python", "-m", spec.name.removesuffix(".__main__"), *arguments]


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _num_cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None
