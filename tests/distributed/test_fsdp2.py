"""FSDP2 and DDP of models with equilibria, on two processes: what is sent, how often, and with which result."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revdeq_lightning.distributed.strategies import fill_from_first_process, shard_equilibria
from revdeq_lightning.equilibrium import MomentumSolver, ReversibleAdjoint
from revdeq_lightning.models import ExplicitTransformerLM, TransformerConfig, TransformerLM
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.processes import whole
from revdeq_lightning.tasks.base import deferred_weights
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import MuonAdamW, OptimizerConfig
from tests.helpers.modules import make_batch
from tests.helpers.processes import run_on_ranks

pytestmark = pytest.mark.xdist_group("fsdp2")

NUM_RANKS = 2
SIZES = {"vocab_size": 23, "context_length": 12, "d_model": 16, "num_heads": 2, "num_layers": 1}
STEPS = (2, 8)


class Sent(TorchDispatchMode):
    """Counts collective operations by their names, and the bytes of their largest tensor."""

    def __init__(self):
        super().__init__()
        self.calls, self.num_bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.calls[name] += 1
            self.num_bytes[name] += max(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


class Loss(nn.Module):
    """DDP calls `forward`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model.loss(*batch)


def language_model(steps, adjoint=None):
    """With an equilibrium of so many steps, or (0) explicit with the same parameters."""
    torch.manual_seed(0)
    config = TransformerConfig(**SIZES)
    solver, adjoint = MomentumSolver(max_steps=max(1, steps)), adjoint or ReversibleAdjoint(mismatch="raise")
    model = TransformerLM(config, solver, adjoint) if steps else ExplicitTransformerLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def mesh():
    return init_device_mesh("cpu", (NUM_RANKS,))


def sent_in_a_step(strategy, steps, rank):
    model = language_model(steps)
    if strategy == "ddp":
        run = DistributedDataParallel(Loss(model), gradient_as_bucket_view=True)
    else:
        if not steps:  # the same unit as in the other
            fully_shard(model.block, mesh=mesh(), reshard_after_forward=strategy == "fsdp2")
        shard_equilibria(model, mesh(), reshard_after_forward=strategy == "fsdp2")
        run = model.loss
    for _ in range(2):  # DDP makes its buckets anew after the first
        with Sent() as sent:
            run(*make_batch(2, seed=rank)).loss.backward()
    return {"calls": dict(sent.calls), "bytes": dict(sent.num_bytes), "params": sum(map(numel, model.parameters()))}


def numel(parameter):
    return parameter.numel()


def gradients_of_a_deferred_model():
    """Of a model that had no weights until it was sharded, and the random number drawn after it."""
    torch.manual_seed(3)
    with deferred_weights():
        task = LanguageModelingTask(TransformerConfig(**SIZES), SolverConfig(max_steps=3), OptimizerConfig())
    model = task.model
    is_empty = all(p.is_meta for p in model.parameters())
    shard_equilibria(model, mesh())
    torch.manual_seed(torch.distributed.get_rank())  # whatever was drawn in between
    fill_from_first_process(model, task._rebuild, torch.device("cpu"))
    return is_empty, state_of(model), torch.rand(2)


def state_of(model):
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()} | buffers


def moved_by_muon():
    model, plain = language_model(2), language_model(2)
    shard_equilibria(model, mesh())
    moved = []
    for m in (model, plain):
        matrices = [w for w in m.equilibrium.parameters() if w.dim() == 2]
        optimizer = MuonAdamW([{"params": matrices, "lr": 0.1, "momentum": 0.95, "weight_decay": 0.1}])
        for seed in range(2):
            m.loss(*make_batch(2, seed=seed)).loss.backward()
            optimizer.step()
            m.zero_grad()
        moved.append(state_of(m))
    return moved


