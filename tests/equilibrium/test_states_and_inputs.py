"""Forms of state and input, and several solves in one graph: the gradient must be that of BPTT."""

import pytest
import torch
from torch import nn

from revdeq_lightning.equilibrium import BackpropAdjoint, EquilibriumLayer, MomentumSolver, ReversibleSolver
from tests.helpers.equilibrium import (
    BPTT,
    REVERSIBLE,
    SOLVERS,
    TOLERANCE,
    ConvBlock,
    assert_equal_gradients,
    attention_layer,
    backward,
    gradients_of,
    matches_bptt,
    project,
    relative_error,
    sequence,
    solve,
    with_solver,
)


class Pyramid(nn.Module):
    """Two scales as a dict, with x a tuple of tensors, an integer tensor, a string and None."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.fine, self.coarse = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, z, x):
        (injected, tokens), mode, nothing = x["signal"], x["mode"], x["nothing"]
        assert mode == "sum"
        assert nothing is None
        fine = torch.tanh(self.fine(z["fine"]) + injected + self.embedding(tokens))
        coarse = torch.tanh(self.coarse(z["coarse"]) + fine.mean(1).to(z["coarse"].dtype))
        return {"fine": fine + z["coarse"].to(fine.dtype)[:, None], "coarse": coarse}


@pytest.mark.parametrize(("solver", "used"), [(SOLVERS["momentum"], "both"), (SOLVERS["tolerance"], "fine")])
def test_pytrees(solver, used):
    def run(adjoint):
        torch.manual_seed(0)
        layer = EquilibriumLayer(Pyramid(), solver=solver, adjoint=adjoint)
        layer.f.coarse.double()  # leaves of the state may differ in dtype
        x = sequence(dim=8)
        tokens = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(3))
        z0 = {"fine": sequence(seed=2, dim=8), "coarse": torch.zeros(4, 8, dtype=torch.float64, requires_grad=True)}
        value = layer({"signal": (x, tokens), "mode": "sum", "nothing": None}, z0).value
        assert set(value) == {"fine", "coarse"}
        assert (value["fine"].dtype, value["coarse"].dtype) == (torch.float32, torch.float64)
        loss = project(value["fine"])
        if used == "both":
            loss = loss + project(value["coarse"])
        loss.backward()
        return gradients_of(layer, x, z0["fine"], z0["coarse"])

    assert_equal_gradients(run(REVERSIBLE), run(BPTT))


LAYOUTS = {
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(2, 3),
    "expanded": lambda tensor: tensor[:1].expand(2, -1, -1, -1),
    "strided": lambda tensor: tensor[..., ::2],
}


@pytest.mark.parametrize(
    ("layout", "solver"),
    [
        ("channels_last", MomentumSolver(beta=0.8, momentum=0.125, max_steps=7)),
        ("transposed", SOLVERS["tolerance"]),
        ("expanded", ReversibleSolver(max_steps=4)),
        ("strided", MomentumSolver(beta=0.8, momentum=0.125, max_steps=20)),
    ],
)
def test_memory_layouts(layout, solver):
    def run(adjoint):
        torch.manual_seed(0)
        layer = EquilibriumLayer(ConvBlock(), solver=solver, adjoint=adjoint).double()
        x = torch.randn(2, 16, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        z0 = torch.zeros(2, 16, 6, 6, dtype=torch.float64).requires_grad_()
        project(layer(LAYOUTS[layout](x), LAYOUTS[layout](z0)).value).backward()
        return gradients_of(layer, x, z0)

    assert_equal_gradients(run(REVERSIBLE), run(BPTT), 1e-7)


@matches_bptt()
def test_x_is_also_the_initial_state_of_a_batch_of_one(solver, adjoint):
    layer, x = attention_layer(solver, adjoint), sequence(batch=1)
    return backward(layer, x, x)


def test_f_that_returns_one_of_its_arguments():
    for f in (lambda z, x: x, lambda z, x: z):

        def run(adjoint, f=f):
            x, z0 = sequence(), sequence(seed=2)
            project(solve(f, x, SOLVERS["reversible"], adjoint, z0).value).backward()
            return torch.stack([torch.zeros_like(x) if t.grad is None else t.grad + 1 for t in (x, z0)])

        # BPTT calls an input that does not enter None, the reversible adjoint may call it None or 0.
        assert relative_error(run(REVERSIBLE), run(BPTT)) <= TOLERANCE


# Several solves


@with_solver
def test_layer_used_twice_in_one_graph_keeps_its_stats_apart(solver):
    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        first = layer(x)
        second = layer(torch.tanh(first.value)[:2])
        (project(first.value) + project(second.value)).backward()
        return gradients_of(layer, x), (first.stats, second.stats)

    (ours, both), (reference, _) = run(REVERSIBLE), run(BPTT)
    assert_equal_gradients(ours, reference)
    assert [stats.num_steps.shape for stats in both] == [(4,), (2,)]
    for stats in both:
        assert stats.reconstruction_mismatch == 0
        assert stats.backward_nfe == int(stats.num_steps.max()) * solver.evaluations_per_step


@matches_bptt()
def test_gradients_accumulate_over_interleaved_backward_calls(solver, adjoint):
    layer, a, b = attention_layer(solver, adjoint), sequence(), sequence(seed=2, batch=3)
    first, second = layer(a), layer(b)
    project(second.value).backward()
    assert first.stats.reconstruction_mismatch is None
    assert first.stats.backward_nfe is None
    project(first.value).backward()
    return gradients_of(layer, a, b)


@with_solver
def test_checkpointed_bptt_equals_stored_bptt_bit_for_bit(solver):
    def run(adjoint):
        layer, x = attention_layer(solver, adjoint, dropout=0.3), sequence()
        torch.manual_seed(3)
        solution = layer(x)
        torch.rand(3)  # others draw between the passes
        forward_nfe = solution.stats.forward_nfe
        project(solution.value).backward()
        return [*gradients_of(layer, x), torch.get_rng_state().float()], forward_nfe, solution.stats.backward_nfe

    stored, nfe, backward_nfe = run(BPTT)
    checkpointed, checkpointed_nfe, checkpointed_backward_nfe = run(BackpropAdjoint(checkpoint=True))
    assert_equal_gradients(checkpointed, stored, 0.0)
    assert backward_nfe is None
    assert checkpointed_nfe == nfe
    assert 0 < checkpointed_backward_nfe <= nfe


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, z, x):
        rate = torch.linspace(0.05, 0.9, len(z)).view(-1, 1, 1)
        return rate * torch.tanh(self.linear(z)) + 0.3 * rate * z.flip(0) + x


@pytest.mark.parametrize("make", [MomentumSolver, ReversibleSolver])
def test_f_that_mixes_samples_of_which_some_have_stopped(make):
    """A stopped sample still enters the evaluations of the others, and has a gradient from there."""

    def run(adjoint):
        torch.manual_seed(0)
        layer = EquilibriumLayer(Mixing(), solver=make(beta=0.7, max_steps=12, rtol=0.05), adjoint=adjoint)
        x = sequence()
        solution = layer(x)
        assert solution.stats.num_steps.min() < solution.stats.num_steps.max()
        project(solution.value).backward()
        return gradients_of(layer, x)

    assert_equal_gradients(run(REVERSIBLE), run(BPTT))
