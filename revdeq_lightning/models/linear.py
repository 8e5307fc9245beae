"""Linear layers that are fast on processors with AVX-512 of other vendors than Intel.

There, PyTorch's float32 products run in MKL, which uses AVX-512 only on Intel processors; oneDNN, which PyTorch also
includes, uses it on all (AMD EPYC, one core, 1024 x 1024 x 1024: 105 and 223 GFLOP/s). Elsewhere, these are plain
`nn.Linear`.
"""

import functools
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from revdeq_lightning.transforms import is_transformed


class Linear(nn.Linear):
    """`x @ weight.T + bias`; parameters, initialization, and gradients are those of `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` by the faster of the two libraries."""
    if not _is_transformed() and mkl_is_slow() and _is_plain(x) and _is_plain(weight) and x.dim() > 1:
        return cast(Tensor, _OneDNNLinear.apply(x, weight, bias))
    return F.linear(x, weight, bias)


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this processor has AVX-512 that MKL does not use, and PyTorch includes both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "GenuineIntel" not in text


def _is_plain(tensor: Tensor) -> bool:
    """Whether this is a plain float32 tensor on the CPU, not a subclass such as a DTensor."""
    is_plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return is_plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() > 0


def _is_transformed() -> bool:
    """Whether a mode or transform intercepts the product, which the operator does not support."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or is_transformed()


class _OneDNNLinear(torch.autograd.Function):
    """The backward pass uses the same function, so that higher derivatives exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.T) if ctx.needs_input_grad[0] else None,
            linear(rows.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _num_flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
        """Register a FLOP formula with PyTorch's counter, which only knows PyTorch's products."""
        return 2 * prod(x_shape) * weight_shape[0]
