"""An f that is another function in chosen backward passes: so many gradients are not exact, and no more."""

import warnings

import pytest
import torch
from lightning import Callback

from revdeq_lightning.callbacks.reconstruction_certificate import ReconstructionCertificate
from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    MomentumSolver,
    ReconstructionError,
    ReconstructionWarning,
    ReversibleAdjoint,
    ReversibleSolver,
)
from tests.helpers.modules import Stranger, loader, table, trainer

SILENT = ReversibleAdjoint(mismatch="ignore")


class ChangeF(Callback):
    """In the backward pass of these batches f is another function."""

    def __init__(self, *batches):
        self.batches, self.batch = batches, 0

    def on_before_backward(self, trainer, pl_module, loss):
        pl_module.layers[0].f.offset = 0.1 if self.batch in self.batches else 0.0

    def on_after_backward(self, trainer, pl_module):
        pl_module.layers[0].f.offset = 0.0
        self.batch += 1


def values(folder, key):
    return [float(row[key]) for row in table(folder / "logs/metrics.csv") if key in row]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_exact_gradients_are_certified(tmp_path, capsys, accumulate):
    module = Stranger(ReversibleSolver(max_steps=3), MomentumSolver(max_steps=4), dropout=0.3)
    callback = ReconstructionCertificate("raise")
    trainer(tmp_path, [callback], accumulate_grad_batches=accumulate).fit(module, loader())
    batches = 6 * accumulate
    assert f"{batches} of {batches} gradients certified exact\n" in capsys.readouterr().out
    for key in ("num_gradients", "num_certified_gradients"):
        assert values(tmp_path, f"equilibrium/{key}") == [2 * accumulate, 4 * accumulate, 6 * accumulate]
    assert values(tmp_path, "equilibrium/total_reconstruction_mismatch") == [0, 0, 0]


def test_the_logged_counts_end_with_those_of_the_last_step(tmp_path):
    trainer(tmp_path, [ReconstructionCertificate()], max_steps=5).fit(Stranger(), loader())
    assert values(tmp_path, "equilibrium/num_certified_gradients") == [2, 4, 5]


def test_gradients_that_are_not_exact_are_counted_and_told_once(tmp_path, capsys):
    callback = ReconstructionCertificate()
    module = Stranger(adjoint=SILENT)
    with pytest.warns(ReconstructionWarning, match="1 of 2 gradients are not exact") as caught:
        trainer(tmp_path, [ChangeF(1, 4, 5), callback]).fit(module, loader())
    assert len([w for w in caught if w.category is ReconstructionWarning]) == 1
    assert (callback.num_gradients, callback.num_certified) == (6, 3)
    assert values(tmp_path, "equilibrium/num_certified_gradients") == [1, 3, 3]
    assert f"3 of 6 gradients certified exact ({callback.mismatch:,} elements" in capsys.readouterr().out


@pytest.mark.parametrize("arithmetic", ["exact", "exact64"])
def test_the_policy_raises(tmp_path, capsys, arithmetic):
    run = trainer(tmp_path, [ChangeF(2), ReconstructionCertificate("raise")])
    with pytest.raises(ReconstructionError, match="1 of 4 gradients are not exact"):
        run.fit(Stranger(MomentumSolver(max_steps=4, arithmetic=arithmetic), adjoint=SILENT), loader())
    assert run.global_step == 4
    assert "3 of 4 gradients certified exact" in capsys.readouterr().out


def test_the_policy_acts_on_what_came_after_the_last_logging_step(tmp_path):
    run = trainer(tmp_path, [ChangeF(4), ReconstructionCertificate("raise")], max_steps=5)
    with pytest.raises(ReconstructionError, match="1 of 5 gradients are not exact"):
        run.fit(Stranger(adjoint=SILENT), loader())


def test_the_policy_stops_with_a_checkpoint(tmp_path):
    run = trainer(tmp_path, [ChangeF(2), ReconstructionCertificate("stop", tmp_path / "kept")])
    with pytest.warns(ReconstructionWarning, match=r"Training ends after this step; checkpoint: .*kept/inexact.ckpt"):
        run.fit(Stranger(adjoint=SILENT), loader())
    checkpoint = torch.load(tmp_path / "kept" / "inexact.ckpt", weights_only=True)
    assert checkpoint["global_step"] == run.global_step == 4
    assert checkpoint["reconstruction_certificate"][:2] == [4, 3]


def test_counts_go_on_after_a_resumption(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReconstructionWarning)
        first = trainer(tmp_path, [ChangeF(1), ReconstructionCertificate()], max_steps=6)
        first.fit(Stranger(adjoint=SILENT), loader())
        first.save_checkpoint(tmp_path / "middle.ckpt")
        rest = trainer(tmp_path / "rest", [ReconstructionCertificate("raise")], max_steps=9)
        rest.fit(Stranger(adjoint=SILENT), loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert "8 of 9 gradients certified exact" in capsys.readouterr().out


def test_floating_point_states_are_counted_and_not_blamed(tmp_path, capsys):
    module = Stranger(ReversibleSolver(max_steps=8, arithmetic="float32"))
    trainer(tmp_path, [ReconstructionCertificate("raise")]).fit(module, loader())
    assert "0 of 6 gradients certified exact" in capsys.readouterr().out


def test_where_nothing_is_reconstructed_nothing_is_certified(tmp_path, capsys):
    trainer(tmp_path, [ReconstructionCertificate()], logger=False).fit(Stranger(adjoint=BackpropAdjoint()), loader())
    assert "certified" not in capsys.readouterr().out
