"""Gradients that would be wrong or vanish: errors (or a warning) that say what to change."""

import warnings

import pytest
import torch
from torch import nn

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    EquilibriumLayer,
    MomentumSolver,
    ReconstructionError,
    ReconstructionWarning,
    RelaxedSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    checks,
    settle_checks,
)
from revdeq_lightning.equilibrium.adjoints.checksum import checksum
from revdeq_lightning.equilibrium.function import EquilibriumFunction
from tests.helpers.equilibrium import (
    ADJOINTS,
    BPTT,
    IMPLICIT,
    NEUMANN,
    REVERSIBLE,
    SOLVERS,
    attention_layer,
    damped_layer,
    project,
    refuses,
    sequence,
    solve,
    with_solver,
)

SOLVER = SOLVERS["reversible"]


# What f uses


@pytest.mark.parametrize("solver", [SOLVER, SOLVERS["tolerance"]], ids=["fixed", "tolerance"])
@pytest.mark.parametrize("origin", ["leaf", "other", "parameter", "x_itself", "attribute", "sum_only"])
def test_closure_over_a_tensor_that_needs_a_gradient(origin, solver):
    """With and without an input that needs one, which alone makes a solve differentiable."""
    leaf = torch.full((16,), 0.5, requires_grad=True)
    derived, linear = leaf.exp() * 2, nn.Linear(16, 16)

    class WithAttribute(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.ones(16))
            self.scale = leaf

        def forward(self, z, x):
            return torch.tanh(self.own * z + self.scale * x)

    for x_needs_grad in (True, False) if origin != "x_itself" else (True,):  # else there is no gradient to lose
        x = sequence().detach().requires_grad_(x_needs_grad)
        f, shape = {
            "leaf": (lambda z, x: torch.tanh(z * leaf + x), "(16,)"),
            "other": (lambda z, x: torch.tanh(z * derived + x), "(16,)"),
            "parameter": (lambda z, x: torch.tanh(linear(z) + x), "(16"),  # its weight or its bias
            "x_itself": (lambda z, _, x=x: torch.tanh(z + x), "(4, 5, 16)"),
            "attribute": (WithAttribute(), "(16,)"),
            "sum_only": (lambda z, x: z + leaf, "(16,)"),
        }[origin]
        with refuses(RuntimeError, shape, "float32", "lost", "Pass it in x", "detach"):
            project(solve(f, x, solver, REVERSIBLE).value).backward()


def test_closure_without_a_gradient_to_lose_is_fine():
    leaf = torch.full((16,), 0.5, requires_grad=True)
    for f in (lambda z, x: torch.tanh(z * leaf.detach() + x), lambda z, x: torch.tanh(z * torch.ones(16) + x)):
        project(solve(f, sequence(), SOLVER, REVERSIBLE).value).backward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            solve(lambda z, x: torch.tanh(z * leaf + x), sequence(), SOLVER, REVERSIBLE)


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(16, 16), nn.Sequential(norm))

    def forward(self, z, x):
        return self.blocks((z + x).transpose(1, 2).transpose(1, 2).flatten(0, 1)).view_as(z)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16, affine=False), nn.SyncBatchNorm(16)])
def test_batch_norm_in_training_mode(norm):
    name = type(norm).__name__
    layer, x = EquilibriumLayer(Normed(norm), solver=SOLVER, adjoint=REVERSIBLE), sequence()
    with refuses(ValueError, name, "'blocks.1.0'", "GroupNorm", "eval"), torch.no_grad():
        layer(x)
    layer.f.blocks[1].eval()
    solution = layer(x)
    project(solution.value).backward()
    assert solution.stats.reconstruction_mismatch == 0


ON_A_GPU = property(lambda f: "cuda", lambda f, _: None)


