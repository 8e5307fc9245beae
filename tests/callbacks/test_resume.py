"""A run in two parts is the run in one, bit for bit."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback

from tests.helpers.processes import run_python
from tests.helpers.runs import MUON, TRAINED, assert_equal, tiny_data, tiny_task, tiny_trainer


class DrawAndSave(Callback):
    """Notes the loss and a number from each global generator at each step; saves a checkpoint after one step."""

    def __init__(self, path: Path | None = None, step: int = 10):
        self.path, self.step, self.notes = path, step, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        draws = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
        self.notes.append((outputs["loss"].item(), *draws))
        if self.path is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(folder, name, *, ckpt_path=None, save=None, num_workers=0, seed=0, **settings):
    notes = DrawAndSave(save)
    data = tiny_data(folder, num_workers=num_workers)
    task = tiny_task(data, seed=seed, optimizer=MUON)
    trainer = tiny_trainer(folder, [notes], **settings)
    trainer.fit(task, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    return notes.notes, torch.load(folder / f"{name}.ckpt", weights_only=True)


def test_resumed_run_equals_whole_run(tmp_path):
    whole, end = fit(tmp_path, "whole", save=tmp_path / "middle.ckpt")
    # Another seed, and batches by other processes: all that counts must come from the checkpoint.
    rest, end_of_rest = fit(tmp_path, "rest", ckpt_path=tmp_path / "middle.ckpt", seed=1, num_workers=2)
    assert len(whole) == 20
    assert rest == whole[10:]
    for key in (*TRAINED, "TextDataModule"):
        assert_equal(end_of_rest[key], end[key], key)
    assert not torch.equal(end["trained_weights"]["model.norm.weight"], end["state_dict"]["model.norm.weight"])


def fit_on(devices, folder, *, batch_size, save=None, ckpt_path=None):
    settings = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
    data, notes = tiny_data(folder, batch_size=batch_size), DrawAndSave(save, step=6)
    trainer = tiny_trainer(folder, [notes], max_steps=12, **settings)
    trainer.fit(tiny_task(data, optimizer=MUON), data, ckpt_path=ckpt_path)
    return [loss for loss, *_ in notes.notes]


def test_on_another_number_of_ranks_the_batches_stay(tmp_path):
    """Begun on two ranks with 4 windows each, ended on one: the losses of one process with 8 windows all along."""
    run_python(__file__, tmp_path)
    with pytest.warns(
        UserWarning, match="2 process.* with 4 windows each, now 1 take 8 each: the batches stay the same"
    ):
        rest = fit_on(1, tmp_path, batch_size=4, ckpt_path=tmp_path / "middle.ckpt")
    assert rest == pytest.approx(fit_on(1, tmp_path, batch_size=8)[6:], rel=1e-5)  # sums over processes round otherwise
    with pytest.raises(ValueError, match="cannot be shared among 3 processes"):
        share_out(tmp_path / "middle.ckpt", tiny_data(tmp_path), world_size=3)


def share_out(checkpoint, data, world_size):
    data._rank_and_world_size = lambda: (0, world_size)
    data.load_state_dict(torch.load(checkpoint, weights_only=True)["TextDataModule"])


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    fit_on(2, directory, batch_size=4, save=directory / "middle.ckpt")
