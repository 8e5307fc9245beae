"""`best.ckpt` is what its name says: also in a folder that was moved, on a disk that was full, between two steps."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Callback

from revdeq_lightning.checkpoints.callbacks import BestCheckpoint, LastCheckpoint
from revdeq_lightning.checkpoints.files import newest_good, steps_of
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from tests.helpers.modules import Stranger, loader, trainer
from tests.helpers.runs import kept_steps

# These runs go on from a plain loader's next batch.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")


class Scripted(Stranger):
    """Whose validation losses are given: one after each step, from the first of the run on."""

    def __init__(self, *losses):
        super().__init__()
        self.given = losses

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.given[self.trainer.fit_loop.total_batch_idx])


def fit(folder, losses, *, max_steps=None, ckpt_path=None, callbacks=(), io=None, **settings):
    """One validation a batch; `best.ckpt` and `last.ckpt` in `folder/checkpoints`."""
    best, last = BestCheckpoint(), LastCheckpoint(keep_last=99, every_n_steps=1)
    settings |= {"max_steps": max_steps or len(losses), "val_check_interval": 1, "num_sanity_val_steps": 0}
    settings |= {"logger": False, "enable_checkpointing": True, "plugins": [io or AtomicCheckpointIO(errors="warn")]}
    run = trainer(folder, [*callbacks, best, last], **settings)
    run.fit(Scripted(*losses), loader(), loader(8), ckpt_path=ckpt_path)
    return best


def test_it_is_that_of_the_lowest_loss(tmp_path):
    for k, (losses, step) in enumerate([((3, 1, 2), 2), ((3, 2, 1), 3), ((1, 1, float("nan")), 1)]):
        assert fit(tmp_path / str(k), losses).loss == min(losses)
        assert kept_steps(tmp_path / str(k))["best"] == step


def test_a_run_that_goes_on_elsewhere_or_by_another_path_keeps_it(tmp_path, monkeypatch):
    fit(tmp_path / "a", (3, 1, 2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fit(tmp_path / "b", (3, 1, 2, 1.5), ckpt_path=tmp_path / "b/checkpoints/last.ckpt")
    assert kept_steps(tmp_path / "b")["best"] == 2
    monkeypatch.chdir(tmp_path)
    fit(Path("b"), (3, 1, 2, 1.5, 1.2), ckpt_path="b/checkpoints/last.ckpt")
    assert kept_steps(tmp_path / "b")["best"] == 2
    fit(Path("b"), (3, 1, 2, 1.5, 1.2, 0.5), ckpt_path="b/checkpoints/last.ckpt")
    assert kept_steps(tmp_path / "b")["best"] == 6


def test_where_there_is_none_the_next_is_the_best(tmp_path):
    fit(tmp_path, (3, 1, 2))
    (tmp_path / "checkpoints/best.ckpt").unlink()
    fit(tmp_path, (3, 1, 2, 2.5, 4), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert kept_steps(tmp_path)["best"] == 4


def test_after_a_kill_before_last_was_written_the_validation_is_done_again(tmp_path):
    fit(tmp_path, (3, 2, 1))
    whole = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    os.replace(tmp_path / "checkpoints/step-2.ckpt", tmp_path / "checkpoints/last.ckpt")
    fit(tmp_path, (3, 2, 1), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    again = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert again["global_step"] == whole["global_step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    assert not list(tmp_path.rglob("left-at*"))


class FullFor(AtomicCheckpointIO):
    """Has no room for `best.ckpt` after one step."""

    def __init__(self, step, **options):
        super().__init__(**options)
        self.step = step

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if Path(path).name == "best.ckpt" and checkpoint["global_step"] == self.step:
            self.note(Path(path), OSError(errno.ENOSPC, "No space left on device"))
        else:
            super().save_checkpoint(checkpoint, path)


def test_what_could_not_be_written_is_not_the_best(tmp_path):
    """The loss of step 2 is the lowest, but its file is not there: that of step 4 is better than that of step 1."""
    with pytest.warns(UserWarning, match="no checkpoint was written to .*best.ckpt"):
        best = fit(tmp_path, (3, 1, 4, 2), io=FullFor(2, errors="warn"))
    assert best.loss == 2
    assert kept_steps(tmp_path)["best"] == 4


def test_between_two_steps_it_is_for_evaluation_and_nothing_else(tmp_path):
    """Steps after batches 3 and 6; validated after each batch, the best after the fifth."""
    fit(tmp_path, (9, 8, 7, 6, 1, 5), accumulate_grad_batches=3, max_steps=2)
    best = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert (best["global_step"], best["between_steps"]) == (1, True)
    folder = tmp_path / "checkpoints"
    assert newest_good(folder).path == folder / "last.ckpt"
    (folder / "last.ckpt").write_text("damaged")
    assert newest_good(folder).path == folder / "step-1.ckpt"  # as far, and exact
    (folder / "step-1.ckpt").unlink()
    assert newest_good(folder).path == folder / "best.ckpt"  # better than none
    with pytest.warns(UserWarning, match=r"best.ckpt was written while gradients were being accumulated: .* step 1"):
        fit(tmp_path, (9, 8, 7, 6, 1, 5, 4), accumulate_grad_batches=3, max_steps=2, ckpt_path=folder / "best.ckpt")


class Notes(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, *_):
        self.steps.append(trainer.global_step)


def test_a_run_that_goes_on_from_an_older_one_leaves_the_newer_ones_behind(tmp_path):
    folder, notes = tmp_path / "checkpoints", Notes()
    fit(tmp_path, (3, 2, 1, 4))
    assert kept_steps(tmp_path) == {"best": 3, "step-1": 1, "step-2": 2, "step-3": 3, "last": 4}
    with pytest.warns(UserWarning, match=r"from step 2: .* \(step-3.ckpt, last.ckpt, best.ckpt\) were moved to .*left"):
        fit(tmp_path, (3, 2, 5), ckpt_path=folder / "step-2.ckpt", callbacks=[notes])
    assert notes.steps == [2]
    left = {path.stem: steps_of(path).number for path in (folder / "left-at-step-2").iterdir()}
    assert left == {"best": 3, "step-3": 3, "last": 4}
    assert kept_steps(tmp_path) == {"best": 3, "step-1": 1, "step-2": 2, "last": 3}
    with pytest.warns(UserWarning, match="were moved to .*left-at-step-2-1"):
        fit(tmp_path, (3, 2, 5), ckpt_path=folder / "step-2.ckpt")


def test_a_file_of_another_name_is_left_alone(tmp_path):
    fit(tmp_path, (3, 2))
    shutil.copy(tmp_path / "checkpoints/last.ckpt", tmp_path / "checkpoints/step-2-backup.ckpt")
    fit(tmp_path, (3, 2, 1), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert (tmp_path / "checkpoints/step-2-backup.ckpt").exists()
