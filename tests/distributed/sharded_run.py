"""A small run that writes sharded checkpoints."""

import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import time
import traceback
import warnings
from pathlib import Path

import torch

from revdeq_lightning.checkpoints.names import SUMS
from tests.helpers.processes import run_group
from tests.helpers.runs import Malice, run, seal, tiny_config, watch_disk

OPTIONS = (
    *("--config", "configs/trainer/fsdp2.yaml", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--trainer.strategy.sharded_checkpoints=true", "--run.test=false", "--run.version=v", "--run.sample_tokens=0"),
    *("--run.keep_last=1", "--run.checkpoint_every_n_steps=1", "--run.resume=auto"),
)


def disturbed(folder: Path) -> None:
    """In the second save the disk is full, and until the third one `last.ckpt` can neither be kept nor replaced."""
    sync, rename, written, refused = os.fsync, Path.rename, [], []
    warnings.simplefilter("always")

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".last.ckpt.part/process-0.safetensors"):
            written.append(descriptor)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        if path.name == "last.ckpt" and len(refused) < 3:
            refused.append(target)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return rename(path, target)

    os.fsync, Path.rename = fsync, renamed
    run("fit", "--config", tiny_config(folder), *OPTIONS, "--run.keep_last=2")


def recorded(folder: Path) -> None:
    """`calls-RANK.json` lists what the kernel was asked for, by two processes."""
    options = ("--config", tiny_config(folder), *OPTIONS, "--trainer.devices=2", "--trainer.max_steps=1")
    run_group(2, record, folder, *options)


def record(folder: Path, *options: object) -> None:
    """Run, noting the moment, the call and the path of each sync and each new name among the checkpoints."""
    calls: list[tuple[int, str, str]] = []
    checkpoints = folder.resolve() / "runs/tiny/v/checkpoints"

    def note(call: str, path: str) -> None:
        if Path(path).is_relative_to(checkpoints):
            calls.append((time.monotonic_ns(), call, str(Path(path).relative_to(checkpoints))))

    watch_disk(note)
    run("fit", *options)
    (folder / f"calls-{os.environ['RANK']}.json").write_text(json.dumps(calls))


WITHIN = {
    "code": lambda bad, trace: (torch.save({"global_step": 1, "loops": Malice(trace)}, bad / "meta.pt"), seal(bad)),
    "part": lambda bad, trace: (torch.save(Malice(trace), bad / "process-0.safetensors"), seal(bad)),
    "older": lambda bad, trace: (bad / ".metadata").write_bytes(pickle.dumps(Malice(trace))),
    "unsealed": lambda bad, trace: (bad / SUMS).unlink(),
}
OTHER_MODELS = {
    "wider": ("--model.network.d_model=32",),
    "larger": ("--model.network.num_layers=3",),
    "smaller": ("--model.network.num_layers=1",),
}


COMMANDS = ("fit", "validate", "test", "predict")


def refused(folder: Path) -> None:
    """`refused.json` has what commands told of a fault, their exit code, and whether code in the checkpoint ran."""
    options = ("--config", tiny_config(folder), *OPTIONS, "--model.network.num_layers=2", "--trainer.max_steps=1")
    run_group(1, run, "fit", *options)
    last = folder / "runs/tiny/v/checkpoints/last.ckpt"
    bad, told, trace = last.with_name("bad.ckpt"), folder / "told.json", folder / "trace"
    options = (*options, "--ckpt_path", bad, "--run.resume=no")
    results = {}
    for fault in (*WITHIN, *OTHER_MODELS):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(last, bad)
        WITHIN.get(fault, lambda bad, trace: None)(bad, trace)
        for command in COMMANDS if fault == "code" else ("fit", "test"):
            told.unlink(missing_ok=True)
            run_group(1, tell, told, command, *options, *OTHER_MODELS.get(fault, ()))
            results[f"{command} {fault}"] = (*json.loads(told.read_text()), trace.exists())
    (folder / "refused.json").write_text(json.dumps(results))


def tell(told: Path, *words: object) -> None:
    code, errors = 0, io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            run(*words)
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
    told.write_text(json.dumps((errors.getvalue().splitlines(), code)))
