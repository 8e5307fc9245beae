"""Weights of f that are normalized, by torch.nn.utils.parametrizations."""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .validation import require_choice

NormalizationKind = Literal["weight", "spectral"]
NORMALIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def normalize_weights(f: nn.Module, kind: NormalizationKind = "spectral", *, norm: float | None = None) -> nn.Module:
    """Normalize the weight of every linear map and convolution in f, in place, to keep f from expanding in training.

    Any adjoint differentiates the weights, which a solve computes once. So it is with every other parametrization: on
    single layers use PyTorch's own functions, `torch.nn.utils.parametrizations.spectral_norm(f.linear)`.

    Args:
        f: The map.
        kind: "weight": each output's weights are a direction times a learned length, initially the present one.
            "spectral": each weight matrix (of a kernel, `(out, in * height * width)`) has a fixed largest singular
            value, by one power iteration per solve in training mode.
        norm: Spectral only: that value; None for 1. It bounds each layer, not f: a residual connection adds its 1.

    Raises:
        ValueError: If there is nothing to normalize, or a weight is 0 or has a parametrization already.

    Source: Salimans and Kingma 2016, arXiv:1602.07868; Miyato et al. 2018, arXiv:1802.05957.
    """
    require_choice("kind", kind, get_args(NormalizationKind))
    if norm is not None and (kind != "spectral" or not 0 < norm < float("inf")):
        raise ValueError(f"norm must be positive and belongs to kind='spectral', got norm={norm!r}, kind={kind!r}")
    layers = {name: module for name, module in f.named_modules() if isinstance(module, NORMALIZED)}
    if not layers:
        raise ValueError(f"nothing to normalize: {type(f).__name__} has no linear map and no convolution")
    for name, module in layers.items():
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"the weight of {name!r} is parametrized already: normalize once, or the layers by hand")
        if not (module.weight.detach().flatten(1).norm(dim=1) > 0).all():
            raise ValueError(
                f"the weight of {name!r} has outputs that are 0, without a direction to normalize: initialize it first"
            )
    for module in layers.values():
        if kind == "weight":
            parametrizations.weight_norm(module)
            continue
        parametrizations.spectral_norm(module)
        if norm is not None and norm != 1:
            parametrize.register_parametrization(module, "weight", _Scaled(norm))
    return f


class _Scaled(nn.Module):
    """`factor * weight`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight
