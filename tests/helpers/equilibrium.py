"""Maps f, and gradients to compare with: of the core alone."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    EquilibriumLayer,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    solve_fixed_point,
)

# Maps f(z, x) for the tests: none of them is made to contract.


class AttentionBlock(nn.Module):
    """Pre-norm transformer block on the state, `(batch, time, dim)`; the state grows with every evaluation."""

    def __init__(self, dim: int = 32, num_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        batch, time, dim = z.shape
        qkv = self.qkv(self.norm1(z + x)).view(batch, time, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, dim)
        z = z + self.dropout(self.out(attended))
        return z + self.dropout(self.down(F.gelu(self.up(self.norm2(z)))))


class ConvBlock(nn.Module):
    """The paper's residual layer, `(batch, channels, height, width)`."""

    def __init__(self, channels: int = 16, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, channels) for _ in range(3))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = self.conv2(torch.relu(self.norm1(self.conv1(z))))
        return self.norm3(torch.relu(z + self.norm2(x + inner)))


def gradients(value: Tensor, *sources: Tensor) -> Tensor:
    """Gradient of a fixed random projection of `value`, flattened into one float64 vector."""
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(value.dtype)
    grads = torch.autograd.grad((value * weight).sum(), sources)
    return torch.cat([g.flatten().double() for g in grads])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    value, reference = value.detach(), reference.detach()
    return float((value - reference).norm() / reference.norm())


# Small equilibria, and the comparison of a gradient with that of BPTT under the same conditions.


SOLVERS = {
    "reversible": ReversibleSolver(beta=0.8, max_steps=4),
    "momentum": MomentumSolver(beta=0.8, momentum=0.125, max_steps=7),
    "tolerance": ReversibleSolver(beta=0.5, max_steps=6, rtol=0.2),
}
REVERSIBLE, BPTT = ReversibleAdjoint(mismatch="raise"), BackpropAdjoint()
"""`mismatch="raise"`: a test also fails if the backward pass does not come back to the initial state bit for bit."""
TOLERANCE = 1e-5  # float32: rounding of f, some 1e-7, summed over the evaluations

# Both solvers, and both ways back: all steps of all samples at once, and each sample's own.
with_solver = pytest.mark.parametrize(
    "solver", [SOLVERS["momentum"], SOLVERS["tolerance"]], ids=["momentum", "tolerance"]
)


def attention_layer(solver, adjoint, dim=16, **settings):
    """The same layer for every adjoint."""
    torch.manual_seed(0)
    return EquilibriumLayer(AttentionBlock(dim=dim, num_heads=2, **settings), solver=solver, adjoint=adjoint)


def sequence(seed=1, batch=4, time=5, dim=16, **settings):
    return torch.randn(batch, time, dim, generator=torch.Generator().manual_seed(seed), **settings).requires_grad_()


def project(value):
    """A loss whose gradient differs from element to element."""
    return (value * torch.sin(torch.arange(value.numel()).to(value).view(value.shape))).sum()


def gradients_of(module, *inputs):
    return [tensor.grad for tensor in (*module.parameters(), *inputs)]


def assert_equal_gradients(ours, reference, tolerance=TOLERANCE):
    assert len(ours) == len(reference) > 0
    assert any(gradient is not None for gradient in reference)
    for i, (gradient, expected) in enumerate(zip(ours, reference, strict=True)):
        assert (gradient is None) == (expected is None), i
        if gradient is not None:
            assert gradient.dtype == expected.dtype
            assert gradient.shape == expected.shape
            assert relative_error(gradient, expected) <= tolerance, i


def matches_bptt(tolerance=TOLERANCE):
    """A test of `test(solver, adjoint)`, which returns gradients: the reversible ones must be those of BPTT."""

    def decorate(run):
        @with_solver
        def test(solver):
            assert_equal_gradients(run(solver, REVERSIBLE), run(solver, BPTT), tolerance)

        test.__name__, test.__doc__ = run.__name__, run.__doc__
        return test

    return decorate


def backward(layer, *inputs):
    """The gradients of a layer and of its inputs."""
    project(layer(*inputs).value).backward()
    return gradients_of(layer, *inputs)


