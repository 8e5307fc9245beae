"""Cross-entropy of a linear head in chunks, without storing the logits of a complete batch.

At 4,096 tokens and 50,304 words, the logits and their gradient take 1.6 GB in float32. Here the head processes one
chunk of tokens at a time and computes its gradient immediately, in the forward pass, without evaluating anything twice.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from revdeq_lightning.equilibrium.validation import require_count

IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk_size: int = 1024, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Mean of `-log softmax(hidden @ weight.T)[target]` over the targets that are not `ignore_index`.

    The products with the head use the dtype of an active autocast or of the inputs; softmax, logarithm, and all sums
    use float32 or better. The result is a sum divided by a count, so `chunk_size` changes only its rounding.
    There is no second derivative.

    Args:
        hidden_ND: Inputs of the head.
        weight_VD: Weight of the head, without bias.
        targets_N: Class of each row, int64, in `[0, V)` or `ignore_index`.
        chunk_size: Number of rows whose logits exist at the same time; memory is about `3 * chunk_size * V` numbers.
        ignore_index: Ignore rows with this target. If all rows are ignored, loss and gradients are 0.

    Returns:
        The loss in nats per target, 0-dim, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If shapes do not match, `chunk_size` is below 1, or (on CPU) a target is not a class. On CUDA, where
            a check would synchronize in every step, the kernels assert instead.
    """
    if hidden_ND.shape != (len(targets_N), weight_VD.shape[1]) or targets_N.dim() != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden_ND, weight_VD, targets_N))
        raise ValueError(f"hidden, weight and targets must have shapes (N, D), (V, D) and (N,), got {shapes}")
    require_count("chunk_size", chunk_size)
    num_classes = weight_VD.shape[0]
    if targets_N.device.type == "cpu":
        wrong = targets_N[((targets_N < 0) | (targets_N >= num_classes)) & (targets_N != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"target {wrong[0].item()} is neither in [0, {num_classes}) nor ignore_index {ignore_index}"
            )
    if not torch.is_grad_enabled():  # of which a custom function does not know: a parameter always needs a gradient
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk_size, ignore_index))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute gradients of the SUM per chunk in forward; scale them by `grad / number of targets` in backward.

    Scaling last keeps them of the order of 1, which float16 and bfloat16 represent better than 1 / N.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_size: int, ignore_index: int
    ) -> Tensor:
        device = hidden_ND.device.type
        input_dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input_dtype
        sum_dtype = torch.promote_types(input_dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=sum_dtype, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND, dtype=sum_dtype) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_weight else None
        with torch.autocast(device, enabled=False):
            head_VD = weight_VD.to(product_dtype)
            for start in range(0, len(targets_N), chunk_size):
                rows = slice(start, start + chunk_size)
                valid_n1 = (targets_N[rows] != ignore_index).unsqueeze(1)
                class_n1 = targets_N[rows].unsqueeze(1).where(valid_n1, 0)
                hidden_nD = hidden_ND[rows].to(product_dtype)
                log_probs_nV = (hidden_nD @ head_VD.T).to(sum_dtype).log_softmax(1)
                total -= (log_probs_nV.gather(1, class_n1) * valid_n1).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # d(sum)/d(logits) = softmax - onehot, zero in ignored rows
                grad_nV = log_probs_nV.exp_()
                grad_nV.scatter_add_(1, class_n1, grad_nV.new_full((1, 1), -1.0).expand_as(class_n1)).mul_(valid_n1)
                grad_nV = grad_nV.to(product_dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[rows] = grad_nV @ head_VD
                if grad_weight_VD is not None:
                    grad_weight_VD += grad_nV.T @ hidden_nD
        num_targets = (targets_N != ignore_index).sum().clamp(min=1)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, num_targets)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return total / num_targets

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked cross-entropy has no second derivative (backward was called with create_graph=True): "
                "use torch.nn.functional.cross_entropy on the logits"
            )
        grad_hidden_ND, grad_weight_VD, num_targets = ctx.saved_tensors
        scale = grad_output / num_targets
        gradients = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip((grad_hidden_ND, grad_weight_VD), ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None


def corrected_loss(losses: Sequence[Tensor], decay: float) -> Tensor:
    """Weighted mean of the losses at the ends of the parts of a solve (fixed-point correction).

    Args:
        losses: Losses of the parts, in order.
        decay: Weight of each part's loss relative to that of the next, in (0, 1].
    """
    weights = [decay**k for k in reversed(range(len(losses)))]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)
