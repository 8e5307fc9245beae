"""A run that goes on with another number of processes."""

from pathlib import Path

import pytest
import torch
from lightning import Callback

from tests.helpers.processes import run_apart
from tests.helpers.runs import MUON, tiny_data, tiny_task, tiny_trainer


class LossesAndSave(Callback):
    """Notes the loss of each step; saves a checkpoint after the sixth."""

    def __init__(self, path: Path | None):
        self.path, self.losses = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        if self.path is not None and trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


def fit_on(devices, folder, *, batch_size, save=None, ckpt_path=None):
    settings = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
    data, notes = tiny_data(folder, batch_size=batch_size), LossesAndSave(save)
    trainer = tiny_trainer(folder, [notes], max_steps=12, **settings)
    trainer.fit(tiny_task(data, optimizer=MUON), data, ckpt_path=ckpt_path)
    return notes.losses


def begin_on_two(folder):
    fit_on(2, folder, batch_size=4, save=folder / "middle.ckpt")


def test_on_another_number_of_ranks_the_batches_stay(tmp_path):
    """Begun on two ranks with 4 windows each, ended on one: the losses of one process with 8 windows all along."""
    run_apart(begin_on_two, tmp_path)
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
