"""Forms of state and input, and several solves in one graph: the gradient must be that of BPTT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    MomentumSolver,
    ReversibleSolver,
    solve_fixed_point,
)
from tests.helpers.equilibrium import (
    BPTT,
    REVERSIBLE,
    SOLVERS,
    TOLERANCE,
    ConvBlock,
    assert_equal_gradients,
    assert_layer_matches_bptt,
    assert_matches_bptt,
    attention_layer,
    gradients_of,
    project,
    relative_error,
    sequence,
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


@with_solver
@pytest.mark.parametrize("used", ["both", "fine"])
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

    assert_matches_bptt(run)


@with_solver
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided"])
def test_memory_layouts(solver, layout):
    def lay_out(tensor):
        if layout == "channels_last":
            return tensor.to(memory_format=torch.channels_last)
        if layout == "transposed":
            return tensor.transpose(2, 3)
        if layout == "expanded":
            return tensor[:1].expand(2, -1, -1, -1)
        return tensor[..., ::2]

    # Beyond what one word of remainders holds, so that packed words take part.
    steps = 60 if isinstance(solver, MomentumSolver) else 30
    solver = MomentumSolver(beta=0.8, momentum=0.125, max_steps=steps) if steps == 60 else copy.copy(solver)

    def run(adjoint):
        torch.manual_seed(0)
        layer = EquilibriumLayer(ConvBlock(), solver=solver, adjoint=adjoint).double()
        x = torch.randn(2, 16, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        z0 = torch.zeros(2, 16, 6, 6, dtype=torch.float64).requires_grad_()
        project(layer(lay_out(x), lay_out(z0)).value).backward()
        return gradients_of(layer, x, z0)

    assert_matches_bptt(run, 1e-7)


@with_solver
def test_batch_of_one(solver):
    assert_layer_matches_bptt(lambda adjoint: (attention_layer(solver, adjoint), sequence(batch=1)))


@with_solver
def test_x_is_also_the_initial_state(solver):
    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        project(layer(x, x).value).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run)


def test_f_that_returns_one_of_its_arguments():
    for f in (lambda z, x: x, lambda z, x: z):

        def run(adjoint, f=f):
            x, z0 = sequence(), sequence(seed=2)
            value = solve_fixed_point(f, z0, x, solver=SOLVERS["reversible"], adjoint=adjoint).value
            project(value).backward()
            return [torch.zeros_like(x) if t.grad is None else t.grad + 1 for t in (x, z0)]

        # BPTT calls an input that does not enter None, the reversible adjoint may call it None or 0.
        ours, reference = run(REVERSIBLE), run(BPTT)
        assert relative_error(torch.stack(ours), torch.stack(reference)) <= TOLERANCE


# Several solves


@with_solver
def test_layer_used_twice_in_one_graph_keeps_its_stats_apart(solver):
    solutions = []

    def run(adjoint):
        layer, x = attention_layer(solver, adjoint), sequence()
        first = layer(x)
        second = layer(torch.tanh(first.value)[:2])
        solutions[:] = [first, second]
        (project(first.value) + project(second.value)).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run)
    run(REVERSIBLE)
    first, second = (solution.stats for solution in solutions)
    assert first is not second
    assert first.num_steps.shape == (4,)
    assert second.num_steps.shape == (2,)
    for stats in (first, second):
        assert stats.reconstruction_mismatch == 0
        assert stats.backward_nfe == int(stats.num_steps.max()) * solver.evaluations_per_step


def test_backward_of_one_of_two_solves_leaves_the_other():
    layer, x = attention_layer(SOLVERS["reversible"], REVERSIBLE), sequence()
    first, second = layer(x), layer(x.detach() * 2)
    project(second.value).backward()
    assert first.stats.reconstruction_mismatch is None
    assert first.stats.backward_nfe is None
    assert second.stats.reconstruction_mismatch == 0
    project(first.value).backward()
    assert first.stats.reconstruction_mismatch == 0


@with_solver
def test_gradients_accumulate_over_interleaved_backward_calls(solver):
    def run(adjoint):
        layer, a, b = attention_layer(solver, adjoint), sequence(), sequence(seed=2, batch=3)
        first, second = layer(a).value, layer(b).value
        project(second).backward()
        project(first).backward()
        return gradients_of(layer, a, b)

    assert_matches_bptt(run)


def test_retained_graph_outside_the_solve():
    def run(adjoint):
        layer, x = attention_layer(SOLVERS["reversible"], adjoint), sequence()
        shared = torch.sin(x)
        value = layer(shared).value
        project(shared).backward(retain_graph=True)
        project(value).backward(retain_graph=True)
        project(shared * 2).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run)


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


def test_layer_below_and_above_others():
    """In a network: encoder, equilibrium, head; the solution passes through as a NamedTuple."""

    class Network(nn.Module):
        def __init__(self, adjoint):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
            self.layer = attention_layer(SOLVERS["momentum"], adjoint)

        def forward(self, x):
            solution = self.layer(self.encoder(x))
            return solution._replace(value=self.head(solution.value.mean(1)))

    def run(adjoint):
        network, x = Network(adjoint), sequence()
        F.cross_entropy(network(x).value, torch.tensor([0, 1, 2, 0])).backward()
        return gradients_of(network, x)

    assert_matches_bptt(run)


@pytest.mark.parametrize("momentum", [False, True])
def test_f_that_mixes_samples_of_which_some_have_stopped(momentum):
    """A stopped sample still enters the evaluations of the others, and has a gradient from there."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, z, x):
            rate = torch.linspace(0.05, 0.9, len(z)).view(-1, 1, 1)
            return rate * torch.tanh(self.linear(z)) + 0.3 * rate * z.flip(0) + x

    settings = {"max_steps": 12, "rtol": 0.05}
    solver = MomentumSolver(beta=0.8, **settings) if momentum else ReversibleSolver(beta=0.5, **settings)

    def run(adjoint):
        torch.manual_seed(0)
        layer, x = EquilibriumLayer(Mixing(), solver=solver, adjoint=adjoint), sequence()
        solution = layer(x)
        assert solution.stats.num_steps.min() < solution.stats.num_steps.max()
        project(solution.value).backward()
        return gradients_of(layer, x)

    assert_matches_bptt(run)
