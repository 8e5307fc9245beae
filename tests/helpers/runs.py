"""Small runs of text, and run folders."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from revdeq_lightning.callbacks.cost import Cost
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.checkpoints.files import checksums, write_checksums
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.checkpoints.names import SUMS
from revdeq_lightning.checkpoints.sharded import VALUES, other_values, write_part
from revdeq_lightning.cli.main import main
from revdeq_lightning.data.text.module import TextDataModule
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig

# Tiny runs of the language model's task, in this process.


MUON = {"optimizer": "muon", "lr": 0.01, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "ema_decay": 0.9}


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    if not path.exists():
        numbers = torch.randint(97, 113, (1500,), generator=torch.Generator().manual_seed(0))
        path.write_text("".join(" " if i % 5 == 0 else chr(n) for i, n in enumerate(numbers.tolist())))
    return path


def tiny_data(folder: Path, **arguments) -> TextDataModule:
    arguments = {"tokenizer": "characters", "context_length": 8, "batch_size": 4, "seed": 3} | arguments
    return TextDataModule("files", path=str(text_file(folder)), cache_dir=str(folder / "cache"), **arguments)


def tiny_task(data: TextDataModule, *, solver=None, optimizer=None, seed=0, **settings) -> LanguageModelingTask:
    torch.manual_seed(seed)
    sizes = {"vocab_size": data.vocab_size, "context_length": 8, "d_model": 16, "num_heads": 2, "d_mlp": 24}
    solver = SolverConfig(**(solver or {"max_steps": 3, "mismatch": "raise"}))
    return LanguageModelingTask(TransformerConfig(**sizes), solver, OptimizerConfig(**(optimizer or MUON)), **settings)


def tiny_trainer(folder: Path, callbacks: list[Callback] = (), **settings) -> Trainer:
    settings = {"enable_progress_bar": False} | settings
    settings = {"enable_model_summary": False, "enable_checkpointing": False} | settings
    settings = {"max_steps": 20, "logger": False, "gradient_clip_val": 1.0, "log_every_n_steps": 2} | settings
    settings = {"check_val_every_n_epoch": None, "val_check_interval": 7, "num_sanity_val_steps": 0} | settings
    callbacks = [Cost(), FunctionEvaluations(), ResumableRandomState(), *callbacks]
    return Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        **{"devices": 1} | settings,
    )


def assert_equal(a, b, where="checkpoint"):
    """Of two states, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where


# The command line on a tiny model, in this process.