def refuses(error, *fragments):
    """All fragments, in this order, must be in the message."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, fragments)))


# A small map whose implicit gradient a dense solve gives, and the adjoints that are measured by it.


EVERY_SOLVER = {
    "picard": PicardSolver,
    "relaxed": RelaxedSolver,
    "reversible": ReversibleSolver,
    "momentum": MomentumSolver,
    "anderson": AndersonSolver,
    "broyden": BroydenSolver,
}

with_every_solver = pytest.mark.parametrize("make", EVERY_SOLVER.values(), ids=EVERY_SOLVER)


EVERY_ADJOINT = {
    "reversible": REVERSIBLE,
    "backprop": BPTT,
    "checkpointed": BackpropAdjoint(checkpoint=True),
    "implicit": ImplicitAdjoint(solver=AndersonSolver(max_steps=30, rtol=1e-10), unconverged="ignore"),
    "unrolled": PhantomAdjoint(beta=0.8),
    "neumann": PhantomAdjoint(beta=0.8, kind="neumann"),
    "recorded": ReversibleAdjoint(mismatch="raise", forward_with_grad=True),
}
IMPLICIT, UNROLLED, NEUMANN = ADJOINTS = [EVERY_ADJOINT[name] for name in ("implicit", "unrolled", "neumann")]

with_every_adjoint = pytest.mark.parametrize("adjoint", EVERY_ADJOINT.values(), ids=EVERY_ADJOINT)
with_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=["implicit", "unrolled", "neumann"])


def _pairs():
    for i, (solver, make) in enumerate(EVERY_SOLVER.items()):
        for k, (name, adjoint) in enumerate(EVERY_ADJOINT.items()):
            is_two_step = solver in ("reversible", "momentum")
            if is_two_step or not isinstance(adjoint, ReversibleAdjoint):
                tolerance = {} if (i + k) % 2 else {"rtol": 0.3}
                yield f"{solver}-{name}{'-tolerance' * len(tolerance)}", (make(max_steps=4, **tolerance), adjoint)


PAIRS = dict(_pairs())
"""Every solver with every adjoint that supports it; each of them meets a tolerance, and none, in every other pair."""
with_every_pair = pytest.mark.parametrize(("solver", "adjoint"), PAIRS.values(), ids=PAIRS)

TIGHT = ImplicitAdjoint(solver=AndersonSolver(max_steps=100, rtol=1e-12))


class Affine(nn.Module):
    """f(z, x) = A z + x, A symmetric with eigenvalues from -norm to norm, or norm * a rotation; counts its calls."""

    def __init__(self, norm: float = 0.7, dim: int = 5, rotation: bool = False) -> None:
        super().__init__()
        random = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        orthogonal = torch.linalg.qr(random)[0]
        eigenvalues = torch.linspace(-norm, norm, dim, dtype=torch.float64)
        symmetric = orthogonal @ torch.diag(eigenvalues) @ orthogonal.T
        self.weight = nn.Parameter(norm * orthogonal if rotation else symmetric)
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return z @ self.weight.T + x

    def fixed_point(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.inv(torch.eye(len(self.weight), dtype=x.dtype) - self.weight).T


class TanhMap(nn.Module):
    """f(z, x) = tanh(W z + x) + mixing * the mean over the batch, W random of the given norm; counts its calls."""

    def __init__(self, norm: float = 0.8, mixing: float = 0.0, dim: int = 6) -> None:
        super().__init__()
        weight = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))
        self.mixing = mixing
        self.calls = self.backward_calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        value = torch.tanh(z @ self.weight.T + x) + self.mixing * z.mean(0)
        if value.requires_grad:
            value.register_hook(self._count)
        return value

    def _count(self, gradient: Tensor) -> None:
        self.backward_calls += 1


def inputs(batch: int = 3, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, dim, dtype=torch.float64, generator=generator).requires_grad_()


def solve(f, x, solver, adjoint, z0=None):
    return solve_fixed_point(f, torch.zeros_like(x) if z0 is None else z0, x, solver=solver, adjoint=adjoint)


def dense_implicit_gradients(f, z, x, *parameters):
    """`(I - J^T)^-1` as a matrix over the whole batch."""
    z = z.detach()
    flat = lambda v: f(v.view_as(z), x.detach()).flatten()  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(flat, z.flatten())
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)  # as in `gradients`
    w = torch.linalg.solve((torch.eye(len(jacobian), dtype=z.dtype) - jacobian).T, g.flatten())
    grads = torch.autograd.grad(f(z, x), (x, *parameters), w.view_as(z))
    return torch.cat([gradient.flatten() for gradient in grads])


class Damped(nn.Module):
    """f made to contract, with a rate of its own for each sample if it is given so."""

    def __init__(self, f, rate=0.4):
        super().__init__()
        self.f, self.rate = f, rate

    def forward(self, z, x):
        return self.rate * torch.tanh(self.f(z, x)) + x


def damped_layer(solver, adjoint, **settings):
    layer = attention_layer(solver, adjoint, **settings)
    layer.f = Damped(layer.f)
    return layer


# What makes the host wait for a device.


SYNCHRONIZING = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal", "masked_select", "_unique2")
METHODS = ("tolist", "numpy", "cpu")


class Spy(TorchDispatchMode):
    """Counts what reads a tensor's values on the host; the states of the random generators are always there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __enter__(self):
        self.methods = {name: getattr(torch.Tensor, name) for name in METHODS}
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, self._counted(method))
        return super().__enter__()

    def __exit__(self, *exception):
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*exception)

    def _counted(self, method):
        def counted(tensor, *args, **kwargs):
            self.count += 1
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in SYNCHRONIZING and args[0].dtype != torch.uint8:
            self.count += 1
        if name in ("index", "index_put", "index_put_"):
            self.count += any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


# What tests that compile need.


def cpp_compiler():
    """Name of the C++ compiler that inductor would take; None if there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


COMPILES = [
    pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler, and none was found"),
    # The compiler's own warnings, of itself and of the leaves that it looks at.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
