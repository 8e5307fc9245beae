"""The gradients that it compares, by plain loops; and the run that it leaves as it was."""

import math

import pytest
import torch
import torch.nn.functional as F

from revdeq_lightning.callbacks.contraction import Contraction
from revdeq_lightning.callbacks.gradient_error import GradientError
from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    ImplicitAdjoint,
    MomentumSolver,
    PhantomAdjoint,
    PicardSolver,
    ReversibleSolver,
)
from tests.helpers.modules import DIM, StepByStep, Stranger, loader, trainer
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


def loop_gradients(module, batch, steps):
    """Of `steps` plain iterations through autograd, by name; in the module's precision."""
    h = module.encoder(batch[0])
    for layer in module.layers:
        z = torch.zeros_like(h)
        for _ in range(steps):
            z = layer.f(z, h)
        h = z
    loss = F.cross_entropy(module.head(h), batch[1])
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def joined(gradients, prefix=""):
    return torch.cat([g.double().flatten() for name, g in gradients.items() if name.startswith(prefix)])


def relative_l2(gradients, reference, prefix=""):
    a, b = joined(gradients, prefix), joined(reference, prefix)
    return float((a - b).norm() / b.norm())


def cosine(gradients, reference):
    return float(F.cosine_similarity(joined(gradients), joined(reference), dim=0))


@pytest.mark.parametrize("float64", [False, True])
def test_errors_of_a_one_step_gradient_are_those_of_plain_loops(tmp_path, float64):
    """The active adjoint is wrong by construction: f differentiated once, at the state that three steps give."""
    module = Stranger(PicardSolver(max_steps=3), adjoint=PhantomAdjoint(num_steps=1, beta=1.0), lr=0.0, scale=0.9)
    callback = GradientError(1, num_samples=5, float64=float64)
    run = trainer(tmp_path, [callback], max_steps=1)
    run.fit(module, loader())
    figures = {key: value.item() for key, value in run.callback_metrics.items() if key.startswith("gradient_error/")}

    module.train()
    inputs, labels = (t[:5] for t in next(iter(loader())))
    h = module.encoder(inputs)
    with torch.no_grad():
        z = torch.zeros_like(h)
        for _ in range(3):
            z = module.layers[0].f(z, h)
    loss = F.cross_entropy(module.head(module.layers[0].f(z, h) + (z - module.layers[0].f(z, h)).detach()), labels)
    names, parameters = zip(*module.named_parameters(), strict=True)
    active = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    if float64:
        module, inputs = module.double(), inputs.double()
    for reference, steps in (("bptt", 3), ("converged", 300)):
        exact = loop_gradients(module, (inputs, labels), steps)
        tolerance = {"rel": 1e-3}  # of the reference's own tolerance and float32
        assert figures[f"gradient_error/{reference}/relative_l2"] == pytest.approx(
            relative_l2(active, exact), **tolerance
        )
        assert 1 - figures[f"gradient_error/{reference}/cosine"] == pytest.approx(
            1 - cosine(active, exact), rel=1e-2, abs=1e-6
        )
        for group, prefix in (("encoder", "encoder."), ("layers.0", "layers.0.")):
            found = figures[f"gradient_error/{reference}/{group}/relative_l2"]
            assert found == pytest.approx(relative_l2(active, exact, prefix), **tolerance)
            assert found > 0.01
    assert figures["gradient_error/converged/relative_residual"] <= (1e-9 if float64 else 1e-5)


