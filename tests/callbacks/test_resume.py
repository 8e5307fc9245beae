"""A run in two parts is the run in one, bit for bit."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_runs import MUON, assert_equal, tiny_data, tiny_task, tiny_trainer

from revdeq_lightning.callbacks.csv_logger import ContinuedCSVLogger
from revdeq_lightning.callbacks.run_report import RunReport
from revdeq_lightning.runs import LanguageRunConfig


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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, timeout=180, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
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


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    fit_on_two_ranks(directory, "whole", save=directory / "middle.ckpt")
    fit_on_two_ranks(directory, "rest", ckpt_path=directory / "middle.ckpt", seed=1)
