"""The paper's classifiers against numbers of the authors' JAX code; `REVDEQ_GOLDEN` names a folder with others."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import nll_loss

from revdeq_lightning.equilibrium import BackpropAdjoint, ReversibleAdjoint, ReversibleSolver
from revdeq_lightning.models import ClassifierConfig, build_classifier
from revdeq_lightning.models.classifier import PaperConvBlock

FOLDER = Path(os.environ.get("REVDEQ_GOLDEN", Path(__file__).parents[1] / "golden"))
OUR_NAMES = {
    "single_scale": [
        ("encoder_conv.", "stem."),
        ("encoder_norm.", "stem_norm."),
        ("deq_model.function.", "equilibrium.f."),
        ("decoder_layer.", "head."),
    ],
    "multi_scale": [
        ("encoder_conv.", "stem.0."),
        ("encoder_norm.", "stem.1."),
        ("deq_layers", "equilibria"),
        ("down_layers", "downsamples"),
        (".function.", ".f."),
        ("final_linear.", "head."),
    ],
}
# The files do not name these: first what the committed ones were made with, then what others may have.
BETAS = [0.8, 0.5, *(n / 20 for n in range(1, 25) if n not in (10, 16, 20))]


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def first_close(candidates, error):
    """The first candidate with an error below 1e-6; the first of all if there is none: the tests then fail with it."""
    candidates = list(candidates)
    return next((candidate for candidate in candidates if error(candidate) < 1e-6), candidates[0])


class Golden:
    """A file, with our names; sizes come from its shapes, beta and steps from keys or from the loss."""

    def __init__(self, name):
        self.name, self.arrays = name, load(name)
        weights = self.named("model.")
        convolutions = [weights[key] for key in sorted(weights) if key.endswith("f.conv1.weight")]
        self.channels = [w.shape[1] for w in convolutions]
        self.widths = [w.shape[0] // w.shape[1] for w in convolutions]
        n = len(self.channels)
        betas = [float(self["beta"])] if "beta" in self.arrays else BETAS
        if "steps" in self.arrays:
            steps = [np.broadcast_to(self["steps"], n).tolist()]
        else:
            first = [2] if n == 1 else [3, 2, 3]
            steps = [first, *map(list, itertools.product(range(1, 6), repeat=n))]
        self.beta, self.steps = first_close(
            itertools.product(betas, [s for s in steps if len(s) == n]), self.loss_error
        )

    def __getitem__(self, key):
        return self.arrays[key]

    @torch.no_grad()
    def loss_error(self, beta_and_steps):
        beta, steps = beta_and_steps
        solver = ReversibleSolver(beta=beta, max_steps=1, arithmetic="float64")
        log_probs = self.model(solver, BackpropAdjoint(), steps)(self["images"]).logits_BV.log_softmax(-1)
        return abs(nll_loss(log_probs, self["labels"]) - self["loss"])

    def named(self, prefix):
        """Arrays under a prefix of the file, by our names and in our shapes."""
        named = {}
        for key, array in self.arrays.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix).replace("[", ".").replace("]", "")
                for theirs, ours in OUR_NAMES[self.name]:
                    name = name.replace(theirs, ours)
                named[name] = array.flatten() if name.endswith("bias") else array
        return named

    def model(self, solver, adjoint, steps=None):
        """Our model with these weights; every weight has its place."""
        config = ClassifierConfig(
            num_classes=self["log_probs"].shape[-1],
            num_channels=self["images"].shape[1],
            architecture="paper_single" if self.name == "single_scale" else "paper_stages",
            channels=self.channels,
            widths=self.widths,
            steps=steps or self.steps,
        )
        model = build_classifier(config, solver, adjoint).double()
        missing, unexpected = model.load_state_dict(self.named("model."), strict=False)
        assert not unexpected
        assert all("running" in name or "num_batches" in name for name in missing)
        return model.train()


@pytest.fixture(scope="module", params=["single_scale", "multi_scale"])
def golden(request):
    return Golden(request.param)


def test_golden_residual_layer():
    arrays = load("residual_layer")
    channels, width = arrays["z"].shape[0], arrays["layer.conv1.weight"].shape[0] // arrays["z"].shape[0]
    block = PaperConvBlock(channels, width).double()
    block.load_state_dict({k.removeprefix("layer."): v for k, v in arrays.items() if k.startswith("layer.")})
    out = block(arrays["z"][None], arrays["x"][None])[0]
    torch.testing.assert_close(out, arrays["out"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arithmetic", "adjoint", "tolerance"),
    [
        ("float64", BackpropAdjoint(), 1e-9),
        ("exact", BackpropAdjoint(), 1e-8),  # the exact state has a resolution of 2^-32
        ("exact", ReversibleAdjoint(mismatch="raise"), 1e-8),
    ],
    ids=["float64-backprop", "exact-backprop", "exact-reversible"],
)
def test_golden_loss_log_probabilities_and_gradients(golden, arithmetic, adjoint, tolerance):
    model = golden.model(ReversibleSolver(beta=golden.beta, max_steps=1, arithmetic=arithmetic), adjoint)
    log_probs = model(golden["images"]).logits_BV.log_softmax(-1)
    torch.testing.assert_close(log_probs, golden["log_probs"], rtol=tolerance, atol=tolerance)
    loss = nll_loss(log_probs, golden["labels"])
    torch.testing.assert_close(loss, golden["loss"], rtol=tolerance, atol=tolerance)

    loss.backward()
    expected = golden.named("grad.")
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == expected.keys()
    subgradients = first_relu_subgradients(golden)
    for name, gradient in expected.items():
        error = ours[name] - gradient
        if name in subgradients:
            low, high = subgradients[name]
            error = error - error.clamp(-high, -low)
        assert error.norm() <= tolerance * gradient.norm().clamp(min=1e-3), name


def first_relu_subgradients(golden):
    """How much the gradients of the biases of norm1 may exceed ours: (least, most) for each channel.

    In the first evaluation z = 0, so that relu(norm1(conv1(z))) = relu(bias) is at its kink where the bias is 0, as
    after initialization. Ours has the derivative 0 there, as has JAX's. The released adjoint reconstructs z = 0 only up
    to 1e-17 of noise, which norm1 raises to 1e-15: its derivative is 0 or 1 by the sign of that noise, in each element.
    """
    model = golden.model(ReversibleSolver(beta=golden.beta, max_steps=1, arithmetic="float64"), BackpropAdjoint())
    first_inputs = {}

    def keep_first(name):
        def hook(module, inputs):
            if name not in first_inputs:
                first_inputs[name] = inputs[0]
                inputs[0].retain_grad()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, PaperConvBlock):
            module.conv2.register_forward_pre_hook(keep_first(f"{name}.norm1.bias"))
    nll_loss(model(golden["images"]).logits_BV.log_softmax(-1), golden["labels"]).backward()
    is_kink = {name: model.get_parameter(name) == 0 for name in first_inputs}
    return {
        name: (
            a_BCHW.grad.clamp(max=0).sum((0, 2, 3)) * is_kink[name],
            a_BCHW.grad.clamp(min=0).sum((0, 2, 3)) * is_kink[name],
        )
        for name, a_BCHW in first_inputs.items()
    }


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (ClassifierConfig(10, architecture="paper_single", channels=[32], widths=[1]), 24_714),
        (
            ClassifierConfig(10, architecture="paper_stages", channels=[128, 256, 256, 128], widths=[1, 3, 3, 1]),
            10_319_754,
        ),
    ],
)
def test_published_parameter_counts(config, num_parameters):
    with torch.device("meta"):
        model = build_classifier(config, ReversibleSolver(), ReversibleAdjoint())
    assert sum(p.numel() for p in model.parameters()) == num_parameters
