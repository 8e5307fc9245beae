"""Threads that share f: each gets what it would get alone, and afterwards the modules are what they were."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from revdeq_lightning.equilibrium import EquilibriumLayer, MomentumSolver, normalize_weights
from tests.helpers.equilibrium import EVERY_ADJOINT, assert_equal_gradients, project

WEIGHTS = {
    "plain": lambda f: f,
    "weight": lambda f: normalize_weights(f, "weight"),
    "spectral": lambda f: normalize_weights(f, "spectral"),
    "hooks": lambda f: (nn.utils.weight_norm(f.linear), f)[1],
    "one_layer": lambda f: (parametrizations.orthogonal(f.linear), f)[1],
}
NUM_THREADS = 3


class Waiting(nn.Module):
    """Lets the other threads go on in the middle of every evaluation, where they would find what is not theirs."""

    def __init__(self, dropout):
        super().__init__()
        self.linear, self.dropout, self.turn = nn.Linear(4, 4), nn.Dropout(dropout), threading.Event()

    def forward(self, z, x):
        before = self.linear(z)
        self.turn.wait(0.001)
        return 0.4 * torch.tanh(self.dropout(before) + self.linear(z)) + x


def layer_of(adjoint, weights, dropout=0.0):
    torch.manual_seed(0)
    layer = EquilibriumLayer(Waiting(dropout), solver=MomentumSolver(max_steps=4), adjoint=adjoint)
    WEIGHTS[weights](layer.f)
    return layer


def inputs(k):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(k))


def in_threads(work):
    """`work(k)` in threads at the same time; what they return, in order."""
    together = threading.Barrier(NUM_THREADS)

    def run(k):
        together.wait()
        return work(k)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(run, range(NUM_THREADS)))


def contents(layer):
    """Everything that the modules hold, by identity, as far as it is not memory that they update."""
    return [
        {name: id(value) for name, value in (*vars(module).items(), *module._parameters.items()) if name != "weight"}
        for module in layer.modules()
    ]


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("adjoint", "weights", "mode"),
    # How weights are exchanged does not depend on the adjoint, but for where it evaluates f; nor on the mode, but that
    # nothing is evaluated again.
    [
        *((adjoint, "weight", "training") for adjoint in EVERY_ADJOINT),
        *(("reversible", weights, "training") for weights in WEIGHTS if weights != "weight"),
        ("reversible", "weight", "inference"),
        ("backprop", "spectral", "no_grad"),
        ("implicit", "hooks", "no_grad"),
        ("neumann", "one_layer", "inference"),
    ],
)
def test_each_gets_what_it_gets_alone(adjoint, weights, mode):
    layer = layer_of(EVERY_ADJOINT[adjoint], weights)
    if weights == "spectral":
        layer.eval()  # in training its estimate moves with every solve, of whichever thread
    parameters = list(layer.parameters())

    def work(k):
        x = inputs(k).requires_grad_()
        with {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            value = layer(x).value
        return [value, *torch.autograd.grad(project(value), [x, *parameters])] if mode == "training" else [value]

    alone, before = [work(k) for k in range(NUM_THREADS)], contents(layer)
    for together, expected in zip(in_threads(work), alone, strict=True):
        assert_equal_gradients(together, expected, 0.0)
    assert contents(layer) == before
    with torch.no_grad():  # and the weights are still computed from the parameters
        for parameter in parameters:
            parameter.mul_(0.5)
        fresh = layer_of(EVERY_ADJOINT[adjoint], weights).train(layer.training)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(inputs(0)).value, fresh(inputs(0)).value)


def test_spectral_normalization_in_training_is_one_map_a_solve():
    layer = layer_of(EVERY_ADJOINT["reversible"], "spectral")  # a mismatch raises

    def work(k):
        project(layer(inputs(k)).value).backward()

    in_threads(work)
    assert not any("forward" in vars(module) for module in layer.modules())


@pytest.mark.parametrize("adjoint", [EVERY_ADJOINT["reversible"], EVERY_ADJOINT["recorded"]])
def test_each_solve_has_one_dropout_mask_of_its_own(adjoint):
    layer = layer_of(adjoint, "plain", dropout=0.5)  # a mask that changes within a solve is a mismatch, which raises
    masks = {}
    layer.f.dropout.register_forward_hook(
        lambda module, args, output: masks.setdefault(threading.get_ident(), []).append(output == 0)
    )
    in_threads(lambda k: project(layer(inputs(k)).value).backward())
    assert len(masks) == NUM_THREADS
    firsts = [of_thread[0] for of_thread in masks.values()]
    assert all(torch.equal(mask, of_thread[0]) for of_thread in masks.values() for mask in of_thread)
    assert not any(torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


def test_cached_parametrizations_end_with_their_region():
    """`parametrize.cached()` counts its regions in all threads: the count and its weights are left alone."""
    layer = layer_of(EVERY_ADJOINT["backprop"], "weight")

    def work(k):
        with parametrize.cached():
            return project(layer(inputs(k)).value).backward()

    in_threads(work)
    assert parametrize._cache_enabled == 0
    assert parametrize._cache == {}


def test_an_inner_equilibrium_of_one_thread_is_the_layer_of_another():
    inner = layer_of(EVERY_ADJOINT["reversible"], "plain")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, z, x):
            return 0.5 * torch.tanh(self.inner(z).value) + x

    layers = [inner, EquilibriumLayer(Outer(), solver=inner.solver, adjoint=EVERY_ADJOINT["reversible"]), inner]

    def work(k):
        x = inputs(k).requires_grad_()
        value = layers[k](x).value
        return list(torch.autograd.grad(project(value), [x, *inner.parameters()]))

    alone = [work(k) for k in range(NUM_THREADS)]
    for together, expected in zip(in_threads(work), alone, strict=True):
        assert_equal_gradients(together, expected, 0.0)


@pytest.mark.parametrize(
    ("inner", "outer"), [("reversible", "reversible"), ("checkpointed", "reversible"), ("implicit", "backprop")]
)
def test_a_gradient_in_f_may_be_taken_in_another_thread(inner, outer):
    """As autograd does on a GPU: its backward pass evaluates on behalf of the thread that evaluates f."""

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.pool = layer_of(EVERY_ADJOINT[inner], "plain"), None

        def forward(self, z, x):
            with torch.enable_grad():
                own = z.detach().requires_grad_()
                energy = self.inner(own).value.square().sum()
            take = lambda: torch.autograd.grad(energy, own)[0]  # noqa: E731
            return x - 0.1 * (self.pool.submit(take).result(timeout=30) if self.pool else take())

    f = Energy()
    layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=2), adjoint=EVERY_ADJOINT[outer])
    with torch.no_grad():
        alone = layer(inputs(0)).value
    x = inputs(0).requires_grad_()
    with ThreadPoolExecutor(1) as f.pool:
        value = layer(x).value
        project(value).backward()
    assert torch.equal(value, alone)
