"""A run in two parts is the run in one, bit for bit."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback

from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.report.at_end import RunReport
from revdeq_lightning.runs.folder import LanguageRunConfig
from tests.helpers.processes import run_python
from tests.helpers.runs import MUON, assert_equal, tiny_data, tiny_task, tiny_trainer


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


EXACT = ("state_dict", "trained_weights", "optimizer_states", "lr_schedulers", "random_states", "TextDataModule")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_equals_whole_run(tmp_path, num_workers):
    whole, end = fit(tmp_path, "whole", save=tmp_path / "middle.ckpt")
    # Another seed: all that counts must come from the checkpoint.
    rest, end_of_rest = fit(tmp_path, "rest", ckpt_path=tmp_path / "middle.ckpt", seed=1, num_workers=num_workers)
    assert len(whole) == 20
    assert rest == whole[10:]
    for key in EXACT:
        assert_equal(end_of_rest[key], end[key], key)
    assert not torch.equal(end["trained_weights"]["model.norm.weight"], end["state_dict"]["model.norm.weight"])


class NoteAtEnd(Callback):
    """Writes each rank's notes into a file: the ranks are processes of their own."""

    def __init__(self, notes: DrawAndSave, path: Path):
        self.notes, self.path = notes, path

    def on_train_end(self, trainer, pl_module):
        torch.save(self.notes.notes, self.path.with_suffix(f".{trainer.global_rank}"))
        trainer.save_checkpoint(self.path)


class NoteValidation(Callback):
    """Writes what the validation of the last step gave."""

    def __init__(self, path: Path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == 20 and trainer.is_global_zero:
            metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
            torch.save({key: value for key, value in metrics.items() if key.startswith("val/")}, self.path)


def fit_on_two_ranks(folder, name, *, save=None, ckpt_path=None, seed=0):
    data = tiny_data(folder)
    notes = DrawAndSave(save)
    callbacks = [
        notes,
        NoteAtEnd(notes, folder / f"{name}.ckpt"),
        RunReport(LanguageRunConfig()),
        NoteValidation(folder / f"{name}.val"),
    ]
    logger = ContinuedCSVLogger(folder / name)
    trainer = tiny_trainer(folder, callbacks, logger=logger, strategy="ddp_fork", devices=2, val_check_interval=5)
    trainer.fit(tiny_task(data, seed=seed, optimizer=MUON), data, ckpt_path=ckpt_path)


def test_resumed_run_equals_whole_run_on_two_ranks(tmp_path):
    run_python(__file__, tmp_path)
    whole, rest = ([torch.load(tmp_path / f"{name}.{rank}") for rank in (0, 1)] for name in ("whole", "rest"))
    assert [len(notes) for notes in whole] == [20, 20]
    assert whole[0] != whole[1]
    assert [notes[10:] for notes in whole] == rest
    end, end_of_rest = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "rest"))
    for key in EXACT:
        assert_equal(end_of_rest[key], end[key], key)
    # Evaluation: the averaged weights of the end, over the whole split, by two processes and by one.
    task = tiny_task(data := tiny_data(tmp_path))
    task.load_state_dict(end["state_dict"])
    (alone,) = tiny_trainer(tmp_path).validate(task, data, verbose=False)
    together = torch.load(tmp_path / "rest.val")
    assert together == pytest.approx(alone, rel=1e-6)


def fit_on(devices, folder, name, *, batch_size, save=None, ckpt_path=None):
    settings = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
    data, notes = tiny_data(folder, batch_size=batch_size), DrawAndSave(save, step=6)
    trainer = tiny_trainer(folder, [notes, NoteAtEnd(notes, folder / f"{name}.ckpt")], max_steps=12, **settings)
    trainer.fit(tiny_task(data, optimizer=MUON), data, ckpt_path=ckpt_path)


def test_on_another_number_of_ranks_the_batches_stay(tmp_path):
    """Begun on two ranks with 4 windows each, ended on one: the losses of one process with 8 windows all along."""
    run_python(__file__, tmp_path, "two ranks, then one")
    with pytest.warns(
        UserWarning, match="2 process.* with 4 windows each, now 1 take 8 each: the batches stay the same"
    ):
        fit_on(1, tmp_path, "rest", batch_size=4, ckpt_path=tmp_path / "middle.ckpt")
    fit_on(1, tmp_path, "alone", batch_size=8)
    losses = {name: [note[0] for note in torch.load(tmp_path / f"{name}.0")] for name in ("rest", "alone")}
    # Sums over processes round otherwise.
    assert losses["rest"] == pytest.approx(losses["alone"][6:], rel=1e-5)
    with pytest.raises(ValueError, match="cannot be shared among 3 processes"):
        share_out(tmp_path / "middle.ckpt", tiny_data(tmp_path), world_size=3)


def share_out(checkpoint, data, world_size):
    data._rank_and_world_size = lambda: (0, world_size)
    data.load_state_dict(torch.load(checkpoint, weights_only=True)["TextDataModule"])


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    if sys.argv[2:]:
        fit_on(2, directory, "begin", batch_size=4, save=directory / "middle.ckpt")
        sys.exit()
    fit_on_two_ranks(directory, "whole", save=directory / "middle.ckpt")
    fit_on_two_ranks(directory, "rest", ckpt_path=directory / "middle.ckpt", seed=1)