@pytest.mark.parametrize(
    ("layer", "reference", "low", "high"),
    [
        ({"solver": ReversibleSolver(max_steps=20)}, "bptt", 0.0, 1e-6),  # float32
        ({"solver": ReversibleSolver(max_steps=20, arithmetic="float32"), "scale": 2.0}, "bptt", 1e-2, math.inf),
        ({"solver": MomentumSolver(max_steps=1)}, "converged", 1e-2, math.inf),
        ({"solver": MomentumSolver(max_steps=1)}, "bptt", 0.0, 1e-6),  # float32
        ({"solver": PicardSolver(max_steps=200), "adjoint": ImplicitAdjoint()}, "converged", 0.0, 1e-4),  # its rtol
        ({"solver": PicardSolver(max_steps=40), "adjoint": BackpropAdjoint()}, "bptt", 0.0, 1e-6),  # float32
    ],
)
def test_it_tells_exact_from_wrong_adjoints(tmp_path, layer, reference, low, high):
    module = Stranger(layer["solver"], adjoint=layer.get("adjoint"), scale=layer.get("scale", 0.9))
    # With two samples BatchNorm's derivative is a small difference of large numbers.
    callback = GradientError(1, num_samples=8, references=(reference,), float64=True)
    run = trainer(tmp_path, [callback], max_steps=1)
    run.fit(module, loader())
    figures = {key for key in run.callback_metrics if key.startswith("gradient_error/")}
    assert all(key.startswith(f"gradient_error/{reference}/") for key in figures)
    assert low <= run.callback_metrics[f"gradient_error/{reference}/relative_l2"] <= high


def test_the_language_model_and_the_classifier_can_be_asked(tmp_path):
    data = tiny_data(tmp_path)
    run = tiny_trainer(tmp_path, [GradientError(2, float64=True)], max_steps=2, limit_val_batches=0)
    run.fit(tiny_task(data), data)
    assert run.callback_metrics["gradient_error/bptt/relative_l2"] < 1e-6
    groups = {key.split("/")[2] for key in run.callback_metrics if key.startswith("gradient_error/bptt/")}
    assert groups == {"embedding", "equilibrium", "norm", "head", "relative_l2", "cosine"}


def test_figures_are_logged_at_their_steps_alone(tmp_path):
    module = Stranger()
    trainer(tmp_path, [GradientError(3, group=lambda name: "all")], max_steps=8, log_every_n_steps=1).fit(
        module, loader()
    )
    lines = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    column, step = (lines[0].split(",").index(key) for key in ("gradient_error/bptt/relative_l2", "step"))
    assert [line.split(",")[step] for line in lines[1:] if line.split(",")[column]] == ["2", "5"]


def test_a_fixed_point_that_is_not_there_is_told_once_and_left_out(tmp_path):
    module = Stranger(MomentumSolver(max_steps=3))
    module.layers[0].f.forward = lambda z, x: 3 * z + x + 0 * module.layers[0].f.linear(z)
    run = trainer(tmp_path, [GradientError(1)], max_steps=3)
    with pytest.warns(UserWarning, match="no gradient at the fixed point to compare with: the state") as caught:
        run.fit(module, loader())
    assert len([w for w in caught if "no gradient" in str(w.message)]) == 1
    assert run.callback_metrics["gradient_error/bptt/relative_l2"] < 1e-5
    assert not any("converged" in key for key in run.callback_metrics)


class Plain(torch.nn.Module):
    """Without a counter, for which torch.compile would compile anew."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(DIM, DIM)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


def test_a_compiled_f_is_not_compiled_anew_for_the_samples(tmp_path):
    def run(name, callbacks):
        graphs = []

        def backend(graph, inputs):
            graphs.append([tuple(t.shape) for t in inputs])
            return graph.forward

        torch.compiler.reset()
        module, notes = Stranger(), StepByStep()
        module.layers[0].f = Plain()
        module.layers[0].f.compile(backend=backend)
        trainer(tmp_path / name, [*callbacks, notes]).fit(module, loader())
        return graphs, notes.losses

    probes = [GradientError(2), Contraction(2, num_iterations=3, warn_at=100.0)]
    assert run("with", probes) == run("without", [])


class Manual(Stranger):
    automatic_optimization = False


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"steps the optimizer itself .* loss=function"):
        trainer(tmp_path, [GradientError()]).fit(Manual(), loader())
    module = Stranger()
    module.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="Stranger has none"):
        trainer(tmp_path, [GradientError()]).fit(module, loader())
