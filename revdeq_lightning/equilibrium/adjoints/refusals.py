"""Maps f that cannot be reconstructed, refused instead of a wrong gradient."""

import sys

from torch import nn

from ..function import Edges, EquilibriumFunction, evaluate_recorded, graph_leaves
from ..norms import Leaves, Map


def refuse_foreign_leaves(f: EquilibriumFunction, value: Leaves | Edges, sources: Leaves, iterate: Leaves) -> None:
    """Raise if the graph of `value` ends in a tensor that is not among `sources`: its gradient would vanish."""
    known = {id(source) for source in sources}
    foreign = [variable for variable in graph_leaves(value) if id(variable) not in known]
    # Those that every evaluation makes for itself have no gradient to lose: equilibria in f do it, and energies.
    again = {id(variable) for variable in graph_leaves(evaluate_recorded(f, iterate)[1])} if foreign else set()
    for variable in foreign:
        if id(variable) in again:
            raise RuntimeError(
                f"f uses a tensor of shape {tuple(variable.shape)} ({variable.dtype}) that needs a gradient, or"
                " comes from one that does, but is neither in x nor a parameter of f: its gradient would be lost. Pass"
                " it in x, make f an nn.Module that owns it, or detach it"
            )


def refuse_unsuitable(f: Map) -> None:
    """Raise ValueError for modules that are not the same function in both passes, or whose gradient would be lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported where anything is sharded
    for name, module in f.named_modules() if isinstance(f, nn.Module) else ():
        # The common base of BatchNorm and InstanceNorm; batch statistics are also not the samples' own.
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if batch_norm or module.track_running_stats:
                raise ValueError(
                    f"f contains {type(module).__name__} in training mode (module {name!r}): every evaluation would"
                    " update its statistics. Use GroupNorm or LayerNorm inside the equilibrium, or put this module"
                    " into eval mode"
                )
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            raise ValueError(
                f"a part of f is a sharding unit of FSDP2 (module {name!r}, {type(module).__name__}): it would be"
                " gathered for every evaluation, and its gradient lost. Shard the module that owns f and the"
                " solver (fully_shard(equilibrium_layer)), or a parent of it"
            )
