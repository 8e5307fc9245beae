import pytest
import torch
from lightning import Callback

from revdeq_lightning.callbacks.depth_jitter import DepthJitter
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


class Seen(Callback):
    """Notes the evaluations of every training step, counted by f itself."""

    def __init__(self):
        self.calls, self.notes = 0, []

    def on_train_start(self, trainer, pl_module):
        pl_module.model.equilibrium.f.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.notes.append(self.calls)


def fit(folder, jitter, *, ckpt_path=None, max_steps=20, save=None, **options):
    data, seen = tiny_data(folder), Seen()
    task = tiny_task(data, optimizer={"optimizer": "muon", "lr": 0.01})  # a schedule would depend on max_steps
    trainer = tiny_trainer(folder, [jitter, seen], max_steps=max_steps, limit_val_batches=0, **options)
    trainer.fit(task, data, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return seen.notes, task


def test_every_step_draws_from_the_lists_and_the_solver_comes_back(tmp_path):
    notes, task = fit(tmp_path, DepthJitter([1, 2, 5], seed=3))
    assert set(notes) == {2 * 1, 2 * 2, 2 * 5}  # forward and backward
    assert task.model.equilibrium.solver.max_steps == 3
    again, _ = fit(tmp_path, DepthJitter([1, 2, 5], seed=3))
    other, _ = fit(tmp_path, DepthJitter([1, 2, 5], seed=4))
    assert notes == again != other


def test_a_resumed_run_draws_what_the_whole_run_draws(tmp_path):
    whole, task = fit(tmp_path, DepthJitter(steps=[1, 2, 5]))
    first, _ = fit(tmp_path, DepthJitter(steps=[1, 2, 5]), max_steps=7, save=tmp_path / "seven.ckpt")
    rest, resumed = fit(tmp_path, DepthJitter(steps=[1, 2, 5]), ckpt_path=tmp_path / "seven.ckpt")
    assert first + rest == whole
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), resumed.parameters(), strict=True))


def test_lists_hold_from_fractions_of_the_run(tmp_path):
    """7 of 20 steps are more than a third, 12 are 0.6 of them."""
    whole, _ = fit(tmp_path, DepthJitter([1, 2, 5]))
    notes, task = fit(tmp_path, DepthJitter({0.6: [1, 2, 5], 1 / 3: [1]}))
    assert notes == [2 * 3] * 7 + [2 * 1] * 5 + whole[12:]
    assert task.model.equilibrium.solver.max_steps == 3


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0], "got 0"),
        ([], r"must be numbers of solver steps to draw from, got \[\]"),
        ({}, r"must be numbers of solver steps to draw from, got \{\}"),
        ({0.5: []}, "must be numbers of solver steps to draw from"),
        ({1.0: [2]}, r"a fraction in steps must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_training(tmp_path, steps, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, DepthJitter(steps))


def test_fractions_need_a_run_with_an_end(tmp_path):
    with pytest.raises(ValueError, match=r"set trainer.max_steps or max_epochs"):
        fit(tmp_path, DepthJitter({0.5: [2]}), max_steps=-1, max_epochs=-1)
