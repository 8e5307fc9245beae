"""Our linear layer against PyTorch's, on whatever processor; that of oneDNN wherever there is one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from revdeq_lightning.models import linear as module
from revdeq_lightning.models.linear import Linear, linear

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch was built without oneDNN",
)


@pytest.fixture
def onednn(monkeypatch):
    """The fast path, on processors too that do not need it; the calls of its operator."""
    calls = []
    operator = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(module, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: (calls.append(args), operator(*args))[1])
    return calls


def tensors(*leading, num_in=5, num_out=7):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*leading, num_in), (num_out, num_in), (num_out,))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@needs_onednn
@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_match_pytorch(onednn, leading, with_bias):
    x, weight, bias = tensors(*leading)
    inputs = [x, weight, *([bias] if with_bias else [])]
    value, expected = linear(*inputs), F.linear(*(t.double() for t in inputs))
    # float32 against float64, sums of at most 24 products
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(value)
    ours = torch.autograd.grad(value, inputs, direction)
    theirs = torch.autograd.grad(expected, inputs, direction.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 3
    with torch.no_grad():
        assert torch.equal(value, linear(*inputs))


@needs_onednn
def test_second_derivatives_match_pytorch(onednn):
    inputs = tensors(3)[:2]

    def penalty(apply):
        (grad,) = torch.autograd.grad(apply(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    for a, b in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # third powers


@needs_onednn
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside PyTorch's first jvp
@pytest.mark.parametrize(
    "apply",
    [
        lambda x, w, b: linear(x.double(), w.double(), b.double()),
        lambda x, w, b: torch.func.vmap(linear, in_dims=(0, None, None))(x, w, b),
        lambda x, w, b: torch.func.jvp(lambda z: linear(z, w, b), (x,), (x,))[1],
        lambda x, w, b: linear(x[:0], w, b),
        lambda x, w, b: linear(x[0], w, b),
    ],
    ids=["float64", "vmap", "jvp", "empty", "one row"],
)
def test_what_the_operator_does_not_know_goes_to_pytorch(onednn, apply):
    apply(*(t.detach() for t in tensors(3)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*tensors(3)).dtype == torch.bfloat16
    assert not onednn


@needs_onednn
def test_flops_are_counted_as_pytorch_counts_them(monkeypatch):
    monkeypatch.setattr(module, "mkl_is_slow", lambda: True)
    x, weight, bias = tensors(2, 3)
    counts = []
    for apply in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            apply(x, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_layer_is_that_of_pytorch():
    layers = []
    for kind in (Linear, nn.Linear):
        torch.manual_seed(0)
        layers.append(kind(4, 3))
    assert all(torch.equal(a, b) for a, b in zip(*(layer.state_dict().values() for layer in layers), strict=True))
    x = torch.randn(2, 4)
    torch.testing.assert_close(layers[0](x), layers[1](x))
