"""Gradients of the models' blocks are exact on the device: traced evaluation by evaluation, and as BPTT's."""

import itertools

import pytest
import torch
from torch import nn

from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    DivergenceError,
    EquilibriumLayer,
    MomentumSolver,
    ReversibleAdjoint,
    ReversibleSolver,
    settle_checks,
)
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.classifier import ModernConvBlock, PaperConvBlock
from revdeq_lightning.models.transformer_blocks import ModernBlock, PaperBlock
from tests.helpers.equilibrium import COMPILES, gradients_of, project, relative_error

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU case is its twin")
CUDA = [pytest.mark.cuda, needs_cuda]


class TorchEncoder(nn.Module):
    """PyTorch's own layer, whose kernels depend on whether autograd records."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.0, batch_first=True)

    def forward(self, z, x):
        return self.layer(z + x)


def transformer(make, head_size, num_heads=2):
    config = {"vocab_size": 8, "context_length": 40, "d_model": head_size * num_heads, "num_heads": num_heads}
    return make(TransformerConfig(**config, block="paper" if make is PaperBlock else "modern"))


BLOCKS = {
    "modern, head size 64": (lambda: transformer(ModernBlock, 64), (2, 40, 128)),
    "modern, head size 192": (lambda: transformer(ModernBlock, 192), (2, 40, 384)),
    "paper, head size 64": (lambda: transformer(PaperBlock, 64), (2, 40, 128)),
    "TransformerEncoderLayer": (lambda: TorchEncoder(128), (2, 40, 128)),
    "modern convolution": (lambda: ModernConvBlock(32, 2, 0.1, 16), (4, 32, 16, 16)),
    "paper convolution": (lambda: PaperConvBlock(32, 1), (4, 32, 16, 16)),
}
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of autocast: rounded sums of a weight's gradients, which BPTT adds up in the lower precision.
TOLERANCES = {"float32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
SOLVERS = {
    "reversible": ReversibleSolver(beta=0.8, max_steps=5),
    "momentum": MomentumSolver(momentum=0.125, max_steps=9),
    "tolerance": ReversibleSolver(beta=0.5, max_steps=5, rtol=0.1),
}


def layer_and_input(block, device, solver, layout=torch.contiguous_format, adjoint=None):
    torch.manual_seed(0)
    make, shape = BLOCKS[block]
    f = make()
    for parameter in f.parameters():
        if parameter.ndim > 1:  # those that begin at 0 would hide all before them
            nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
    x = torch.randn(shape)
    if len(shape) == 4:
        f, x = f.to(memory_format=layout), x.contiguous(memory_format=layout)
    adjoint = adjoint or ReversibleAdjoint(mismatch="trace")
    return EquilibriumLayer(f.to(device), solver=solver, adjoint=adjoint), x.to(device).requires_grad_()


def run(layer, x, dtype, seed=1):
    torch.manual_seed(seed)
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        solution = layer(x)
    loss = project(solution.value)
    loss.backward()
    settle_checks()
    return solution, torch.cat([g.flatten().double() for g in gradients_of(layer, x)])


def cases():
    """All on a GPU; on a CPU what `tests/equilibrium/` has not."""
    for block, (_, shape) in BLOCKS.items():
        for layout in (torch.contiguous_format, torch.channels_last)[: len(shape) - 2]:
            for dtype, solver in itertools.product(DTYPES, SOLVERS):
                name = f"{block}-{dtype}-{solver}-{str(layout)[6:]}"
                yield pytest.param(block, dtype, solver, layout, "cuda", marks=CUDA, id=f"{name}-cuda")
                if solver == "momentum" and dtype == "bf16" and "192" not in block:
                    yield pytest.param(block, dtype, solver, layout, "cpu", id=f"{name}-cpu")


@pytest.mark.parametrize(("block", "dtype", "solver", "layout", "device"), list(cases()))
def test_every_evaluation_is_repeated_bit_for_bit(block, dtype, solver, layout, device):
    solver = SOLVERS[solver]
    layer, x = layer_and_input(block, device, solver, layout)
    solution, gradient = run(layer, x, DTYPES[dtype])
    assert solution.stats.reconstruction_mismatch == 0
    layer, x = layer_and_input(block, device, solver, layout, BackpropAdjoint())
    assert relative_error(gradient, run(layer, x, DTYPES[dtype])[1]) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=[*CUDA, *COMPILES]) for dtype in ("float32", "bf16")])
@pytest.mark.parametrize("block", BLOCKS)
def test_compiled_f_is_repeated_bit_for_bit(block, dtype):
    """Its CPU twin: `tests/equilibrium/test_works_under_compile.py`."""
    torch.compiler.reset()
    layer, x = layer_and_input(block, "cuda", SOLVERS["momentum"], torch.channels_last)
    eager = run(layer, x, DTYPES[dtype])[1]
    layer, x = layer_and_input(block, "cuda", SOLVERS["momentum"], torch.channels_last)
    layer.f.compile()
    solution, gradient = run(layer, x, DTYPES[dtype])
    assert solution.stats.reconstruction_mismatch == 0
    assert relative_error(gradient, eager) <= 10 * TOLERANCES[dtype]  # inductor rounds otherwise


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("stored", [0, 3])
@pytest.mark.parametrize("block", ["modern, head size 64", "paper convolution"])
def test_a_cuda_graph_replays_both_passes(block, stored):
    adjoint = ReversibleAdjoint(mismatch="trace", stored_evaluations=stored)
    layer, x = layer_and_input(block, "cuda", SOLVERS["momentum"], torch.channels_last, adjoint)

    def step():
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            solution = layer(x)
        solution.value.square().sum().backward()
        return solution

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        settle_checks()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replayed = gradients_of(layer, x)
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    assert captured.stats.reconstruction_mismatch == 0
    value, result = captured.value.clone(), torch.cat([g.flatten().double() for g in replayed])
    expected = step()
    assert relative_error(value, expected.value) <= 1e-3
    assert relative_error(result, torch.cat([g.flatten().double() for g in gradients_of(layer, x)])) <= 5e-2


@pytest.mark.cuda
@needs_cuda
def test_a_state_that_diverged_on_the_device_is_reported_when_someone_waits():
    """Its CPU twin: `test_a_state_that_diverged_is_nan_until_someone_waits_who_gets_the_error`."""
    layer, x = layer_and_input("paper convolution", "cuda", SOLVERS["momentum"])
    value = layer((x * float("inf")).detach().requires_grad_()).value
    with pytest.raises(DivergenceError, match="is not finite"):
        settle_checks()
    assert value.isnan().all()
