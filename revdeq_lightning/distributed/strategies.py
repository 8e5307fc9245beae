"""DDP and FSDP2 for equilibrium layers: Lightning's strategies with suitable defaults and checks.

    ddp     every process holds the whole model; gradients are averaged once per step
    fsdp2   every process holds a shard of parameters, gradients and optimizer state; an EquilibriumLayer is gathered
            once before its solve and once before its backward pass, however many evaluations of f they make

Both exchange as many bytes as with an explicit model of the same parameters.
"""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from revdeq_lightning.checkpoints.files import fault_of_folder, other_checkpoint, read_checkpoint
from revdeq_lightning.checkpoints.io import AtomicCheckpointIO
from revdeq_lightning.checkpoints.names import REST, is_sharded_checkpoint
from revdeq_lightning.checkpoints.sharded import TRAINED, VALUES, WEIGHTS, held_tensors, load_into, write_folder
from revdeq_lightning.equilibrium import EquilibriumLayer
from revdeq_lightning.errors import CheckpointError, ParallelismError
from revdeq_lightning.processes import gathered, host_group


class CheckedProcesses:
    """Mixin for strategies: check timeout, NCCL, and GPUs when the processes connect, and synchronize buffers."""

    allow_mixed_gpus: bool

    def setup_environment(self: Any) -> None:
        timeout = self._timeout.total_seconds()
        if timeout < 1:  # PyTorch would only report a lost connection
            raise ParallelismError(
                f"timeout_seconds={timeout:g} of the strategy is too short: a process waits this long for another,"
                " which may be saving; use at least 1 (default 1800)"
            )
        if self.root_device.type == "cuda" and not dist.is_nccl_available():
            raise ParallelismError(
                f"this PyTorch ({torch.__version__}) was built without NCCL, which GPUs need to exchange gradients:"
                " install a build with CUDA for Linux, or use one GPU (trainer.devices=1)"
            )
        super().setup_environment()  # type: ignore[misc]
        host_group(self._timeout)
        if self.root_device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.root_device)
            kinds = gathered(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
            if len(set(kinds)) > 1 and not self.allow_mixed_gpus:
                counts = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
                raise ParallelismError(
                    f"the GPUs are of different kinds ({counts}), and the slowest and smallest limits all: choose GPUs"
                    " of one kind with CUDA_VISIBLE_DEVICES, or set the strategy's allow_mixed_gpus"
                )

    def on_validation_start(self: Any) -> None:
        # BatchNorm's running statistics are each process's own in training; a checkpoint has the first process's.
        for buffer in self.lightning_module.buffers():
            dist.broadcast(buffer, 0)

    on_test_start = on_validation_start


class EquilibriumDDP(CheckedProcesses, DDPStrategy):
    """DDP that exchanges nothing but gradients, without copies: no buffers, no search for unused parameters.

    Args:
        compress_gradients: Exchange gradients in bfloat16, half the bytes; the average is rounded to 8 bits.
        allow_mixed_gpus: Train on GPUs of different kinds together, at the pace of the slowest.
        timeout_seconds: Time after which the other processes give up on one that does not respond.
        start_method: How the processes of one machine are started; popen runs the command again for each.
    """

    def __init__(
        self,
        compress_gradients: bool = False,
        allow_mixed_gpus: bool = False,
        timeout_seconds: float = 1800,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            timeout=timedelta(seconds=timeout_seconds),
            start_method=start_method,
            find_unused_parameters=False,
            gradient_as_bucket_view=True,
        )
        self.compress_gradients, self.allow_mixed_gpus = compress_gradients, allow_mixed_gpus

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.broadcast_buffers = False  # in each step; they are the same in evaluations and checkpoints anyway
        if self.compress_gradients:
            # Lightning registers hooks only on CUDA and ignores them elsewhere.
            self.model.register_comm_hook(None, bf16_compress_hook)


class EquilibriumFSDP2(CheckedProcesses, ModelParallelStrategy):
    """FSDP2: shard parameters, gradients, and optimizer state over all processes.

    The units are the equilibrium layers, each with its f, and the rest of the model. Precision `32-true` or
    `bf16-mixed`: the state is never rounded to bfloat16.

    Args:
        reshard_after_forward: Free the parameters of a layer after its solve and gather them again for the backward
            pass: 50 % more communication, but only one layer at a time in memory.
        gather_dtype: Send the layers' parameters as float32, or as bfloat16 in half the bytes; for bf16-mixed, whose
            products round them anyway. Their gradients are rounded to bfloat16 once, then averaged in float32.
        sharded_checkpoints: Write a folder with one file per process, readable on any number of processes, instead of
            one file, for which the first process gathers everything.
        allow_mixed_gpus: Train on GPUs of different kinds together, at the pace of the slowest.
        timeout_seconds: Time after which the other processes give up on one that does not respond.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        gather_dtype: Literal["float32", "bfloat16"] = "float32",
        sharded_checkpoints: bool = False,
        allow_mixed_gpus: bool = False,
        timeout_seconds: float = 1800,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoints,
            timeout=timedelta(seconds=timeout_seconds),
        )
        self.reshard_after_forward, self.gather_dtype = reshard_after_forward, gather_dtype
        self.allow_mixed_gpus = allow_mixed_gpus

    def setup_environment(self) -> None:
        precision = str(self.precision_plugin.precision)
        if precision.startswith("16") or precision == "bf16-true":
            raise ParallelismError(
                f"strategy fsdp2 needs a state in float32 or better, got precision={precision!r}: use"
                " trainer.precision=bf16-mixed or 32-true"
            )
        if self.gather_dtype == "bfloat16" and precision != "bf16-mixed":
            raise ParallelismError(
                f"gather_dtype='bfloat16' rounds the weights and needs trainer.precision=bf16-mixed, got {precision!r}"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard_model(self, model: nn.Module, rebuild: Callable[[], nn.Module] | None = None) -> None:
        """Shard a model; call this in `configure_model`.

        Args:
            model: Model whose equilibrium layers become separate units.
            rebuild: Builds the model with its weights if it is on the meta device: the first process calls it and
                sends each process its shard.
        """
        if self._layer_sync is not None:  # Lightning does this only for DDP
            self._layer_sync.apply(model)
        # FSDP2 does not accept weights in channels_last memory format; the images keep it.
        model.to(memory_format=torch.contiguous_format)
        dtype = torch.bfloat16 if self.gather_dtype == "bfloat16" else None
        mesh = self.device_mesh["data_parallel"]
        shard_equilibria(model, mesh, reshard_after_forward=self.reshard_after_forward, gather_dtype=dtype)
        if any(p.is_meta for p in model.parameters()):
            if rebuild is None:
                raise ParallelismError("the model has no weights (meta device): pass `rebuild`, which builds it")
            fill_from_first_process(model, rebuild, self.root_device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a file, or a folder that appears only when it is complete."""
        if not self._save_distributed_checkpoint:
            # Not Lightning's implementation, in which each process first removes a folder of this name.
            return Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
        target = Path(self.broadcast(str(filepath)))
        fault = write_folder(checkpoint, target)
        if not isinstance(self.checkpoint_io, AtomicCheckpointIO):
            if fault is not None:
                raise fault
        elif self.is_global_zero:
            self.checkpoint_io.note(target, fault)
        return None

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer, keyed by names in a folder, and by numbers, as for other strategies, in a file."""
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        state: Any = get_optimizer_state_dict(self._module, optimizer, options=options)
        if self._save_distributed_checkpoint or not self.is_global_zero:
            return cast(dict[str, Any], state)
        names = [name for group in state["param_groups"] for name in group["params"]]
        return renamed(state, {name: i for i, name in enumerate(names)})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and optimizers from a file or folder written on any number of processes; return the rest."""
        path = Path(self.broadcast(str(checkpoint_path)))
        return self._load_folder(path) if is_sharded_checkpoint(path) else self._load_file(path, weights_only)

    def _load_folder(self, path: Path) -> dict[str, Any]:
        if fault := next(filter(None, gathered(fault_of_folder(path, self.global_rank, self.world_size))), None):
            raise CheckpointError(f"{path} {fault}{other_checkpoint(path)}")
        rest = read_checkpoint(path / REST)
        values = rest.pop(VALUES, {})
        weights: Any = get_model_state_dict(self._module)
        states: list[Any] = [get_optimizer_state_dict(self._module, optimizer) for optimizer in self.optimizers]
        held = held_tensors(path)
        trained = {name: torch.empty_like(w) for name, w in weights.items() if f"{TRAINED}.{name}" in held}
        load_into(
            {WEIGHTS: weights, TRAINED: trained} | {f"optimizer_{i}": own for i, own in enumerate(states)}, path, values
        )
        self._module.load_state_dict(weights)
        for optimizer, own in zip(self.optimizers, states, strict=True):
            set_optimizer_state_dict(self._module, optimizer, own)
        return rest | ({WEIGHTS: weights, TRAINED: trained} if trained else {})

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = Strategy.load_checkpoint(self, path, weights_only)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self._module, checkpoint[WEIGHTS], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            # By position in the groups: Lightning takes the numbers for positions in the model, where they are not.
            name_of = {id(p): name for name, p in self._module.named_parameters()}
            names = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            pairs = zip(state["param_groups"], names, strict=True)
            new = {key: name for group, own in pairs for key, name in zip(group["params"], own, strict=True)}
            set_optimizer_state_dict(self._module, optimizer, renamed(state, new), options=options)
        return checkpoint

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model


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
    if hasattr(model, "loss"):  # our language models are called by it instead of `forward`
        register_fsdp_forward_method(model, "loss")


def fill_from_first_process(model: nn.Module, rebuild: Callable[[], nn.Module], device: torch.device) -> None:
    """Initialize a sharded model on the meta device; all processes must call it.

    Args:
        model: Model to allocate on the device and fill with the shards of the first process's weights.
        rebuild: Builds the same model with weights on the CPU.
        device: Device of this process.
    """
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


def renamed(state: Mapping[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with renamed keys of its parameters."""
    groups = [{**group, "params": [new[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def require_meeting_place(trainer: Trainer) -> None:
    """Raise ParallelismError if there are several machines without a meeting point, for which each would wait."""
    alone = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    if trainer.num_nodes > 1 and alone and "MASTER_ADDR" not in os.environ:
        raise ParallelismError(
            f"trainer.num_nodes={trainer.num_nodes}: the address of the first machine is not set; start with"
            " configs/cluster/torchrun.sh (make train-nodes) or slurm.sh (make submit), or set MASTER_ADDR, MASTER_PORT"
            " and NODE_RANK on each machine"
        )


def register_strategies() -> None:
    """Register `ddp` (replacing Lightning's) and `fsdp2` as names of `trainer.strategy`."""
    for name, strategy in {"ddp": EquilibriumDDP, "fsdp2": EquilibriumFSDP2}.items():
        StrategyRegistry.register(name, strategy, description=str(strategy.__doc__).split("\n")[0], override=True)


def is_fsdp2(setting: Any) -> bool:
    """Whether the configuration's `trainer.strategy` is our FSDP2, by name or class."""
    if isinstance(setting, str):
        return setting == "fsdp2"
    return str(getattr(setting, "class_path", "")).rpartition(".")[2] == EquilibriumFSDP2.__name__
