"""A block of the user's own as f: `model.network.block: my_blocks.Mixer`."""

import sys

import pytest
import torch

from revdeq_lightning.equilibrium import BackpropAdjoint, MomentumSolver, ReversibleAdjoint
from revdeq_lightning.errors import BlockError
from revdeq_lightning.models import (
    ClassifierConfig,
    Reasoner,
    ReasonerConfig,
    TransformerConfig,
    TransformerLM,
    build_classifier,
    generate,
)
from tests.helpers.data import image_folder, tiny_image_config
from tests.helpers.equilibrium import relative_error
from tests.helpers.modules import make_batch
from tests.helpers.runs import run, tiny_config

SOURCE = """
import torch

SIZE = 3

class Mixer(torch.nn.Module):
    '''The mean of earlier tokens, and a linear map.'''

    def __init__(self, width, scale=0.5):
        super().__init__()
        self.linear, self.scale = torch.nn.Linear(width, width), scale

    def forward(self, z, x):
        h = torch.tanh(self.linear(z + x))
        return self.scale * h.cumsum(1) / torch.arange(1, 1 + z.shape[1])[:, None]

class Convolution(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convolution = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z, x):
        return torch.tanh(x + 0.1 * self.convolution(z))

class Narrower(Mixer):
    def forward(self, z, x):
        return z[..., 1:]
"""
SIZES = {"vocab_size": 23, "context_length": 12, "d_model": 16}


@pytest.fixture(autouse=True)
def my_blocks(tmp_path, monkeypatch):
    (tmp_path / "my_blocks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_blocks", raising=False)


def language_model(adjoint, **network):
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(**SIZES | network), MomentumSolver(max_steps=5), adjoint)
    torch.nn.init.normal_(model.head.weight)  # it starts at zero, without gradients for the rest
    return model


def classifier(adjoint):
    torch.manual_seed(0)
    config = ClassifierConfig(num_classes=3, channels=[4, 8], block="my_blocks.Convolution")
    return build_classifier(config, MomentumSolver(max_steps=3), adjoint)


def reasoner(adjoint):
    torch.manual_seed(0)
    config = ReasonerConfig(4, 3, [8, 8], channels=8, block="my_blocks.Convolution")
    model = Reasoner(config, MomentumSolver(max_steps=3), adjoint)
    torch.nn.init.normal_(model.head[-1].weight)  # it starts at zero
    return model


def gradient(model, loss):
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g.norm() > 0 for g in gradients)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("kind", ["language", "image", "puzzle"])
def test_reversible_gradient_matches_bptt(kind):
    gradients = []
    for adjoint in (ReversibleAdjoint(mismatch="raise"), BackpropAdjoint()):
        if kind == "language":
            model = language_model(adjoint, block="my_blocks.Mixer", block_options={"scale": 0.9})
            assert model.equilibrium.f.scale == 0.9
            loss = model.loss(*make_batch()).loss
        elif kind == "puzzle":
            model = reasoner(adjoint)
            puzzles = torch.randint(3, (2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
            loss = torch.nn.functional.cross_entropy(model(puzzles[0]).logits, puzzles[1])
        else:
            model = classifier(adjoint)
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            loss = torch.nn.functional.cross_entropy(model(images).logits_BV, torch.tensor([0, 1, 2, 0]))
        gradients.append(gradient(model, loss))
    assert relative_error(*gradients) <= 1e-5


def test_a_language_model_is_trained_from_yaml_and_its_checkpoint_loads(tmp_path, capsys):
    network = {"d_model": 16, "block": "my_blocks.Mixer", "block_options": {"scale": 0.7}}
    config = tiny_config(tmp_path, network=network)
    run("fit", "--config", config, "--run.version=v")
    last = tmp_path / "runs/tiny/v/checkpoints/last.ckpt"
    run("fit", "--ckpt_path", last, "--trainer.max_steps=7", "--run.test=false")
    assert torch.load(last, weights_only=True)["global_step"] == 7
    capsys.readouterr()
    run("generate", "--ckpt_path", last, "--prompt", "a", "--max_new_tokens", 20)
    assert len(capsys.readouterr().out) == 1 + 20 + 1
    with pytest.raises(SystemExit):
        run("fit", "--config", config, "--model.network.block=my_blocks.Narrower", "--run.version=w")
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "Tokenizing" not in line]
    told = "error: Narrower(z, x) must return a tensor with the shape of z, (4, 8, 16), got (4, 8, 15)"
    assert error == told


def test_a_classifier_is_trained_from_yaml_and_its_checkpoint_loads(tmp_path, capsys):
    config = tiny_image_config(tmp_path, network={"block": "my_blocks.Convolution"}, max_steps=4)
    run("image", "fit", "--config", config, "--run.version=v")
    best = tmp_path / "runs/tiny/v/checkpoints/best.ckpt"
    images = image_folder(tmp_path) / "test"
    run("image", "predict", "--ckpt_path", best, "--images", images, "--output", tmp_path / "out.csv")
    assert "48 images" in capsys.readouterr().out


def test_blocks_that_do_not_fit_are_named():
    for network, message in (
        ({"block": "no_such.Block"}, "block='no_such.Block': no module named 'no_such'; install it, or run from"),
        ({"block": "my_blocks.Mixr"}, "block='my_blocks.Mixr': the module 'my_blocks' has no 'Mixr'"),
        ({"block": "my_blocks.SIZE"}, "SIZE must be a class derived from torch.nn.Module, got 3"),
        ({"block": "my_blocks.Mixer", "block_options": {"x": 1}}, r"Mixer\(width, \*\*block_options\) failed: "),
    ):
        with pytest.raises(BlockError, match=message):
            language_model(ReversibleAdjoint(), **network)
    for network, message in (
        (
            {"block": "my_blocks.Mixer", "num_heads": 2},
            "num_heads belongs to block 'modern' or 'paper', got 2 for 'my_",
        ),
        ({"block_options": {"x": 1}}, "block_options requires a user-defined block, got block='modern'"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerConfig(**SIZES | network)
    with pytest.raises(ValueError, match="widths belongs to block 'modern' or 'paper'"):
        ClassifierConfig(num_classes=3, channels=[4], widths=[2], block="my_blocks.Convolution")
    model, (tokens, _) = language_model(ReversibleAdjoint(), block="my_blocks.Mixer"), make_batch()
    assert generate(model, tokens[:, :3], 12, use_cache=False).shape == (3, 15)
    with pytest.raises(ValueError, match=r"block='my_blocks.Mixer' has no cache .*: set use_cache=False"):
        generate(model, tokens[:, :3], 12)
