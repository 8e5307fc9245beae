"""DDP and FSDP2: gradients of two processes equal those of one with the joined batch."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BroydenSolver,
    ImplicitAdjoint,
    PhantomAdjoint,
    ReversibleAdjoint,
)
from tests.helpers.equilibrium import (
    BPTT,
    REVERSIBLE,
    SOLVERS,
    TOLERANCE,
    assert_equal_gradients,
    attention_layer,
    project,
    sequence,
)
from tests.helpers.processes import run_on_ranks

NUM_RANKS = 2
NUM_MICRO_BATCHES = 2
STORED = SOLVERS["momentum"], ReversibleAdjoint(mismatch="raise", stored_evaluations=2)
WAYS = {name: (SOLVERS[name], REVERSIBLE) for name in ("momentum", "tolerance")} | {
    "stored": STORED,
    "implicit": (
        AndersonSolver(max_steps=6),
        ImplicitAdjoint(solver=AndersonSolver(max_steps=300, rtol=1e-6), unconverged="ignore"),
    ),
    "unrolled": (BroydenSolver(max_steps=4), PhantomAdjoint(num_steps=3)),
    "neumann": (AndersonSolver(max_steps=4), PhantomAdjoint(num_steps=3, kind="neumann")),
}


class Network(nn.Module):
    """Encoder, equilibrium, head; the solution passes through DDP as a NamedTuple."""

    def __init__(self, solver, adjoint):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.layer = attention_layer(solver, adjoint)

    def forward(self, x):
        solution = self.layer(self.encoder(x))
        return solution._replace(value=self.head(solution.value))


def micro_batches(rank):
    """The rank's own share of the data, in micro-batches."""
    return [sequence(seed=10 * rank + i, batch=2).detach() for i in range(NUM_MICRO_BATCHES)]


def mean_loss(network, x):
    return project(network(x).value) / len(x)


def gradients_with_ddp(rank):
    """Of every solver: gradients after accumulation with `no_sync`, and how often DDP reduced a bucket."""
    results = {}
    for name, (solver, adjoint) in WAYS.items():
        network = DistributedDataParallel(Network(solver, adjoint), find_unused_parameters=False)
        for _ in range(2):  # the second round meets the buckets that DDP rebuilt after the first
            network.zero_grad()
            for i, x in enumerate(micro_batches(rank)):
                with network.no_sync() if i < NUM_MICRO_BATCHES - 1 else nullcontext():
                    mean_loss(network, x).backward()
        results[name] = [p.grad for p in network.parameters()]
    return results


def test_ddp_equals_one_process_with_the_joined_batch(tmp_path):
    ranks = run_on_ranks(gradients_with_ddp, NUM_RANKS, tmp_path)
    for name, (solver, adjoint) in WAYS.items():
        network = Network(solver, BPTT if isinstance(adjoint, ReversibleAdjoint) else adjoint)
        parts = [x for rank in range(NUM_RANKS) for x in micro_batches(rank)]
        value = network(torch.cat(parts)).value
        sum(project(part) / len(part) / NUM_RANKS for part in value.split(len(parts[0]))).backward()
        reference = [p.grad for p in network.parameters()]
        for gradients in ranks:
            assert_equal_gradients(gradients[name], reference, 1e-4 if name == "implicit" else TOLERANCE)


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# PyTorch 2.14's, of any result that might be changed in place, such as that of a linear layer; here none is.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize(("unit", "reshard"), [("layer", True), ("network", True), ("network", False)])
def test_fsdp2_of_the_layer_or_a_parent(one_process_group, unit, reshard):
    for solver, adjoint in (WAYS[name] for name in ("momentum", "tolerance", "stored")):
        plain, sharded = Network(solver, BPTT), Network(solver, adjoint)
        if unit == "layer":
            fully_shard(sharded.layer, mesh=one_process_group, reshard_after_forward=reshard)
        fully_shard(sharded, mesh=one_process_group, reshard_after_forward=reshard)
        assert isinstance(sharded.layer.f.up.weight, DTensor)
        for _ in range(2):
            for network in (plain, sharded):
                network.zero_grad()
                for x in micro_batches(0):
                    mean_loss(network, x).backward()
            gradients = [p.grad.full_tensor() for p in sharded.parameters()]
            assert_equal_gradients(gradients, [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("part", ["", "qkv"])
def test_fsdp2_of_f_or_a_part_is_refused(one_process_group, part):
    layer, x = attention_layer(SOLVERS["reversible"], REVERSIBLE), sequence()
    fully_shard(layer.f.get_submodule(part), mesh=one_process_group)
    with pytest.raises(ValueError, match=rf"unit of FSDP2 \(module '{part}'.*fully_shard\(equilibrium_layer\)"):
        layer(x)
