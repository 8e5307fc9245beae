import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_tensor_bytes
from revdeq_lightning.models.cross_entropy import chunked_cross_entropy

N, D, V = 37, 12, 29


def make_case(dtype=torch.float32, ignored=(0, 5, 36), seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[list(ignored)] = -100
    return hidden, weight, targets


def loss_and_gradients(loss, hidden, weight):
    return loss.detach(), *torch.autograd.grad(3.0 * loss, (hidden, weight))


@pytest.mark.parametrize(("chunk_size", "ignored"), [(1, -100), (8, -100), (8, 3), (37, -100), (1000, -100)])
def test_equals_plain_cross_entropy(chunk_size, ignored):
    hidden, weight, targets = make_case()
    targets[targets < 0] = ignored
    plain = F.cross_entropy(hidden @ weight.T, targets, ignore_index=ignored)
    chunked = chunked_cross_entropy(hidden, weight, targets, chunk_size=chunk_size, ignore_index=ignored)
    expected = loss_and_gradients(plain, hidden, weight)
    torch.testing.assert_close(loss_and_gradients(chunked, hidden, weight), expected, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    hidden, weight, targets = make_case(torch.float64)
    inputs = hidden[:5, :3].detach().requires_grad_(), weight[:, :3].detach().requires_grad_()
    torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets[:5], chunk_size=2), inputs)


def test_all_targets_ignored_gives_zero_and_zero_gradients():
    hidden, weight, targets = make_case(ignored=range(N))
    loss, *gradients = loss_and_gradients(chunked_cross_entropy(hidden, weight, targets, chunk_size=8), hidden, weight)
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input(frozen):
    hidden, weight, targets = make_case()
    tensors = {"hidden": hidden, "weight": weight}
    tensors.pop(frozen).requires_grad_(False)
    (trained,) = tensors.values()
    (plain,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), trained)
    (chunked,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets, chunk_size=8), trained)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-7)


def test_bfloat16_sums_in_float32():
    hidden, weight, targets = make_case(torch.bfloat16)
    plain = loss_and_gradients(F.cross_entropy((hidden @ weight.T).float(), targets), hidden, weight)
    chunked = loss_and_gradients(chunked_cross_entropy(hidden, weight, targets, chunk_size=8), hidden, weight)
    assert chunked[0].dtype == torch.float32
    assert chunked[1].dtype == chunked[2].dtype == torch.bfloat16
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-6, atol=0)
    for ours, theirs in zip(chunked[1:], plain[1:], strict=True):
        # bfloat16 has 8 bits: the order of the sums shows at that size
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-8)


def test_autocast_equals_plain_under_autocast():
    hidden, weight, targets = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        chunked_loss = chunked_cross_entropy(hidden, weight, targets, chunk_size=8)
    plain = loss_and_gradients(plain_loss, hidden, weight)
    chunked = loss_and_gradients(chunked_loss, hidden, weight)
    assert [t.dtype for t in chunked] == [torch.float32] * 3
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-6, atol=0)
    for ours, theirs in zip(chunked[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-8)  # products of bfloat16 numbers


def test_bfloat16_hidden_with_float32_head():
    hidden, weight, targets = make_case()
    hidden = hidden.detach().bfloat16().requires_grad_()
    chunked = loss_and_gradients(chunked_cross_entropy(hidden, weight, targets, chunk_size=8), hidden, weight)
    plain = loss_and_gradients(F.cross_entropy(hidden.float() @ weight.T, targets), hidden, weight)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)


def test_second_derivative_is_refused():
    hidden, weight, targets = make_case()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets), hidden, create_graph=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_product_of_the_head_is_computed(context):
    weight, targets = torch.nn.Parameter(torch.randn(32, 8)), torch.randint(32, (64,))
    with context(), FlopCounterMode(display=False) as counter:
        chunked_cross_entropy(torch.randn(64, 8), weight, targets, chunk_size=16)
    assert counter.get_total_flops() == 2 * 64 * 8 * 32


def test_memory_is_that_of_a_chunk_forward_and_backward():
    def peak(loss_of, num_rows):
        hidden, weight = torch.randn(num_rows, 8, requires_grad=True), torch.randn(2000, 8, requires_grad=True)
        targets = torch.randint(2000, (num_rows,))
        return peak_tensor_bytes(lambda: loss_of(hidden, weight, targets).backward())

    def chunked(hidden, weight, targets):
        return chunked_cross_entropy(hidden, weight, targets, chunk_size=64)

    logits_of_a_chunk, logits_of_all = 64 * 2000 * 4, 4096 * 2000 * 4
    # The measurement sees what it should.
    assert peak(lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets), 4096) >= 2 * logits_of_all
    small, large = peak(chunked, 512), peak(chunked, 4096)
    assert large <= 4 * logits_of_a_chunk + 2**20
    assert large - small <= 4096 * 8 * 4 * 3  # rows of hidden and its gradient, no logits


def test_wrong_targets_shapes_and_chunk_sizes_are_named():
    hidden, weight, targets = make_case()
    with pytest.raises(ValueError, match=r"got \(37, 12\), \(29, 11\), \(37,\)"):
        chunked_cross_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunked_cross_entropy(hidden, weight, targets, chunk_size=0)
    for target in (-1, V):
        targets[3] = target
        with pytest.raises(ValueError, match=rf"target {target} is neither in \[0, {V}\)"):
            chunked_cross_entropy(hidden, weight, targets)
