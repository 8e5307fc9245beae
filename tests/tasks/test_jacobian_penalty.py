"""The Jacobian penalty of a training step against the whole matrix df/dz."""

import statistics

import pytest
import scipy.linalg
import torch

from revdeq_lightning.data.text.module import TextBatch
from revdeq_lightning.models import ClassifierConfig, ReasonerConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig
from revdeq_lightning.tasks.reasoning import ReasoningTask
from tests.helpers.equilibrium import relative_error

WEIGHT = 3.0
SIZES = {"vocab_size": 11, "context_length": 4, "d_model": 4, "num_heads": 2, "d_mlp": 6}
SOLVERS = {
    "momentum": {"max_steps": 5},
    "implicit": {"solver": "anderson", "max_steps": 20, "rtol": 1e-5, "unconverged": "ignore"},
}


def make_task(solver, weight=WEIGHT):
    torch.manual_seed(0)
    task = LanguageModelingTask(TransformerConfig(**SIZES), SolverConfig(**solver), OptimizerConfig(), False, weight)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return task.double()


def mean_over_signs(task, batch, monkeypatch):
    """The step's loss, logged penalty and gradient, averaged over the rows of a Hadamard matrix as the random signs.

    The rows are orthogonal, so that the mean over them is no estimate: `mean |J^T h|^2 = |J|^2`.
    """
    rows = scipy.linalg.hadamard(batch.tokens.numel() * SIZES["d_model"])
    logged, losses = [], []
    task.log = lambda key, value: logged.append(float(value)) if key == "train/jacobian_penalty" else None
    task.zero_grad()
    for row in torch.from_numpy(rows):
        monkeypatch.setattr(torch, "randint", lambda low, high, shape, row=row, **_: (row.view(shape) + 1) // 2)
        loss = task.training_step(batch, 0)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, logged, flat_gradient(task) / len(rows)


def flat_gradient(task):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in task.model.parameters()])


def dense_penalty(task, batch):
    """Squared norm of the Jacobian over its dimension, at a solution taken for a constant; differentiable."""
    model = task.model
    x = model.embed(batch.tokens)
    z = model.equilibrium(x).value.detach()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        f = model.equilibrium.f
        jacobian = torch.autograd.functional.jacobian(lambda z: f(z, x), z, create_graph=True)
    return jacobian.square().sum() / z.numel()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_penalty_of_a_step_is_the_norm_of_the_jacobian_with_its_gradient(solver, monkeypatch):
    batch = TextBatch(torch.tensor([[1, 5, 3, 7]]), torch.tensor([[5, 3, 7, 2]]))
    task = make_task(solver)
    losses, penalties, gradient = mean_over_signs(task, batch, monkeypatch)
    plain_losses, nothing, plain_gradient = mean_over_signs(make_task(solver, 0.0), batch, monkeypatch)
    assert nothing == []
    task.zero_grad()
    dense = dense_penalty(task, batch)
    dense.backward()
    assert statistics.mean(penalties) == pytest.approx(float(dense.detach()), rel=1e-9)
    assert losses == pytest.approx([plain_losses[0] + WEIGHT * penalty for penalty in penalties], rel=1e-9)
    added = (gradient - plain_gradient) / WEIGHT
    assert relative_error(added, flat_gradient(task)) <= 1e-9


def test_every_stage_of_a_classifier_is_penalized():
    torch.manual_seed(0)
    network = ClassifierConfig(num_classes=3, channels=[16, 16])
    task = ClassificationTask(network, SolverConfig(max_steps=2), OptimizerConfig(), jacobian_weight=0.5)
    with task.penalized() as penalties:
        task(torch.randn(2, 3, 8, 8))
    assert len(penalties) == 2
    assert not any(layer._forward_hooks for layer in task.model.equilibria)


def test_only_the_last_solve_of_a_late_start_is_penalized(monkeypatch):
    network, inputs, counts = ReasonerConfig(2, 2, [4], 8), torch.zeros(3, 4, dtype=torch.long), []
    settings = SolverConfig(max_steps=2), OptimizerConfig()
    task = ReasoningTask(network, *settings, late_start=1.0, late_steps=1, jacobian_weight=0.5)
    monkeypatch.setattr(task, "log", lambda *_: None)
    monkeypatch.setattr(task, "with_penalty", lambda loss, penalties: counts.append(len(penalties)) or loss)
    task.training_step((inputs, inputs), 0)
    assert counts == [1]


@pytest.mark.parametrize(
    ("solver", "weight", "compile", "match"),
    [
        ({}, -1.0, False, r"jacobian_weight must be in \[0, inf\), got -1.0"),
        ({}, float("nan"), False, "got nan"),
        ({"solver": "none"}, 0.1, False, "jacobian_weight=0.1 needs a model with an equilibrium"),
        ({}, 0.1, True, "second derivatives, which torch.compile does not support: set compile=false"),
    ],
)
def test_a_penalty_that_cannot_be_is_an_error(solver, weight, compile, match):
    with pytest.raises(ValueError, match=match):
        LanguageModelingTask(TransformerConfig(**SIZES), SolverConfig(**solver), OptimizerConfig(), compile, weight)
