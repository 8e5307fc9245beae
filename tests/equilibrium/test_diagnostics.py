"""Diagnostics against dense Jacobians, their eigenvalues, gradients computed by hand, and states that f notes."""

import math

import pytest
import torch
from torch import Tensor, nn

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    EquilibriumLayer,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    gradient_error,
    jacobian_regularization,
    recorded_residuals,
    spectral_radius,
)
from tests.helpers.equilibrium import (
    BPTT,
    IMPLICIT,
    REVERSIBLE,
    AttentionBlock,
    Spy,
    TanhMap,
    attention_layer,
    gradients_of,
    inputs,
    project,
    refuses,
    relative_error,
    sequence,
    solve,
)


class Scaled(nn.Module):
    """f(z, x) = tanh(x_scale * W z + x_shift): each sample with a Jacobian of its own."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(dim, dim, dtype=torch.float64, generator=generator) / dim**0.5)
        self.calls = 0

    def forward(self, z: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        return torch.tanh(x[0] * (z @ self.weight.T) + x[1])


def counting(module, inputs, output):
    """A hook that changes a buffer and draws a random number."""
    module.count += 1 + torch.rand(())


def problem(batch: int = 4, dim: int = 6):
    generator = torch.Generator().manual_seed(1)
    z, shift = (torch.randn(batch, dim, dtype=torch.float64, generator=generator) for _ in range(2))
    return Scaled(dim), z, (torch.linspace(0.3, 2.0, batch, dtype=torch.float64)[:, None], shift)


def jacobians(f, z, x, **settings):
    """One matrix a sample."""
    jacobian = torch.autograd.functional.jacobian
    return [
        jacobian(lambda v, i=i: f(v[None], tuple(t[i : i + 1] for t in x))[0], z[i], **settings) for i in range(len(z))
    ]


# Spectral radius


def test_spectral_radius_matches_the_eigenvalues_of_each_sample():
    f, z, x = problem()
    expected = torch.stack([torch.linalg.eigvals(j).abs().max() for j in jacobians(f, z, x)])
    assert expected.min() < 0.5
    assert expected.max() > 0.9
    found = spectral_radius(f, z, x, num_iterations=400)
    # 3%: complex pairs turn, and a mean over finitely many turns is left.
    assert ((found - expected).abs() <= 0.03 * expected).all()
    assert not found.requires_grad
    batch = spectral_radius(f, z, x, num_iterations=400, per_sample=False)
    assert batch.ndim == 0
    assert abs(batch - expected.max()) <= 0.03 * expected.max()


def test_spectral_radius_of_symmetric_rotating_nilpotent_and_constant_maps():
    z = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orthogonal = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    symmetric = orthogonal @ torch.diag(torch.tensor([-0.9, 0.5, 0.1, 0.0], dtype=torch.float64)) @ orthogonal.T
    shift = torch.diag(torch.full((3,), 5.0, dtype=torch.float64), 1)
    for matrix, radius in ((symmetric, 0.9), (0.7 * orthogonal, 0.7), (3 * orthogonal, 3.0), (shift, 0.0)):
        found = spectral_radius(lambda z, x, matrix=matrix: z @ matrix.T + 1, z, None)
        assert torch.allclose(found, torch.full((2,), radius, dtype=torch.float64), rtol=0, atol=1e-6)
    assert spectral_radius(lambda z, x: x, z, z).tolist() == [0.0, 0.0]


def test_spectral_radius_takes_one_evaluation_and_leaves_everything_as_it_was():
    f, z, x = problem()
    f.register_buffer("count", torch.zeros(()))
    f.register_forward_hook(counting)
    state = torch.get_rng_state()
    spectral_radius(f, z.requires_grad_(), x)
    assert f.calls == 1
    assert f.count == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert f.weight.grad is None
    assert z.grad is None
    with torch.inference_mode():
        assert torch.equal(spectral_radius(f, z.detach().clone(), x), spectral_radius(f, z, x))


# Jacobian regularization


def test_jacobian_penalty_of_an_elementwise_map_is_exact():
    """With a diagonal Jacobian every vector of signs gives its Frobenius norm."""
    f = lambda z, x: torch.sin(x * z)  # noqa: E731
    z, x = (torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    x.requires_grad_()
    penalty, expected = jacobian_regularization(f, z, x), (x * torch.cos(x * z)).square().mean()
    assert torch.allclose(penalty, expected, rtol=1e-14, atol=0)
    assert relative_error(*(torch.autograd.grad(value, x)[0] for value in (penalty, expected))) <= 1e-14


def test_jacobian_penalty_tends_to_the_frobenius_norm_and_so_does_its_gradient():
    f, z, x = problem()
    frobenius = torch.stack(jacobians(f, z, x, create_graph=True)).square().sum() / z.numel()
    (expected,) = torch.autograd.grad(frobenius, f.weight)
    errors = []
    for num_samples in (4, 400):
        penalty = jacobian_regularization(f, z, x, num_samples=num_samples, generator=torch.Generator().manual_seed(0))
        errors.append(relative_error(torch.autograd.grad(penalty, f.weight)[0], expected))
    assert abs(penalty - frobenius) <= 0.05 * frobenius  # 1 / sqrt(400)
    assert errors[1] <= 0.05 < errors[0]


def test_jacobian_penalty_without_gradients_or_without_a_jacobian():
    f, z, x = problem()
    with torch.no_grad():
        assert not jacobian_regularization(f, z, x).requires_grad
    assert jacobian_regularization(lambda z, x: x[1], z, x) == 0


# Gradient error


def plain_gradients(f, z0, x, solver, adjoint, cotangent):
    x = tuple(t.detach().clone().requires_grad_() for t in x)
    return torch.autograd.grad(solve(f, x, solver, adjoint, z0).value, (f.weight, *x), cotangent)


def test_gradient_error_matches_gradients_compared_by_hand():
    f, z, x = problem()
    solver, adjoint = PicardSolver(max_steps=4), PhantomAdjoint(num_steps=1, beta=1.0)
    cotangent = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    error = gradient_error(f, z, x, solver=solver, adjoint=adjoint, cotangent=cotangent)
    ours, exact = (plain_gradients(f, z, x, solver, a, cotangent) for a in (adjoint, BPTT))
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (ours, exact))
    assert math.isclose(error.relative_l2, float((a - b).norm() / b.norm()), rel_tol=1e-12)
    assert math.isclose(error.cosine, float(nn.functional.cosine_similarity(a, b, dim=0)), rel_tol=1e-12)
    assert list(error.by_tensor) == ["weight", "x[0]", "x[1]"]
    for found, g, reference in zip(error.by_tensor.values(), ours, exact, strict=True):
        assert math.isclose(found, relative_error(g, reference), rel_tol=1e-12)
    assert error.relative_l2 > 0.1


def test_gradient_error_tells_exact_adjoints_from_others():
    f, z, x = problem()
    x = (0.3 * x[0], x[1])
    solver = ReversibleSolver(max_steps=8)
    exact = gradient_error(f, z, x, solver=solver, adjoint=ReversibleAdjoint())
    assert exact.relative_l2 <= 1e-8
    assert exact.cosine >= 1 - 1e-12
    adjoints = [PhantomAdjoint(num_steps=n) for n in (1, 4, 16, 64)]
    errors = [gradient_error(f, z, x, solver=ReversibleSolver(max_steps=60), adjoint=a).relative_l2 for a in adjoints]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3
    assert errors[-1] < 1e-3
    same = gradient_error(
        f, z, x, solver=solver, adjoint=PhantomAdjoint(), reference=PhantomAdjoint(kind="unrolled", num_steps=10)
    )
    assert same.relative_l2 == 0


def test_gradient_error_against_float64_sees_the_rounding_of_float32():
    torch.manual_seed(0)
    f, x = AttentionBlock(dim=16, num_heads=2), sequence()
    solver = ReversibleSolver(max_steps=4)
    same, double = (
        gradient_error(f, torch.zeros_like(x), x, solver=solver, adjoint=ReversibleAdjoint(), reference_dtype=dtype)
        for dtype in (None, torch.float64)
    )
    assert 1e-8 < double.relative_l2 < 1e-4
    assert double.relative_l2 != same.relative_l2
    assert next(f.parameters()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        lowered = [
            gradient_error(f, torch.zeros_like(x), x, solver=solver, adjoint=ReversibleAdjoint(), reference_dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        ]
    assert 1e-3 < lowered[0].relative_l2 < 0.3
    assert math.isclose(lowered[0].relative_l2, lowered[1].relative_l2, rel_tol=1e-3)  # the reference is not lowered


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradient_error_leaves_random_state_buffers_and_gradients_untouched(context):
    layer = attention_layer(ReversibleSolver(max_steps=3), ReversibleAdjoint(), dropout=0.4)
    f = layer.f
    f.register_buffer("count", torch.zeros(()))
    f.register_buffer("nothing", None)
    f.register_forward_hook(counting)
    before = {name: torch.full_like(p, 3.0) for name, p in f.named_parameters()}
    for name, parameter in f.named_parameters():
        parameter.grad = before[name].clone()
    x = sequence()
    x.grad = torch.ones_like(x)
    count, version = f.count, f.qkv.weight._version
    with context():
        state = torch.get_rng_state()
        error = gradient_error(
            f, torch.zeros_like(x), x, solver=layer.solver, adjoint=layer.adjoint, reference_dtype=torch.float64
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert error.relative_l2 <= 1e-4  # the same dropout masks in both runs
    assert f.count is count
    assert f.count == 0
    assert f.qkv.weight._version == version
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(torch.equal(p.grad, before[name]) for name, p in f.named_parameters())


def test_gradient_error_between_forward_and_backward_does_not_disturb_the_backward():
    def gradients(disturb):
        layer, x = attention_layer(ReversibleSolver(max_steps=3), REVERSIBLE), sequence()
        loss = project(layer(x).value)
        if disturb:
            gradient_error(layer.f, torch.zeros_like(x), x, solver=layer.solver, adjoint=IMPLICIT)
        loss.backward()
        return gradients_of(layer, x)

    for ours, reference in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, reference)


OF_PICARD = {"solver": PicardSolver(), "adjoint": BPTT}


@pytest.mark.parametrize(
    ("diagnose", "settings", "fragments"),
    [
        (spectral_radius, {"num_iterations": 1}, ("num_iterations", "at least 2", "1")),
        (jacobian_regularization, {"num_samples": 0}, ("num_samples", "at least 1", "0")),
        (gradient_error, OF_PICARD | {"reference_dtype": torch.float64}, ("float64", "nn.Module", "function")),
        (gradient_error, OF_PICARD, ("nothing to differentiate",)),
    ],
)
def test_settings(diagnose, settings, fragments):
    with refuses(ValueError, *fragments):
        diagnose(lambda z, x: z, torch.zeros(2, 3), None, **settings)


# Residual at every evaluation, against the states that f itself writes down


class Noting(TanhMap):
    """Writes down `norm(f - z) / norm(f)` of each sample at every call of the forward pass."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.noted = []

    def forward(self, z, x):
        value = super().forward(z, x)
        with torch.no_grad():
            self.noted.append([((v - u).norm() / v.norm()).item() for v, u in zip(value, z, strict=True)])
        return value