def tiny_config(folder: Path, *, network=None, **trainer) -> Path:
    config = {
        "model": {
            "network": network or {"d_model": 16, "num_heads": 2, "d_mlp": 24},
            "solver": {"max_steps": 3},
            "optimizer": {"optimizer": "muon", "lr": 0.01, "ema_decay": 0.9},
        },
        "data": {
            "source": "files",
            "path": str(text_file(folder)),
            "tokenizer": "characters",
            "context_length": 8,
            "batch_size": 4,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            **trainer,
        },
        "run": {"folder": str(folder / "runs"), "sample_tokens": 5, "sample_prompt": "a"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


def error_of(capsys: pytest.CaptureFixture, *arguments: object, code: int | None = None) -> str:
    """The one error that a command tells before it ends."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == code if code else stop.value.code
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


# Folders of runs as a training leaves them, written by hand.


FOLDER_STEPS = range(9, 100, 10)


def write_metrics(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(["step", *(key for row in rows for key in row)])
    lines = [",".join(str(row.get(key, "")) for key in keys) for row in rows]
    (folder / "metrics.csv").write_text("\n".join([",".join(keys), *lines]) + "\n")
    return folder


def training_rows(**changes: float) -> list[dict[str, object]]:
    """Ten logged steps of a language model, 0.5 s each; two validations and a test."""
    rows: list[dict[str, object]] = [
        {
            "step": step,
            "train/loss": 3 - 0.02 * step,
            "equilibrium/forward_nfe": 4.0,
            "equilibrium/backward_nfe": 4.0,
            "equilibrium/relative_residual": 10 ** (-1 - step / 50),
            "equilibrium/num_gradients": step + 1.0,
            "equilibrium/num_certified_gradients": step + 1.0,
            "equilibrium/total_forward_nfe": 4.0 * (step + 1),
            "equilibrium/total_backward_nfe": 4.0 * (step + 1),
            "system/tokens_per_second": 7000.0 + step,
            "system/seconds_per_step": 0.5,
            "system/peak_memory_bytes": 300 * 2**20,
            **{f"system/{part}_seconds": 0.1 * (i + 1) for i, part in enumerate(("data", "forward", "backward"))},
            **changes,
        }
        for step in FOLDER_STEPS
    ]
    rows += [{"step": step, "val/loss": 2.5 - step / 100, "val/bits_per_byte": 1.9} for step in (49, 99)]
    return [*rows, {"step": 100, "test/loss": 1.4567, "test/bits_per_byte": 1.605, "test/word_perplexity": 6418.0}]


def whole_run(folder: Path, beta: float = 0.8) -> Path:
    """A run with every file there is."""
    extra = {
        "gradient_error/bptt/relative_l2": 0.0,
        "gradient_error/converged/relative_l2": 0.09,
        "equilibrium/spectral_radius": 0.7,
        "equilibrium/fraction_converged": 0.5,
        "system/model_flop_utilization": 0.3,
        "gradient_error/bptt/head/cosine": 1.0,
        "gradient_error/bptt/equilibrium/cosine": 0.9,
        "my/own metric": 2.0,
    }
    write_metrics(folder, training_rows(**extra))
    (folder / "config.yaml").write_text(
        f"model:\n  solver: {{solver: reversible, max_steps: 4, beta: {beta}}}\nseed: 0\n"
    )
    environment = {"started": "2026-01-02T03:04:05Z", "packages": {"torch": "2.13"}}
    environment["earlier_starts"] = [{"started": "2025-12-31", "packages": {}}]
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "residual_curve.csv").write_text(
        "step,solve,evaluation,relative_residual\n"
        + "".join(f"{step},1,{e},{0.5**e}\n" for step in (9, 99) for e in range(1, 5))
    )
    (folder / "depth_sweep.csv").write_text(
        "steps,forward_nfe,loss\n" + "".join(f"{n // 2},{n},{1 + 1 / n}\n" for n in (2, 4, 8, 16))
    )
    sample = {"step": 99, "prompt": "def ", "text": "f(x):\n    return '<script>alert(1)</script>' " + "x" * 300}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "samples").mkdir()
    Image.new("RGB", (900, 300), (200, 120, 40)).save(folder / "samples" / "00000099.png")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best 1.ckpt").write_bytes(b"0" * 3000)
    return folder


# What a run of the command line left in its folder.


TRAINED = ("state_dict", "trained_weights", "optimizer_states", "lr_schedulers", "random_states", "global_step")


def run_metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of run_metrics.csv without what depends on the clock; evaluations after training are left out."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            {key: v for key, v in row.items() if v and not key.startswith("system/")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"step"} and not any(key.startswith("test/") for key in row)]


def trained(checkpoint: Path) -> dict[str, Any]:
    """What training goes on from."""
    content = torch.load(checkpoint, weights_only=True)
    return {key: content[key] for key in TRAINED if key in content}


def put_back(kept: Path, folder: Path, *names: str) -> None:
    """The run's folder as it was kept, with these checkpoints alone. (At another path `best.ckpt` begins anew.)"""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name not in names:
            path.unlink()


def names(folder: Path) -> set[str]:
    """All files of a run."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def damage(path: Path) -> None:
    """Cut the end off, as a crash of the machine does."""
    content = path.read_bytes()
    path.unlink()  # another name of the file stays whole
    path.write_bytes(content[: len(content) // 2])


def watch_disk(note: Callable[[str, str], object], patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Call `note` with "sync" and the path after each sync, and with "rename" and the target before each new name."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def noting(change: Callable[..., None]) -> Callable[..., None]:
        def noted(path: Any, target: Any, **options: Any) -> None:
            note("rename", os.path.abspath(target))
            change(path, target, **options)

        return noted

    for name, call in {"fsync": fsync, "rename": noting(os.rename), "replace": noting(os.replace)}.items():
        patch(os, name, call)  # `Path`'s call them


@contextmanager
def limited_file_sizes() -> Iterator[Callable[[int | None], None]]:
    """Let no file grow beyond a size, as a full disk does with another error number; None: without a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Offline W&B runs: made by the command line, read back through W&B's own command.


def without_key(patch: pytest.MonkeyPatch, home: Path) -> None:
    """As on a machine where nobody logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.delenv("NETRC", raising=False)


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


# Folders of shards, written by this process, and what may happen to them.


STATE = {
    "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7)},
    "optimizer_0": {"param_groups": [{"lr": 0.25}], "state": {"w": {"exp_avg": torch.ones(2, 3).bfloat16()}}},
}


def write_shards(folder: Path, step: int = 1) -> Path:
    """A checkpoint of this step, sealed."""
    folder.mkdir(exist_ok=True)
    write_part(STATE, folder, 0)
    torch.save({"global_step": step, "loops": {}, VALUES: other_values(STATE)}, folder / "meta.pt")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the checksums of all that is in the folder now."""
    write_checksums(folder, checksums(path for path in folder.iterdir() if path.name != SUMS))


def change_places(folder: Path, change: Any) -> None:
    """Let `change` do something to what the file of the first process says of its tensors' places; sealed."""
    path = folder / "process-0.safetensors"
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    changed = change(places)
    save_file(load_file(path), path, {"DCP_SHARDING_INFO": changed if isinstance(changed, str) else json.dumps(places)})
    seal(folder)


class Malice:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (str(self.path),)


def touch(path: str) -> None:
    Path(path).touch()
