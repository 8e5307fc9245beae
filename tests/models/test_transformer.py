import copy
import math

import pytest
import torch
import torch.nn.functional as F

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    MomentumSolver,
    PicardSolver,
    ReversibleAdjoint,
    ReversibleSolver,
)
from revdeq_lightning.models import ExplicitTransformerLM, TransformerConfig, TransformerLM
from revdeq_lightning.models.transformer import ShortConvolution
from revdeq_lightning.models.transformer_blocks import ModernBlock
from tests.helpers.modules import KINDS, SMALL, make_batch, make_model

PUBLISHED = {"vocab_size": 50304, "context_length": 448, "d_model": 768, "num_heads": 12, "block": "paper"}


def gradients(model, batch):
    parameters = dict(model.named_parameters())
    loss = model.loss(*batch).loss
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def relative_error(ours, reference):
    """Of the whole gradient."""
    difference = torch.stack([(ours[name].double() - reference[name].double()).norm() for name in reference]).norm()
    return (difference / torch.stack([g.double().norm() for g in reference.values()]).norm()).item()


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_counts():
    with torch.device("meta"):
        released = TransformerLM(
            TransformerConfig(**PUBLISHED, double_projection=True), ReversibleSolver(), ReversibleAdjoint()
        )
    assert num_parameters(released) == 95_907_840
    assert num_parameters(released.equilibrium) == 18_296_832


@pytest.mark.parametrize("kind", KINDS)
def test_loss_matches_cross_entropy_of_the_logits(kind):
    model, (tokens, targets) = make_model(kind), make_batch()
    output = model(tokens)
    loss = model.loss(tokens, targets)
    plain = F.cross_entropy(output.logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss.loss, plain, rtol=1e-6, atol=1e-6)
    assert loss.num_targets.item() == (targets != -100).sum().item() == targets.numel() - 5
    if kind == "explicit":
        assert output.stats is None
        assert loss.stats is None
    else:
        assert output.stats.forward_nfe == loss.stats.forward_nfe == 6


