"""The host must not wait for the device in every evaluation: counted by a spy on the operations that make it wait."""

import threading
import warnings

import pytest
import torch

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    BroydenSolver,
    DivergenceError,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    ReconstructionError,
    ReversibleSolver,
    checks,
    deferred_divergence,
    function,
    loop,
    settle_checks,
)
from tests.helpers.equilibrium import (
    BPTT,
    REVERSIBLE,
    Damped,
    Spy,
    assert_equal_gradients,
    attention_layer,
    gradients_of,
    project,
    sequence,
)


def contracting_layer(solver, adjoint):
    """A layer whose samples converge, at different rates."""
    layer = attention_layer(solver, adjoint)
    layer.f = Damped(layer.f, torch.linspace(0.1, 0.7, 4).view(-1, 1, 1))
    return layer


def synchronizations(solver, adjoint=REVERSIBLE, make_layer=attention_layer, **settings):
    """In the forward and in the backward pass, and the solution."""
    layer, x = make_layer(solver, adjoint, **settings), sequence()
    with Spy() as forward:
        solution = layer(x)
    loss = project(solution.value)
    with Spy() as backward:
        loss.backward()
    return forward.count, backward.count, solution


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: int(tensor.max()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: tensor[tensor > 1],
        lambda tensor: tensor.unique(),
    ],
)
def test_the_spy_sees_what_waits(wait):
    tensor = torch.arange(3.0)
    with Spy() as spy:
        wait(tensor)
    assert spy.count == 1


FIXED = {
    "exact": lambda steps: ReversibleSolver(beta=0.8, max_steps=steps),
    "float64": lambda steps: ReversibleSolver(beta=0.8, max_steps=steps, arithmetic="float64"),
    "momentum": lambda steps: MomentumSolver(momentum=0.125, max_steps=2 * steps),
}


@pytest.mark.parametrize("make_solver", FIXED.values(), ids=FIXED)
def test_without_a_tolerance_the_host_looks_once_a_pass(make_solver):
    for steps in (2, 12):
        forward, backward, solution = synchronizations(make_solver(steps), dropout=0.3)
        assert solution.stats.forward_nfe == solution.stats.backward_nfe == 2 * steps
        assert forward == 1  # at all magnitudes together
        assert backward <= 1  # at the mismatch


@pytest.fixture
def _looking_means_waiting(monkeypatch):
    """As on a GPU, where checks are left for later."""
    monkeypatch.setattr(checks, "host_must_wait", lambda device: True)
    yield
    settle_checks()


@pytest.mark.usefixtures("_looking_means_waiting")
@pytest.mark.parametrize("make_solver", FIXED.values(), ids=FIXED)
def test_where_looking_means_waiting_a_solve_does_not_look_at_all(make_solver):
    forward, backward, solution = synchronizations(make_solver(8), dropout=0.3)
    assert (forward, backward) == (0, 0)
    assert solution.value.isfinite().all()
    for adjoint in (BPTT, BackpropAdjoint(checkpoint=True), PhantomAdjoint()):
        assert synchronizations(PicardSolver(max_steps=20), adjoint, contracting_layer)[:2] == (0, 0)


@pytest.mark.usefixtures("_looking_means_waiting")
@pytest.mark.parametrize("adjoint", [REVERSIBLE, BPTT], ids=["reversible", "bptt"])
def test_a_state_that_diverged_is_nan_until_someone_waits_who_gets_the_error(monkeypatch, adjoint):
    solver, x = ReversibleSolver(max_steps=4), sequence()

    def run(scale):
        layer = attention_layer(solver, adjoint)
        value = layer(x, scale * x).value
        value.sum().backward()
        return value, layer.f.up.weight.grad

    value, gradient = run(1e8)  # finite, and out of range
    assert value.isnan().all()
    assert gradient.isnan().all()
    with pytest.raises(DivergenceError) as error:
        settle_checks()
    settle_checks()  # is reported once; nor is the reconstruction of such a state
    with monkeypatch.context() as patch:
        patch.setattr(checks, "host_must_wait", lambda device: False)
        with pytest.raises(DivergenceError) as expected:
            run(1e8)
    assert str(error.value) == str(expected.value)  # names the evaluation
    errors = []
    with deferred_divergence(errors):
        run(1e8)
        assert not errors
    settle_checks()  # in the list of the solve's own time
    assert [str(e) for e in errors] == [str(expected.value)]


@pytest.mark.usefixtures("_looking_means_waiting")
def test_a_mismatch_found_in_another_thread_is_raised_in_that_of_the_solve():
    layer, x = attention_layer(ReversibleSolver(max_steps=4), REVERSIBLE), sequence()
    loss = project(layer(x).value)
    layer.f.norm1.eps = 1.0  # another f from here on
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    layer(x)
    with pytest.raises(ReconstructionError, match=r"^this gradient is not exact: \d+ of"):
        settle_checks()