def recorded(solver, adjoint):
    layer = EquilibriumLayer(Noting(), solver=solver, adjoint=adjoint)
    with recorded_residuals():
        # Samples in which tanh is more and less saturated converge more and less fast.
        solution = layer(inputs() * torch.tensor([[0.3], [1.0], [4.0]]))
    return layer.f.noted, solution.stats


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (MomentumSolver(max_steps=5), ReversibleAdjoint()),
        (ReversibleSolver(max_steps=3), ReversibleAdjoint(forward_with_grad=True)),
        (ReversibleSolver(max_steps=3), BackpropAdjoint(checkpoint=True)),
        (AndersonSolver(max_steps=5), IMPLICIT),
        (BroydenSolver(max_steps=5), PhantomAdjoint()),
    ],
)
def test_the_residual_curve_is_that_of_every_state_at_which_f_was_evaluated(solver, adjoint):
    noted, stats = recorded(solver, adjoint)
    evaluations = solver.max_steps * solver.evaluations_per_step
    assert stats.residual_curve.shape == (evaluations, 3)
    # 1e-5 is added to the norm of f, which is about 1.
    torch.testing.assert_close(stats.residual_curve, torch.tensor(noted[:evaluations]).double(), rtol=1e-4, atol=0)
    assert torch.equal(stats.residual_curve[-1], stats.relative_residual)


@pytest.mark.parametrize("max_steps", [4, 40])
def test_of_a_sample_that_stopped_there_is_no_residual(max_steps):
    noted, stats = recorded(PicardSolver(max_steps=max_steps, rtol=0.02), BPTT)
    curve = stats.residual_curve
    assert len(curve) == stats.forward_nfe == len(noted)
    steps = stats.num_steps.tolist()
    assert (max(steps) == max_steps) == (max_steps == 4)
    assert min(steps) < max(steps)
    for sample, made in enumerate(steps):
        # One evaluation more than steps: that at the state where it stops.
        expected = [row[sample] for row in noted[: made + 1]]
        assert curve[: made + 1, sample].tolist() == pytest.approx(expected, rel=1e-4)
        assert all(math.isnan(value) for value in curve[made + 1 :, sample].tolist())


def test_without_being_asked_for_there_is_no_curve_and_asking_changes_nothing():
    layer, x = attention_layer(MomentumSolver(max_steps=6), REVERSIBLE, dropout=0.2), sequence()

    def run():
        torch.manual_seed(3)
        with Spy() as spy:
            solution = layer(x)
        solution.value.sum().backward()
        return solution, spy.count, torch.rand(())

    plain, waits, draw = run()
    with recorded_residuals():
        asked, waits_when_asked, draw_when_asked = run()
    assert plain.stats.residual_curve is None
    assert len(asked.stats.residual_curve) == asked.stats.forward_nfe == plain.stats.forward_nfe
    assert torch.equal(plain.value, asked.value)
    assert draw == draw_when_asked
    assert waits == waits_when_asked
    assert run()[0].stats.residual_curve is None
