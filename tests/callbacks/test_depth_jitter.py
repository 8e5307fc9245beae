import pytest
import torch
from lightning import Callback

from revdeq_lightning.callbacks.depth_jitter import DepthJitter
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


class Seen(Callback):
    """Notes the evaluations of every training step, counted by f itself, and the solver after it."""

    def __init__(self):
        self.calls, self.notes = 0, []

    def on_train_start(self, trainer, pl_module):
        pl_module.model.equilibrium.f.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls = 0
        self.solver = pl_module.model.equilibrium.solver

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.notes.append((self.calls, self.solver.beta))


def fit(folder, jitter, *, ckpt_path=None, max_steps=20, save=None):
    data, seen = tiny_data(folder), Seen()
    task = tiny_task(data, optimizer={"optimizer": "muon", "lr": 0.01})  # a schedule would depend on max_steps
    trainer = tiny_trainer(folder, [jitter, seen], max_steps=max_steps, limit_val_batches=0)
    trainer.fit(task, data, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return seen.notes, task


def test_every_step_draws_from_the_lists_and_the_solver_comes_back(tmp_path):
    notes, task = fit(tmp_path, DepthJitter(steps=[1, 2, 5], betas=[0.8, 1.0], seed=3))
    assert {calls for calls, _ in notes} == {2 * 1, 2 * 2, 2 * 5}  # forward and backward
    assert {beta for _, beta in notes} == {0.8, 1.0}
    assert task.model.equilibrium.solver.max_steps == 3
    assert task.model.equilibrium.solver.beta == 1.0
    again, _ = fit(tmp_path, DepthJitter(steps=[1, 2, 5], betas=[0.8, 1.0], seed=3))
    other, _ = fit(tmp_path, DepthJitter(steps=[1, 2, 5], betas=[0.8, 1.0], seed=4))
    assert notes == again != other


def test_a_resumed_run_draws_what_the_whole_run_draws(tmp_path):
    whole, task = fit(tmp_path, DepthJitter(steps=[1, 2, 5]))
    first, _ = fit(tmp_path, DepthJitter(steps=[1, 2, 5]), max_steps=7, save=tmp_path / "seven.ckpt")
    rest, resumed = fit(tmp_path, DepthJitter(steps=[1, 2, 5]), ckpt_path=tmp_path / "seven.ckpt")
    assert first + rest == whole
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), resumed.parameters(), strict=True))


def test_a_late_start_leaves_the_batches_before_it_as_they_are(tmp_path):
    whole, _ = fit(tmp_path, DepthJitter(steps=[1, 2, 5]))
    late, _ = fit(tmp_path, DepthJitter(steps=[1, 2, 5], first_batch=7))
    assert late[:7] == [(2 * 3, 1.0)] * 7
    assert late[7:] == whole[7:]


@pytest.mark.parametrize(("settings", "message"), [({"steps": [0]}, "got 0"), ({"betas": [2.5]}, "got 2.5")])
def test_what_the_solver_refuses_is_told_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, DepthJitter(**settings))