@pytest.mark.parametrize(
    "solver", [ReversibleSolver(max_steps=5), MomentumSolver(max_steps=7)], ids=["paper", "momentum"]
)
@pytest.mark.parametrize("kind", ["paper", "modern", "two layers"])
def test_reversible_gradient_matches_bptt(kind, solver):
    model, batch = make_model(kind, solver=solver), make_batch()
    ours = gradients(model, batch)
    model.equilibrium.adjoint = BackpropAdjoint()
    assert relative_error(ours, gradients(model, batch)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained(kind):
    model = make_model(kind)
    for name, gradient in gradients(model, make_batch()).items():
        # a bias on all keys cancels in the softmax: rounding only
        assert gradient.norm() > (0 if name.endswith("key.bias") else 1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_do_not_change_earlier_logits_and_the_order_of_earlier_ones_matters(kind):
    model, (tokens, _) = make_model(kind), make_batch()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL["vocab_size"]
    before, after = model(tokens).logits_BTV, model(changed).logits_BTV
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-2)
    swapped = tokens[:, [1, 0, *range(2, tokens.shape[1])]]
    assert not torch.allclose(before[:, -1], model(swapped).logits_BTV[:, -1], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind):
    model, batch = make_model(kind), make_batch()
    reference = gradients(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.hidden(batch[0])[0].dtype == torch.float32  # the state never drifts in bfloat16
        ours = gradients(model, batch)
        assert all(gradient.dtype == torch.float32 for gradient in ours.values())
        error = relative_error(ours, reference)
        assert 1e-4 < error <= 0.2  # bfloat16 has 8 bits
        if kind != "explicit":  # reversing adds nothing to what it costs
            model.equilibrium.adjoint = BackpropAdjoint()
            assert error <= 1.5 * relative_error(gradients(model, batch), reference) + 1e-3


@pytest.mark.parametrize("kind", ["paper", "modern"])
def test_compiled_block(kind):
    """With dynamo and AOTAutograd; inductor's kernels differ by rounding only, but take a minute to build."""
    model, batch = make_model(kind), make_batch()
    reference = gradients(model, batch)
    model.equilibrium.f.compile(backend="aot_eager")
    assert relative_error(gradients(model, batch), reference) <= 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts_are_independent_and_equal(kind):
    model, batch = make_model(kind), make_batch()
    twin, other = copy.deepcopy(model), make_model(kind, seed=1)
    reference = model.loss(*batch).loss
    assert torch.equal(twin.loss(*batch).loss, reference)
    assert not torch.equal(other.loss(*batch).loss, reference)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.loss(*batch).loss, reference)
    torch.nn.init.zeros_(twin.embedding.token.weight)
    assert torch.equal(model.loss(*batch).loss, reference)


def test_modern_models_start_as_a_norm_and_a_uniform_guess():
    """Closed forms: with zero output layers, f(z, x) = norm(z + x); with a zero readout, the loss is log(V)."""
    block = ModernBlock(TransformerConfig(**SMALL, num_layers=2))
    z, x = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    h = z + x
    torch.testing.assert_close(block(z, x), h / h.square().mean(-1, keepdim=True).sqrt(), rtol=1e-4, atol=1e-4)  # eps
    for model in (
        TransformerLM(TransformerConfig(**SMALL), MomentumSolver(), ReversibleAdjoint()),
        ExplicitTransformerLM(TransformerConfig(**SMALL)),
    ):
        assert model.loss(*make_batch()).loss.item() == pytest.approx(math.log(SMALL["vocab_size"]))


@torch.no_grad()
def test_layers_around_the_equilibrium_are_those_of_a_stack():
    """With f(z, x) = x, prelude and coda are the two halves of an explicit stack, but for a norm between them."""
    model = make_model("around", solver=PicardSolver(max_steps=3), adjoint=BackpropAdjoint())
    model.equilibrium.f.forward = lambda z, x: x
    tokens, _ = make_batch()
    h = model.embedding(tokens)
    for layers in (model.prelude, model.coda):
        for layer in layers.layers:
            h = h + layer.attention(layer.norm1(h))
            h = h + layer.mlp(layer.norm2(h))
        h = layers.norm(h)
    torch.testing.assert_close(model(tokens).logits_BTV, model.head(h), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_solve_starts_from_zero():
    """With f(z, x) = g(z), three evaluations of Picard give g(g(g(0)))."""
    model = make_model("modern", solver=PicardSolver(max_steps=3), adjoint=BackpropAdjoint())
    model.equilibrium.f.forward = lambda z, x: torch.tanh(2 * z + 1)
    x = model.embed(make_batch()[0])
    z = torch.zeros_like(x)
    for _ in range(3):
        z = torch.tanh(2 * z + 1)
    torch.testing.assert_close(model.transform(x, None)[0], z)


def test_modern_state_stays_bounded():
    """The norm keeps the state near unit scale, at any depth, for weights of any size."""
    model, (tokens, _) = make_model("modern", solver=MomentumSolver(max_steps=100)), make_batch()
    with torch.no_grad():
        for layer in model.equilibrium.f.layers:
            layer.mlp.down.weight *= 100
        stats = model(tokens).stats
        state = model.equilibrium(model.embed(tokens)).value
    assert stats.num_steps.tolist() == [100] * 3
    assert state.square().mean(-1).sqrt().max() <= 2.0


def test_short_convolution_matches_conv1d():
    """Oracle: a grouped `conv1d`, which correlates; at the start the identity."""
    convolution = ShortConvolution(TransformerConfig(**SMALL, num_taps=3))
    x = torch.randn(2, 7, 16)
    assert torch.equal(convolution(x), x)
    torch.nn.init.normal_(convolution.taps_JD)
    kernel = convolution.taps_JD.flip(0).T[:, None]
    expected = F.conv1d(F.pad(x.mT, (2, 0)), kernel, groups=16).mT
    torch.testing.assert_close(convolution(x), expected, rtol=1e-5, atol=1e-6)


def test_rotation_is_a_complex_product_and_relative():
    """Oracle: pair (a, b) as a + ib times e^(i * position * frequency)."""
    attention = ModernBlock(TransformerConfig(**SMALL)).layers[0].attention.double()
    t = torch.randn(1, 1, 12, 8, dtype=torch.float64)
    a, b = t.chunk(2, -1)
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    rotated = torch.complex(a, b) * torch.polar(torch.ones(()).double(), torch.arange(12)[:, None] * frequencies)
    torch.testing.assert_close(
        attention.rotate(t, 0), torch.cat([rotated.real, rotated.imag], -1), rtol=1e-6, atol=1e-6
    )
    q, k = torch.randn(8).double().expand(1, 1, 12, 8), torch.randn(8).double().expand(1, 1, 12, 8)
    scores = attention.rotate(q, 0)[0, 0] @ attention.rotate(k, 0)[0, 0].T
    for offset in range(12):
        diagonal = scores.diagonal(-offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)  # float32 tables


@pytest.mark.parametrize("kind", ["paper", "modern"])
def test_no_value_is_read_off_the_device(kind):
    """Without a CUDA device: a meta tensor has no values, reading one raises."""
    with torch.device("meta"):
        model = make_model(kind)
        tokens = torch.zeros(2, 12, dtype=torch.int64)
    assert model.embed(tokens).shape == (2, 12, 16)
    assert model.equilibrium.f(model.embed(tokens), model.embed(tokens)).shape == (2, 12, 16)


def test_tokens_and_blocks_that_do_not_fit_are_named():
    model = make_model("modern")
    with pytest.raises(ValueError, match="13 tokens do not fit the model's context_length 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    for token in (23, -1):
        with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary of 23"):
            model(torch.tensor([[0, token, 1]]))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 3\)"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="the explicit baseline needs block='modern', got block='paper'"):
        ExplicitTransformerLM(TransformerConfig(**SMALL, block="paper"))
    with pytest.raises(ValueError, match="solver='none' has no num_coda_layers, got num_coda_layers=1: remove it"):
        ExplicitTransformerLM(TransformerConfig(**SMALL, num_coda_layers=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "modem"}, "block must be one of modern, paper or an import path, got 'modem'"),
        ({"num_heads": 3}, "d_model must be a multiple of num_heads, got 16 and 3"),
        ({"num_heads": 16}, "even head size, got d_model / num_heads = 16 / 16 = 1"),
        ({"rope_base": 0.0}, r"rope_base must be in \(0, inf\), got 0.0"),
        ({"num_coda_layers": -1}, "num_coda_layers must be at least 0, got -1"),
        (
            {"block": "paper", "num_prelude_layers": 1},
            "num_prelude_layers belongs to block 'modern', got 1 for 'paper'",
        ),
        ({"block": "paper", "num_taps": 1}, "num_taps belongs to block 'modern', got 1 for 'paper'"),
        ({"block": "paper", "rope_base": 100.0}, "rope_base belongs to block 'modern', got 100.0 for 'paper'"),
        ({"num_taps": 0}, "num_taps must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": -3}, "vocab_size must be at least 1, got -3"),
        ({"d_mlp": -1}, r"d_mlp must be at least 0, got -1: 0 is for 4 \* d_model"),
        ({"double_projection": True}, "double_projection belongs to block 'paper', got True for 'modern'"),
        ({"block": "paper", "num_layers": 2}, "the paper's block has one layer, got num_layers=2"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL, **change})
