"""What a sweep says of each depth is what an evaluation with so many steps gives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.equilibrium import BackpropAdjoint, MomentumSolver, PicardSolver, ReversibleSolver
from tests.helpers.modules import DIM, Stranger, Validated, loader, sums, table, trainer
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


def read(path):
    return [{key: float(value) for key, value in row.items()} for row in table(path)]


def test_of_the_language_model_each_row_is_a_test_with_these_steps(tmp_path, capsys):
    data = tiny_data(tmp_path)
    tiny_trainer(tmp_path, [DepthSweep(tmp_path)]).test(
        task := with_weights_that_matter(tiny_task(data)), data, verbose=False
    )
    rows = read(tmp_path / "depth_sweep.csv")
    assert [(row["steps"], row["forward_nfe"]) for row in rows] == [(n, n) for n in (1, 2, 3, 6, 12)]
    for row in rows:
        other = with_weights_that_matter(tiny_task(data, solver={"max_steps": int(row["steps"])}))
        (figures,) = tiny_trainer(tmp_path).test(other, data, verbose=False)
        assert row["loss"] == pytest.approx(figures["test/loss"], rel=1e-6)
    assert task.model.equilibrium.solver.max_steps == 3
    assert "3 steps,    3 evaluations: loss" in capsys.readouterr().out
    assert len({row["loss"] for row in rows}) == 5


def with_weights_that_matter(task):
    """The readout of a new model is 0: no depth differs from another."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return task


@pytest.mark.parametrize(("interval", "num_batches", "steps"), [(1, 1, [1, 3, 5]), (2, 3, [3])])
def test_within_training_it_takes_the_first_batches_of_some_validations(tmp_path, interval, num_batches, steps):
    seen = []

    def noted(module, batch):
        seen.append(batch[0])
        return sums(module, batch)

    module = Validated(ReversibleSolver(max_steps=2), MomentumSolver(max_steps=4), lr=0.0)
    sweep = DepthSweep(every_n_validations=interval, num_batches=num_batches, sums=noted)
    settings = {"val_check_interval": 2, "num_sanity_val_steps": 2, "max_steps": steps[-1] + 1}
    trainer(tmp_path, [sweep], **settings).fit(module, loader(), loader())
    rows = read(tmp_path / "logs" / "depth_sweep_validation.csv")
    # The deepest solver makes the steps, the other one half as many, at least one.
    depths = [(n, 2 * max(1, round(2 * n / 4)) + n) for n in (1, 2, 4, 8, 16)]
    assert [(row["step"], row["steps"], row["forward_nfe"]) for row in rows] == [(s, *d) for s in steps for d in depths]
    assert len(seen) == num_batches * len(depths) * len(steps)
    inputs, labels = (torch.cat(t) for t in zip(*list(loader())[:num_batches], strict=True))
    module.eval()
    for row in rows[-5:]:
        first, second = module.layers
        first.solver = ReversibleSolver(max_steps=max(1, round(row["steps"] / 2)))
        second.solver = MomentumSolver(max_steps=int(row["steps"]))
        assert row["loss"] == pytest.approx(F.cross_entropy(module(inputs), labels).item(), rel=1e-6)


def test_a_depth_at_which_the_state_diverges_ends_nothing_and_is_nan(tmp_path):
    """With 8 steps, twice as many as in training, f = 1e40 z leaves the range of float64."""

    class Expanding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(DIM, DIM)

        def forward(self, z, x):
            return 1e40 * z + self.linear(x)

    module = Validated(PicardSolver(max_steps=4), adjoint=BackpropAdjoint())
    module.double().layers[0].f = Expanding().double()
    data = DataLoader([(inputs.double(), label) for inputs, label in loader().dataset], 8)
    trainer(tmp_path, [DepthSweep(sums=sums)]).validate(module, data, verbose=False)
    rows = read(tmp_path / "logs/depth_sweep.csv")
    assert [row["steps"] for row in rows] == [1, 2, 4, 8, 16]
    assert math.isfinite(rows[0]["loss"])
    assert math.isnan(rows[-1]["loss"])


def test_a_module_without_sums_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Stranger has no evaluation_sums\(batch\); pass sums="):
        trainer(tmp_path, [DepthSweep()]).fit(Stranger(), loader())