def test_in_a_cuda_graph_nothing_is_left_to_be_checked_and_what_draws_is_refused(monkeypatch):
    """Capture itself needs a GPU; here what it must not meet is counted or refused."""
    solver, x = ReversibleSolver(max_steps=4), sequence()
    layers = [attention_layer(solver, REVERSIBLE, dropout=dropout) for dropout in (0.0, 0.3)]
    for layer in layers:
        project(layer(x).value).backward()
    monkeypatch.setattr(checks, "host_must_wait", lambda device: True)
    for module in (checks, function):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    monkeypatch.setattr(torch, "get_rng_state", None)
    with Spy() as spy:
        project(layers[0](x).value).backward()
    assert spy.count == 0
    assert not checks.own_checks()
    with pytest.raises(RuntimeError, match="draws random numbers"):
        layers[1](x)
    layers[0].solver = ReversibleSolver(rtol=0.1)
    with pytest.raises(ValueError, match="a CUDA graph makes a fixed number of steps"):
        layers[0](x)


def test_what_arrived_without_waiting_is_judged_by_the_next_solve():
    """By events of our own: a CPU has none."""

    class Event:
        device, arrived = torch.device("cpu"), False

        def query(self):
            return self.arrived

        def synchronize(self):
            self.arrived = True

    layer, x, events, judged = attention_layer(ReversibleSolver(), REVERSIBLE), sequence(), [Event(), Event()], []
    checks.own_checks().extend((torch.tensor([i]), event, judged.append) for i, event in enumerate(events))
    layer(x)
    assert judged == []
    events[0].arrived = True
    layer(x)
    assert judged == [[0]]
    settle_checks()
    assert judged == [[0], [1]]


def test_without_a_tolerance_bptt_and_others_look_once():
    for adjoint in (BPTT, BackpropAdjoint(checkpoint=True)):
        forward, backward, _ = synchronizations(PicardSolver(max_steps=20), adjoint)
        assert (forward, backward) == (1, 0)
    for solver in (AndersonSolver(max_steps=20), BroydenSolver(max_steps=20, max_halvings=2)):
        for adjoint in (BPTT, PhantomAdjoint(), PhantomAdjoint(kind="neumann")):
            forward, backward, _ = synchronizations(solver, adjoint, contracting_layer)
            assert (forward, backward) == (1, 0)


@pytest.mark.parametrize("interval", [1, 4])
def test_linear_solve_of_the_implicit_adjoint_looks_every_few_steps(monkeypatch, interval):
    monkeypatch.setattr(loop, "host_check_interval", lambda device: interval)
    adjoint = ImplicitAdjoint(solver=AndersonSolver(max_steps=60, rtol=1e-5))
    forward, backward, solution = synchronizations(AndersonSolver(max_steps=20), adjoint, contracting_layer)
    assert forward == 1
    # The questions whether all have stopped, the magnitudes, and the report.
    assert backward <= solution.stats.backward_num_products // interval + 2


@pytest.mark.parametrize(
    ("interval", "max_steps", "rtol"), [(1, 24, 0.05), (4, 24, 0.5), (4, 23, 0.05), (4, 23, 1e-9), (1, 23, 1e-9)]
)
def test_with_a_tolerance_the_host_looks_every_few_steps(monkeypatch, interval, max_steps, rtol):
    """And the idle evaluations between the last sample's stop and the host's look do not change the gradient."""
    monkeypatch.setattr(checks, "host_must_wait", lambda device: interval == 4)  # how often it then looks
    solver = ReversibleSolver(beta=0.5, max_steps=max_steps, rtol=rtol)
    forward, backward, solution = synchronizations(solver, make_layer=contracting_layer)
    num_steps = solution.stats.num_steps
    steps_made = max_steps if num_steps.max() == max_steps else -(-int(num_steps.max()) // interval) * interval
    assert forward <= 1 + steps_made // interval
    assert backward <= 2
    assert solution.stats.forward_nfe <= 2 * steps_made + 1
    assert solution.stats.backward_nfe == 2 * num_steps.max()

    def run(adjoint):
        layer, x = contracting_layer(solver, adjoint), sequence()
        solution = layer(x)
        project(solution.value).backward()
        return gradients_of(layer, x), solution

    (ours, solution), (reference, bptt_solution) = run(REVERSIBLE), run(BPTT)
    assert_equal_gradients(ours, reference)
    assert solution.stats.reconstruction_mismatch == 0
    assert torch.equal(solution.value, bptt_solution.value)
    settle_checks()
    monkeypatch.setattr(checks, "host_must_wait", lambda device: False)
    patient = run(REVERSIBLE)[1]
    assert torch.equal(solution.value, patient.value)
    assert torch.equal(solution.stats.num_steps, patient.stats.num_steps)
    if rtol == 0.05:
        assert 1 < solution.stats.num_steps.max() < max_steps


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the tests above are its CPU twins")
@pytest.mark.parametrize("make_solver", FIXED.values(), ids=FIXED)
def test_cuda_reports_no_synchronization_in_an_evaluation(make_solver):
    layer = attention_layer(make_solver(2), REVERSIBLE).cuda()
    project(layer(sequence().detach().cuda()).value).backward()  # libraries that start up may wait
    counts = []
    for steps in (2, 20):
        layer.solver = make_solver(steps)
        x = sequence().detach().cuda().requires_grad_()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                layer(x).value.square().sum().backward()  # `project` copies its weights to the device
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing" in str(w.message) for w in caught))
    assert counts == [0, 0]
    settle_checks()
