"""Tensor parallelism inside f of the language model, from outside of its file; no Lightning in here.

Each process computes its share of the heads and of the widths of the MLP. Every evaluation of f then exchanges its
result twice, forward and backward: bytes grow with the solver's steps, unlike those of DDP and FSDP2. It pays only
where one layer's matrices do not fit one device, hence it is a function, not a strategy: beside FSDP2, clipping and
optimizers would meet parameters on two meshes.
"""

from typing import Any

from torch import nn

from revdeq_lightning.models.transformer import ModernLayer, PaperBlock
from revdeq_lightning.sharding import ParallelismError


def parallelize_block(block: nn.Module, mesh: Any) -> None:
    """Share the heads and the MLP of a transformer's f out over a one-dimensional device mesh.

    Inputs, state, residual stream and all parameters that stay whole are the same on all processes of the mesh. Works
    with every adjoint; do not shard the same model with FSDP2 as well.

    Args:
        block: `PaperBlock`, or `ModernBlock` (of which each layer is shared out).
        mesh: One-dimensional device mesh.

    Raises:
        ParallelismError: If the heads do not divide, or the block is another.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    layers: list[Any] = [m for m in block.modules() if isinstance(m, PaperBlock | ModernLayer)]
    if not layers:
        raise ParallelismError(f"tensor parallelism knows PaperBlock and ModernBlock, got {type(block).__name__}")
    for layer in layers:
        if layer.attention.num_heads % mesh.size():
            raise ParallelismError(
                f"num_heads must divide among the processes, got {layer.attention.num_heads} heads and"
                f" {mesh.size()} processes"
            )
        if isinstance(layer, PaperBlock):
            # With a double projection the second one makes the heads; of the MLP's matrices the middle is the largest.
            double = layer.attention.inner is not None
            split = [f"inner.{i}" for i in range(3)] if double else ["query", "key", "value"]
            split, joined = [f"attention.{name}" for name in split] + ["mlp.2"], ["attention.output", "mlp.4"]
        else:
            split = ["attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up"]
            joined = ["attention.output", "mlp.down"]
        plan: dict[str, Any] = dict.fromkeys(split, ColwiseParallel()) | dict.fromkeys(joined, RowwiseParallel())
        parallelize_module(layer, mesh, plan)
        layer.attention.num_heads //= mesh.size()