@pytest.mark.parametrize("where", ["cpu", "autocast", "cuda"])
def test_where_kernels_depend_on_recording_both_passes_record(monkeypatch, where):
    if where == "cuda":
        monkeypatch.setattr(EquilibriumFunction, "device_type", ON_A_GPU, raising=False)
    layer, x, records = attention_layer(SOLVER, REVERSIBLE), sequence(), []
    layer.f.register_forward_pre_hook(lambda module, args: records.append(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
        project(layer(x).value).backward()
    assert records == [where != "cpu"] * 8 + [True] * 8


def test_cudnn_that_chooses_kernels_by_time_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(EquilibriumFunction, "device_type", ON_A_GPU, raising=False)
    layer, x = attention_layer(SOLVER, REVERSIBLE), sequence()
    with pytest.raises(ValueError, match=r"cudnn.benchmark=True.*trainer.benchmark=false"):
        layer(x)


# Not the same function


class Disturbed(nn.Module):
    """Another function in some calls, of which torch's generators know nothing: `error(k, z)` is added in call k."""

    def __init__(self, error):
        super().__init__()
        self.weight, self.error, self.calls = nn.Parameter(torch.ones(())), error, 0

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(self.weight * z + x) + self.error(self.calls, z)


def test_f_that_is_not_the_same_in_both_passes():
    for solver in SOLVERS.values():
        x = sequence()

        def run(mismatch, solver=solver, x=x):
            f = Disturbed(lambda k, z: 0.1 * k)
            solution = solve(f, x, solver, ReversibleAdjoint(mismatch=mismatch))
            project(solution.value).backward()
            return solution.stats.reconstruction_mismatch

        with pytest.warns(ReconstructionWarning, match=r"of 640 elements.*not the same function.*Look for") as record:
            count = run("warn")
        assert (count.dtype, count.ndim) == (torch.int64, 0)
        assert 0 < count <= 2 * x.numel()
        assert f"{int(count)} of" in str(record[0].message)
        assert len(record) == 1
        with pytest.raises(ReconstructionError, match="of 640 elements"):
            run("raise")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run("ignore") > 0


def test_mismatch_counts_just_the_elements_that_differ():
    """Elementwise f, disturbed at 3 elements in the backward pass: its last inversion makes u_{-1} of them wrong."""

    def error(k, z):
        disturbance = torch.zeros_like(z)
        disturbance[0, 0, :3] = k == 16  # 8 forward, 8 backward
        return disturbance

    solution = solve(Disturbed(error), sequence(), SOLVER, ReversibleAdjoint(mismatch="ignore"))
    project(solution.value).backward()
    assert solution.stats.backward_nfe == 8
    assert solution.stats.reconstruction_mismatch == 3


class Cancelling(nn.Module):
    """Says in the backward pass what it said in the forward pass, with the error of `errors` in an evaluation."""

    def __init__(self, num_evaluations, errors):
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5))
        self.said, self.num_evaluations, self.left, self.errors = [], num_evaluations, num_evaluations, errors

    def forward(self, z, x):
        value = torch.tanh(self.weight * z + x)
        value = value - value.detach()  # the gradient; and the value in few bits, so that the errors are exact
        if len(self.said) < self.num_evaluations:
            self.said.append(torch.round(512 * torch.tanh(self.weight * z + x).detach()) / 512)
            return value + self.said[-1]
        self.left -= 1
        return value + self.said[self.left] + self.errors.get(self.left, 0.0)


@pytest.mark.parametrize("later", [False, True], ids=["at_once", "later"])
def test_differences_that_cancel_pass_the_certificate_and_fail_the_trace(monkeypatch, later):
    """With beta 1/2 an error d of evaluation k makes u_{k-1} wrong by -d, which -2 d in evaluation k - 2 makes good."""
    monkeypatch.setattr(checks, "host_must_wait", lambda device: later)
    x, solver = sequence(), ReversibleSolver(beta=0.5, max_steps=3)

    def gradient(mismatch, **errors):
        f = Cancelling(6, {int(k[1:]): error for k, error in errors.items()})
        solution = solve(f, x, solver, ReversibleAdjoint(mismatch=mismatch))
        (result,) = torch.autograd.grad(project(solution.value), f.weight)
        settle_checks()
        assert solution.stats.reconstruction_mismatch == 0
        return result

    right = gradient("trace")
    assert gradient("raise") == right
    assert gradient("raise", k5=0.25, k3=-0.5) != right  # and nobody says so
    with pytest.raises(ReconstructionError, match=r": 0 of 640 elements.*first in evaluation 6\)"):
        gradient("trace", k5=0.25, k3=-0.5)
    with pytest.raises(ReconstructionError, match=r": [1-9]\d* of 640 elements.*first in evaluation 4\)"):
        gradient("trace", k3=2**-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_checksum_sees_bits_places_and_leaves_in_any_layout(dtype):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, 4, 5, generator=generator).to(dtype), torch.randn(2, 7, generator=generator).to(dtype)]
    start = checksum(leaves)
    assert start.dtype == torch.int64
    assert start.shape == ()
    assert checksum([leaves[0].to(memory_format=torch.channels_last), leaves[1]]) == start

    def moved(*places):
        """The sign of the elements at these places changed."""
        first = leaves[0].clone()
        for place in places:
            first.view(-1)[place] *= -1
        return int(checksum([first, leaves[1]]))

    changes = {moved(i) for i in range(0, 120, 3)} | {moved(i, j) for i in range(8) for j in range(i)}
    swapped = int(checksum([leaves[0].flip(3), leaves[1]])), int(checksum([leaves[0], leaves[1].flip(0)]))
    assert len({int(start), *changes, *swapped}) == 1 + 40 + 28 + 2
    assert checksum([torch.zeros(3, 1), torch.ones(3, 1)]) != checksum([torch.ones(3, 1), torch.zeros(3, 1)])


