"""torch.compile of f with the real inductor: the same program in both passes, gradients as BPTT's."""

import threading

import pytest
import torch
from torch import nn

from revdeq_lightning.equilibrium import (
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
)
from tests.helpers.equilibrium import (
    BPTT,
    COMPILES,
    EVERY_ADJOINT,
    IMPLICIT,
    REVERSIBLE,
    assert_equal_gradients,
    backward,
    gradients_of,
    project,
)

pytestmark = COMPILES


class Gated(nn.Module):
    """Small, but with what inductor fuses: a norm, exponentials and products."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, z, x):
        h = self.norm(z + x)
        return torch.tanh(z) + torch.sigmoid(self.gate(h)) * torch.nn.functional.gelu(self.up(h))


class Outer(nn.Module):
    """An f of which only a part is compiled."""

    def __init__(self):
        super().__init__()
        self.inner = torch.compile(Gated())

    def forward(self, z, x):
        return self.inner(z, x).clone()


class Model(nn.Module):
    """An equilibrium among other layers."""

    def __init__(self, adjoint, f, **settings):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=6), adjoint=adjoint, **settings)

    def forward(self, x):
        return torch.sin(self.head(self.layer(torch.relu(self.embed(x))).value))


class Dropping(Gated):
    def forward(self, z, x):
        return super().forward(nn.functional.dropout(z, 0.3, self.training), x)


@pytest.mark.parametrize(
    ("adjoint", "compile_f"),
    # The solve runs as without the compiler, whichever it is, for every adjoint.
    [
        *((adjoint, True) for adjoint in ("reversible", "checkpointed")),
        *((adjoint, False) for adjoint in ("reversible", "backprop", "implicit", "unrolled")),
    ],
)
def test_compiled_model(adjoint, compile_f):
    """The eager twin is the oracle, with dropout to the same masks."""
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Model(EVERY_ADJOINT[adjoint], Dropping(), num_parts=2)
        if compile_f:
            model.layer.f.compile(backend="aot_eager")  # draws as eager code does
        step = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(5)
            value = step(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))
            project(value).backward()
        results.append([value.detach(), *gradients_of(model)])
        with torch.no_grad():
            results[-1].append(step.eval()(torch.ones(3, 8)))
    assert_equal_gradients(*results)


@pytest.mark.parametrize("adjoint", [REVERSIBLE, BPTT, IMPLICIT])
def test_compiled_f_that_works_in_place(adjoint):
    class InPlace(Gated):
        def forward(self, z, x):
            return super().forward(z.relu_(), x)

    torch.compiler.reset()
    f = InPlace()
    f.compile(backend="aot_eager")
    layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=3), adjoint=adjoint)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), pytest.raises(RuntimeError, match=r"in.place"):
            layer(torch.randn(3, 8))


def test_one_program_for_the_whole_model_is_refused():
    """Not in the words of the compiler alone, which are about its own functions."""
    torch.compiler.reset()
    model, x = Model(REVERSIBLE, Gated()), torch.ones(3, 8)
    for attempt in (
        lambda: torch.compile(model, fullgraph=True, backend="eager")(x),
        lambda: torch.export.export(model, (x,), strict=True),
    ):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"is solved outside.*fullgraph=True.*strict"):
            attempt()


@pytest.mark.parametrize("adjoint", [REVERSIBLE, IMPLICIT], ids=["reversible", "implicit"])
def test_compiled_backward_pass(adjoint):
    """Compiled autograd, against the eager backward pass; a reversible mismatch raises."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Model(adjoint, Gated()), torch.randn(3, 8)
    expected = torch.autograd.grad(project(model(x)), list(model.parameters()))
    loss = project(model(x))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        if isinstance(adjoint, ImplicitAdjoint):
            with pytest.raises(RuntimeError, match=r"compiled_autograd off, or use ReversibleAdjoint\(\)"):
                loss.backward()
            return
        loss.backward()
    assert_equal_gradients([p.grad for p in model.parameters()], list(expected), 1e-6)


def compiled_f(way):
    torch.manual_seed(0)
    if way == "part":
        return Outer()
    f = Gated()
    if way == "torch.compile":
        return torch.compile(f)
    f.compile()
    return f


@pytest.mark.parametrize("way", ["torch.compile", "f.compile", "part"])
def test_compiled_f(way):
    torch.compiler.reset()
    solver, x = MomentumSolver(beta=0.8, momentum=0.125, max_steps=8), torch.randn(3, 8, requires_grad=True)
    gradients = []
    for adjoint in (REVERSIBLE, BPTT):
        layer = EquilibriumLayer(compiled_f(way), solver=solver, adjoint=adjoint)
        for _ in range(2):  # a second training step must meet the programs of the first
            layer.zero_grad()
            x.grad = None
            gradients.append(backward(layer, x))
    assert_equal_gradients(gradients[1], gradients[3])
    eager = EquilibriumLayer(Gated(), solver=solver, adjoint=BPTT)
    names = (name.replace("_orig_mod.", "").replace("inner.", "") for name in layer.state_dict())
    eager.load_state_dict(dict(zip(names, layer.state_dict().values(), strict=True)))
    x.grad = None
    assert_equal_gradients(gradients[1], backward(eager, x), 1e-4)  # inductor rounds otherwise than eager does


@pytest.mark.parametrize("cache", [True, False])
def test_one_program_serves_the_thread_of_the_backward_pass_too(cache):
    """On a GPU that thread is autograd's, with flags of its own."""
    torch.compiler.reset()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    f = Gated()
    f.compile(backend=backend)
    layer = EquilibriumLayer(f, solver=MomentumSolver(max_steps=3), adjoint=REVERSIBLE)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        loss = project(layer(torch.ones(3, 8)).value)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert f.up.weight.grad is not None
    assert len(programs) == 1
