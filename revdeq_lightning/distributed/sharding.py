"""FSDP2 for models with equilibria, and sharded tensors. Independent of Lightning."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from revdeq_lightning.equilibrium import EquilibriumLayer
from revdeq_lightning.errors import ParallelismError

FORWARD_METHODS = ("loss",)
"""Methods of our models that are called instead of `forward`."""


def shard_equilibria(
    model: nn.Module, mesh: Any, *, reshard_after_forward: bool = True, gather_dtype: torch.dtype | None = None
) -> None:
    """Apply `fully_shard` to each equilibrium layer, and to the model for the rest.

    A solve calls f many times but its layer once, so the parameters are gathered once for all evaluations. A second
    call has no effect.

    Args:
        model: Model whose forward pass includes all of its equilibria.
        mesh: One-dimensional device mesh.
        reshard_after_forward: Free a layer's gathered parameters after its solve.
        gather_dtype: Dtype in which the layers' parameters are sent and used; None for their own. The rest of the
            model, x, and the state keep their dtype, and gradients are averaged in float32.

    Raises:
        ParallelismError: If a part of a layer is sharded already.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        return
    layers: dict[str, EquilibriumLayer] = {}
    for name, module in model.named_modules():
        is_within = any(not outer or name.startswith(f"{outer}.") for outer in layers)
        if isinstance(module, EquilibriumLayer) and not is_within:
            layers[name] = module
    for name, layer in layers.items():
        part = next((n for n, m in layer.named_modules() if n and isinstance(m, FSDPModule)), None)
        if part is not None:
            raise ParallelismError(
                f"{name}.{part} is a sharding unit inside an equilibrium: its parameters would be gathered for every"
                f" evaluation of f, and its gradient lost; shard {name} instead, by fully_shard(model.{name})"
            )
    reduce_dtype = torch.float32 if gather_dtype else None
    policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    if "" not in layers:
        # Not in `gather_dtype`: a bfloat16 embedding would make x, the input of every evaluation, bfloat16.
        fully_shard(model, mesh=mesh)
    for method in FORWARD_METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def fill_from_first_process(model: nn.Module, rebuild: Callable[[], nn.Module], device: torch.device) -> None:
    """Initialize a sharded model on the meta device; all processes must call it.

    Args:
        model: Model to allocate on the device and fill with the shards of the first process's weights.
        rebuild: Builds the same model with weights on the CPU.
        device: Device of this process.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.to_empty(device=device)
    whole_model = rebuild() if dist.get_rank() == 0 else None
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole_model.state_dict() if whole_model else {}, options=options)
    made = dict(whole_model.named_buffers()) if whole_model else {}
    for name, buffer in model.named_buffers():  # those outside of the state too
        if name in made:
            buffer.copy_(made[name])
        dist.broadcast(buffer, 0)
    state = [torch.get_rng_state()]
    dist.broadcast_object_list(state, 0)
    torch.set_rng_state(state[0])
