"""User-defined blocks as f, by import path: `model.network.block: my_package.MyBlock`."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from revdeq_lightning.errors import BlockError


def own_block(path: str, width: int, options: Mapping[str, Any]) -> nn.Module:
    """Create `MyBlock(width, **options)`.

    Importing the module runs its code, also if the path comes from a checkpoint.

    Args:
        path: Module and class, joined by a dot.
        width: Size of the state: `d_model`, or the channels of the stage.
        options: Keyword arguments of the class.

    Raises:
        BlockError: If there is no such module or class, it is not an `nn.Module`, or it does not accept these
            arguments; in a call, if the block does not keep the shape of z.
    """
    module, _, name = path.rpartition(".")
    try:
        block_class = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise BlockError(
            f"block={path!r}: no module named {error.name!r}; install it, or run from the folder that contains it"
        ) from None
    if block_class is None:
        raise BlockError(f"block={path!r}: the module {module!r} has no {name!r}")
    if not (isinstance(block_class, type) and issubclass(block_class, nn.Module)):
        raise BlockError(f"block={path!r}: {name} must be a class derived from torch.nn.Module, got {block_class!r}")
    try:
        block = block_class(width, **options)
    except TypeError as error:
        raise BlockError(f"block={path!r}: {name}(width, **block_options) failed: {error}") from None
    block.register_forward_hook(_require_shape_of_z)
    return block


def _require_shape_of_z(block: nn.Module, args: tuple[Tensor, ...], value: Any) -> None:
    wanted = tuple(args[0].shape)
    if not isinstance(value, Tensor) or value.shape != wanted:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise BlockError(f"{type(block).__name__}(z, x) must return a tensor with the shape of z, {wanted}, got {got}")