@with_solver
def test_the_trace_of_a_deterministic_f_is_the_same(solver):
    adjoint = ReversibleAdjoint(mismatch="trace", stored_evaluations=0 if solver.has_tolerance else 2)
    layer, x = attention_layer(solver, adjoint, dropout=0.3), sequence()
    solution = layer(x)
    project(solution.value).backward()
    assert solution.stats.reconstruction_mismatch == 0


def test_float_states_are_counted_without_a_warning():
    layer, x = attention_layer(ReversibleSolver(beta=0.8, arithmetic="float32"), REVERSIBLE), sequence()
    solution = layer(x)
    project(solution.value).backward()
    assert solution.stats.reconstruction_mismatch > 0


IN_PLACE = pytest.raises(RuntimeError, match="modified by an inplace operation")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda layer, x, z0: x.add_(1), IN_PLACE),
        (lambda layer, x, z0: z0.add_(1), IN_PLACE),
        (lambda layer, x, z0: layer.f.up.weight.add_(1), IN_PLACE),
        # Behind autograd the certificate alone notices.
        (lambda layer, x, z0: layer.f.up.weight.data.add_(0.1), pytest.raises(ReconstructionError)),
        (lambda layer, x, z0: layer.eval(), pytest.raises(ReconstructionError)),
    ],
    ids=["x", "z0", "parameter", "data", "mode"],
)
def test_input_changed_in_place_between_the_passes(change, error):
    layer, leaf = attention_layer(SOLVER, REVERSIBLE, dropout=0.5), sequence()
    x, z0 = leaf * 1, leaf * 2
    solution = layer(x, z0)
    with torch.no_grad():
        change(layer, x, z0)
    with error:
        project(solution.value).backward()


def test_weights_that_change_with_every_call_are_a_mismatch():
    layer, x = attention_layer(SOLVER, REVERSIBLE), sequence()

    def shrink(module, args):
        module.weight.data *= 0.999

    layer.f.up.register_forward_pre_hook(shrink)
    with pytest.raises(ReconstructionError):
        project(layer(x).value).backward()


# Backward again


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        *((solver, REVERSIBLE) for solver in SOLVERS.values()),
        *((SOLVER, adjoint) for adjoint in (BPTT, BackpropAdjoint(checkpoint=True), *ADJOINTS)),
    ],
)
def test_second_backward(solver, adjoint):
    """What the first consumes on its way back is kept where the graph is: then a second one has the same bits."""
    layer, x = damped_layer(solver, adjoint), sequence()
    loss = project(layer(x).value)
    loss.backward(retain_graph=True)
    gradient = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert torch.equal(x.grad, 2 * gradient)


@pytest.mark.parametrize("adjoint", [REVERSIBLE, IMPLICIT, NEUMANN])
def test_double_backward(adjoint):
    layer, x = damped_layer(SOLVER, adjoint), sequence()
    for loss in (lambda value: value.square().sum(), lambda value: value.sum()):  # whose gradient is a constant
        with refuses(
            RuntimeError, type(adjoint).__name__, "no double backward", "create_graph=True", "BackpropAdjoint()"
        ):
            torch.autograd.grad(loss(layer(x).value), x, create_graph=True)


@pytest.mark.parametrize("solver", [SOLVER, MomentumSolver(max_steps=3, rtol=1e-9), RelaxedSolver(max_steps=3)])
def test_the_advice_for_double_backward_works(solver):
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.full((3,), 0.7, dtype=torch.float64, requires_grad=True)

    def value(x, weight):
        z0 = x.new_zeros(2, 3)
        return solve(lambda z, x: torch.tanh(z * x[1] + x[0]), (x, weight), solver, BPTT, z0).value

    # Differences over 1e-4 and not less: the exact state is rounded to 2^-32.
    assert torch.autograd.gradgradcheck(value, (x, weight), eps=1e-4, atol=1e-4)
