"""Spectral radii against the eigenvalues of the dense Jacobian."""

import pytest
import torch
from lightning import Callback
from torch import nn

from revdeq_lightning.callbacks.contraction import Contraction, ContractionWarning
from revdeq_lightning.equilibrium import EquilibriumLayer, MomentumSolver
from tests.helpers.modules import DIM, Stranger, loader, trainer


class Linear(nn.Module):
    """`f(z, x) = A z + x`."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z, x):
        return z @ self.matrix.T + x


def radius_of_dense_jacobian(layer, x):
    with torch.no_grad():
        z = layer(x).value
    jacobians = [
        torch.autograd.functional.jacobian(lambda v, i=i: layer.f(v[None], x[i : i + 1])[0], z[i])
        for i in range(len(x))
    ]
    return max(torch.linalg.eigvals(j).abs().max().item() for j in jacobians)


def test_each_of_several_equilibria_has_the_radius_of_its_dense_jacobian(tmp_path):
    module = Stranger(MomentumSolver(max_steps=12), MomentumSolver(max_steps=12), lr=0.0, scale=0.9)
    # A clear largest eigenvalue, so that 100 iterations find it to 1 %.
    run = trainer(tmp_path, [Contraction(1, num_samples=4, num_iterations=100)], max_steps=1)
    run.fit(module, loader())
    with torch.no_grad():
        h = module.train().encoder(next(iter(loader()))[0][:4])
    expected = []
    for layer in module.layers:
        expected.append(radius_of_dense_jacobian(layer, h))
        h = layer(h).value.detach()
    found = [run.callback_metrics[f"equilibrium/{i}/spectral_radius"].item() for i in (1, 2)]
    assert found == pytest.approx(expected, rel=0.03)
    assert run.callback_metrics["equilibrium/spectral_radius"].item() == max(found)


class Grow(Callback):
    """Sets f to a multiple of the identity before each step."""

    def __init__(self, *factors):
        self.factors = factors

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            pl_module.layers[0].f.matrix.copy_(self.factors[trainer.global_step] * torch.eye(DIM))


def test_it_warns_when_f_ceases_to_contract_and_again_after_it_did(tmp_path):
    module = Stranger(lr=0.0)
    module.layers = nn.ModuleList([EquilibriumLayer(Linear(torch.eye(DIM)), solver=MomentumSolver(max_steps=2))])
    run = trainer(tmp_path, [Grow(0.5, 1.2, 1.3, 0.9, 1.1, 0.9), Contraction(1)])
    with pytest.warns(ContractionWarning) as caught:
        run.fit(module, loader())
    messages = [str(w.message) for w in caught if w.category is ContractionWarning]
    assert len(messages) == 2
    assert "at step 2: the spectral radius of df/dz where the solver ends is 1.2" in messages[0]
    assert "at step 5" in messages[1]
