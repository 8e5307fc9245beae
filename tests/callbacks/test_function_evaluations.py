"""Evaluations as f itself counts them; convergence as a plain loop finds it."""

import pytest
import torch

from revdeq_lightning.callbacks.depth_jitter import DepthJitter
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.equilibrium import BackpropAdjoint, MomentumSolver, PicardSolver, ReversibleSolver
from tests.helpers.modules import Stranger, loader, table, trainer
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


def rows(folder):
    return [row for row in table(folder / "logs/metrics.csv") if "equilibrium/forward_nfe" in row]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sums_equal_the_calls_that_f_counts(tmp_path, accumulate):
    module = Stranger(ReversibleSolver(max_steps=3), MomentumSolver(max_steps=4))
    callback = FunctionEvaluations()
    trainer(tmp_path, [callback], accumulate_grad_batches=accumulate).fit(module, loader())
    batches = 6 * accumulate
    assert (callback.total_forward_nfe, callback.total_backward_nfe) == (10 * batches, 10 * batches)
    assert module.calls == 20 * batches
    logged = rows(tmp_path)
    assert [int(row["step"]) for row in logged] == [1, 3, 5]
    last = {key: float(value) for key, value in logged[-1].items()}
    assert last["equilibrium/forward_nfe"] == last["equilibrium/backward_nfe"] == 10
    assert (last["equilibrium/1/forward_nfe"], last["equilibrium/2/backward_nfe"]) == (6, 4)
    assert last["equilibrium/total_forward_nfe"] == 10 * batches
    assert last["equilibrium/reconstruction_mismatch"] == 0
    assert not any("sample_nfe" in key or "converged" in key for key in last)


def test_a_single_layer_has_no_keys_of_its_own(tmp_path):
    trainer(tmp_path, [FunctionEvaluations()]).fit(Stranger(adjoint=BackpropAdjoint()), loader())
    keys = {key for row in rows(tmp_path) for key in row if key.startswith("equilibrium/")}
    assert keys == {f"equilibrium/{key}" for key in ("forward_nfe", "total_forward_nfe", "relative_residual")}


def test_the_statistics_that_a_task_hands_on_are_the_same_as_those_heard(tmp_path):
    """The language model's task hands on `outputs["step"].stats`, and its layer is listened to: it counts once."""
    data = tiny_data(tmp_path)
    run = tiny_trainer(tmp_path, max_steps=5, limit_val_batches=0)
    run.fit(tiny_task(data), data)
    (callback,) = (c for c in run.callbacks if isinstance(c, FunctionEvaluations))
    assert (callback.total_forward_nfe, callback.total_backward_nfe) == (15, 15)


def steps_of_plain_loop(f, x, rtol, max_steps):
    """Steps until the sample meets the tolerance, and whether it does."""
    z = torch.zeros_like(x)
    for step in range(max_steps + 1):
        value = f(z, x)
        if step > 0 and (value - z).norm() <= rtol * (value.norm() + 1e-5):
            return step, True
        z = value
    return max_steps, False


def test_convergence_is_that_of_a_plain_loop_over_each_sample(tmp_path):
    rtol, max_steps = 0.03, 5
    module = Stranger(PicardSolver(max_steps=max_steps, rtol=rtol), adjoint=BackpropAdjoint(), scale=0.8, lr=0.0)
    trainer(tmp_path, [FunctionEvaluations()], max_steps=2, log_every_n_steps=2).fit(module, loader())
    with torch.no_grad():
        newest, _ = list(loader())[1]
        x = module.encoder.train()(newest)
        results = [steps_of_plain_loop(module.layers[0].f, x[i : i + 1], rtol, max_steps) for i in range(len(x))]
    found, converged = zip(*results, strict=True)
    (row,) = rows(tmp_path)
    assert 1 < min(found) < max(found)
    assert 0 < sum(converged) < len(converged)
    assert float(row["equilibrium/sample_nfe_mean"]) == pytest.approx(sum(found) / len(found))
    assert float(row["equilibrium/sample_nfe_max"]) == max(found)
    assert float(row["equilibrium/fraction_converged"]) == pytest.approx(sum(converged) / len(converged))


def test_the_solvers_steps_may_change_from_batch_to_batch(tmp_path):
    """DepthJitter, which comes first, has restored the solver when the samples are counted."""
    module = Stranger(PicardSolver(max_steps=2, rtol=1e-9), adjoint=BackpropAdjoint())
    trainer(tmp_path, [DepthJitter(steps=[5]), FunctionEvaluations()]).fit(module, loader())
    assert {float(row["equilibrium/sample_nfe_max"]) for row in rows(tmp_path)} == {5.0}