def dtypes_under_autocast(gather_dtype):
    """Of f's parameters, of its matrix products, of the state that f gets and of the solution; and the gradient."""
    model = language_model(3)
    shard_equilibria(model, mesh(), gather_dtype=gather_dtype)
    seen = {}

    def note(module, args, output):
        seen["parameter"], seen["product"] = model.equilibrium.f.layers[0].mlp.gate.weight.dtype, output.dtype

    model.equilibrium.f.layers[0].mlp.gate.register_forward_hook(note)
    model.equilibrium.f.register_forward_pre_hook(lambda _, args: seen.update(state=args[0].dtype, x=args[1].dtype))
    model.equilibrium.register_forward_hook(lambda _, args, out: seen.update(solution=out.value.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model.loss(*make_batch(2))
    output.loss.backward()
    gradients = [whole(p.grad) for p in model.parameters()]
    return seen, int(output.stats.reconstruction_mismatch), gradients


def layer_alone():
    """Gradients of an equilibrium layer that is all of the model, sharded and whole."""
    gradients = []
    for sharded in (True, False):
        layer = language_model(3).equilibrium
        if sharded:
            shard_equilibria(layer, mesh())
        torch.manual_seed(0)
        layer(torch.randn(2, SIZES["context_length"], SIZES["d_model"])).value.square().mean().backward()
        gradients.append([whole(p.grad) for p in layer.parameters()])
    return gradients


def in_parts():
    """Gradients of a solve in three parts with a loss on each, sharded and whole; how often was gathered."""
    gradients, calls = [], []
    for sharded in (True, False):
        torch.manual_seed(0)
        solver, adjoint = MomentumSolver(max_steps=6), ReversibleAdjoint(mismatch="raise")
        model = TransformerLM(TransformerConfig(**SIZES), solver, adjoint, num_losses=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        if sharded:
            shard_equilibria(model, mesh())
        with Sent() as sent:
            model.loss(*make_batch(2)).loss.backward()
        calls.append(dict(sent.calls))
        gradients.append([whole(p.grad) for p in model.parameters()])
    return gradients, calls


def everything(rank):
    sent = {(s, n): sent_in_a_step(s, n, rank) for s in ("ddp", "fsdp2", "kept") for n in (*STEPS, 0)}
    autocast = {dtype: dtypes_under_autocast(dtype) for dtype in (None, torch.bfloat16)}
    deferred = gradients_of_a_deferred_model()
    return {
        "parts": in_parts(),
        "alone": layer_alone(),
        "sent": sent,
        "autocast": autocast,
        "deferred": deferred,
        "muon": moved_by_muon(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(everything, NUM_RANKS, tmp_path_factory.mktemp("fsdp2"))


def test_ddp_averages_each_parameter_once_a_step_whatever_the_number_of_solver_steps(ranks):
    for steps in (*STEPS, 0):
        sent = ranks[0]["sent"]["ddp", steps]
        assert sent["calls"]["allreduce_"] == 1
        assert sent["bytes"]["allreduce_"] == 4 * sent["params"]
    assert ranks[0]["sent"]["ddp", 2] == ranks[0]["sent"]["ddp", 8] == ranks[0]["sent"]["ddp", 0]


@pytest.mark.parametrize(("strategy", "gathers"), [("fsdp2", 2), ("kept", 1)])
def test_fsdp2_gathers_a_layer_once_before_its_solve_and_once_before_its_backward_pass(ranks, strategy, gathers):
    layer = sum(map(numel, language_model(2).equilibrium.parameters()))
    for steps in (*STEPS, 0):
        sent = ranks[0]["sent"][strategy, steps]
        rest = sent["params"] - layer
        assert sent["calls"] == {"_allgather_base_": gathers + 1, "_reduce_scatter_base_": 2}
        # Rows are padded to whole shares: at most one more a process and parameter.
        assert 4 * sent["params"] <= sent["bytes"]["_reduce_scatter_base_"] <= 4.2 * sent["params"]
        assert 4 * (gathers * layer + rest) <= sent["bytes"]["_allgather_base_"] <= 4.2 * (gathers * layer + rest)
    explicit = ranks[0]["sent"][strategy, 0]
    assert ranks[0]["sent"][strategy, 2] == ranks[0]["sent"][strategy, 8] == explicit


def test_a_solve_in_parts_is_gathered_as_often_and_has_the_gradient_of_the_whole(ranks):
    (sharded, plain), calls = ranks[0]["parts"]
    assert calls == [{"_allgather_base_": 3, "_reduce_scatter_base_": 2}, {}]
    for a, b in zip(sharded, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_all_of_the_model_is_one_unit(ranks):
    sharded, plain = ranks[0]["alone"]
    for a, b in zip(sharded, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_weights_that_come_with_the_sharding_are_those_of_one_process(ranks):
    torch.manual_seed(3)
    model = TransformerLM(TransformerConfig(**SIZES), MomentumSolver(max_steps=3), ReversibleAdjoint())
    expected, drawn = state_of(model), torch.rand(2)
    for rank in ranks:
        was_empty, state, next_draw = rank["deferred"]
        assert was_empty
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert torch.equal(next_draw, drawn)


def test_muon_moves_sharded_matrices_as_whole_ones(ranks):
    for rank in ranks:
        sharded, plain = rank["muon"]
        for name, weight in plain.items():
            torch.testing.assert_close(sharded[name], weight, rtol=1e-5, atol=1e-6)


def test_the_state_stays_in_float32_whatever_parameters_are_sent_in(ranks):
    full, half = (ranks[0]["autocast"][dtype] for dtype in (None, torch.bfloat16))
    for (seen, mismatch, _), parameter in ((full, torch.float32), (half, torch.bfloat16)):
        assert seen == {
            "parameter": parameter,
            "product": torch.bfloat16,
            "state": torch.float32,
            "x": torch.float32,
            "solution": torch.float32,
        }
        assert mismatch == 0
    assert any(not torch.equal(a, b) for a, b in zip(full[2], half[2], strict=True))
    for a, b in zip(full[2], half[2], strict=True):
        assert a.dtype == b.dtype == torch.float32
        # Products round weights to bfloat16 in both; vectors and gradients only in the second: 8 bits.
        assert float((a - b).norm()) <= 0.03 * float(a.norm())
