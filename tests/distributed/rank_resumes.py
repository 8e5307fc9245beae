"""Runs that stop after 10 steps, and go on with other processes, as FROM-TO says.

FROM is `file` or `folder` (of FSDP2; `file_1`: of one process without it), TO a strategy, each with its processes.
With FROM = `damaged` they are to refuse a folder in which one bit of the second process's file has changed.
"""

import functools
import os
import shutil
from pathlib import Path

import torch
from lightning import Callback

from revdeq_lightning.distributed.strategies import EquilibriumDDP, EquilibriumFSDP2
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.processes import whole
from revdeq_lightning.tasks.averaged_weights import AveragedWeights
from tests.distributed.rank_fits import prepare
from tests.helpers.processes import run_group
from tests.helpers.runs import MUON, tiny_data, tiny_task, tiny_trainer

STRATEGIES = {
    "one": lambda: "auto",
    "ddp": EquilibriumDDP,
    "fsdp2": EquilibriumFSDP2,
    "file": EquilibriumFSDP2,
    "folder": functools.partial(EquilibriumFSDP2, sharded_checkpoints=True),
}


class Half(Callback):
    """Saves after 10 steps, twice (a folder is replaced), and ends the run."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.path and trainer.global_step == 10:
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(folder, name, strategy, ranks, *, save=None, resume=None):
    data = tiny_data(folder, batch_size=8 // ranks)
    task = tiny_task(data, optimizer=MUON, seed=0 if resume is None else 1).double()
    settings = {"strategy": STRATEGIES[strategy](), "devices": ranks, "max_steps": 20, "limit_val_batches": 8 // ranks}
    trainer = tiny_trainer(folder, [Half(save)], **settings)
    trainer.fit(task, data, ckpt_path=resume)
    (averaging,) = (c for c in trainer.callbacks if isinstance(c, AveragedWeights))
    states = {"weights": dict(task.named_parameters()), "average": averaging.average}
    result = {kind: {key: whole(p.detach()).clone() for key, p in state.items()} for kind, state in states.items()}
    if trainer.is_global_zero:
        torch.save(result, folder / f"{name}.pt")


def refuse(folder, name, strategy, ranks, resume):
    try:
        fit(folder, name, strategy, ranks, resume=resume)
    except CheckpointError as error:
        (folder / f"{name}-{os.environ['RANK']}.txt").write_text(str(error))


def damage(path, name):
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


def main(folder, *names):
    prepare(folder)
    run_group(1, functools.partial(fit, folder, "whole", "one", 1))
    for name in names:
        start, (strategy, ranks) = name.split("-")[0], name.split("-")[1].split("_")
        if start == "damaged":
            path = Path(shutil.copytree(folder / "folder_2.ckpt", folder / "alone/damaged.ckpt"))
            damage(path, "process-1.safetensors")
            run_group(int(ranks), functools.partial(refuse, folder, name, strategy, int(ranks), path))
            continue
        checkpoint = folder / f"{start}.ckpt"
        if not checkpoint.exists():
            kind, count = start.split("_")
            kind = "one" if start == "file_1" else kind
            run_group(int(count), functools.partial(fit, folder, start, kind, int(count), save=checkpoint))
        run_group(int(ranks), functools.partial(fit, folder, name, strategy, int(ranks), resume=checkpoint))
