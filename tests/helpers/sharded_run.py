"""A small run that writes sharded checkpoints, on one process; as a script: `FOLDER full` or `FOLDER killed MOMENT`.

full: the disk refuses to write `last.ckpt` once, after the second step. killed: kill -9 as `last.ckpt` is replaced
for the first time: `aside`, when the old one is put aside and no other is there; `removed`, when the new one is there.
"""

import errno
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

from tiny_command import run, tiny_config

OPTIONS = (
    *("--config", "configs/trainer/fsdp2.yaml", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--trainer.strategy.sharded_checkpoints=true", "--run.test=false", "--run.version=v", "--run.sample_tokens=0"),
    *("--run.keep_last=1", "--run.checkpoint_every_n_steps=1", "--run.resume=auto"),
)


def fill_disk() -> None:
    sync, written = os.fsync, []
    warnings.simplefilter("always")

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".last.ckpt.part/" in name:
            written.append(Path(name).name)
            if written.count("__0_0.distcp") == 2 and "full" not in written:
                written.append("full")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = fsync


def kill(moment: str) -> None:
    rename, remove = Path.rename, shutil.rmtree
    end = ".last.ckpt.old"

    def renamed(path: Path, target: Path) -> Path:
        result = rename(path, target)
        if moment == "aside" and Path(target).name == end:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def removed(path: Path, *args: object, **options: object) -> None:
        if moment == "removed" and Path(path).name == end and Path(path).is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        remove(path, *args, **options)

    Path.rename, shutil.rmtree = renamed, removed


if __name__ == "__main__":
    folder, fault, *moment = sys.argv[1:]
    fill_disk() if fault == "full" else kill(*moment) if fault == "killed" else None
    run("fit", "--config", tiny_config(Path(folder)), *OPTIONS)
