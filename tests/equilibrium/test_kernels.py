"""The Triton kernels against their twins in PyTorch, bit for bit, in Triton's interpreter, which needs no GPU."""

import inspect
import os
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="the kernels need Triton")

PROGRAM = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from revdeq_lightning.equilibrium import BackpropAdjoint, MomentumSolver, ReversibleAdjoint, ReversibleSolver
from revdeq_lightning.equilibrium import solve_fixed_point
from revdeq_lightning.equilibrium.exact import kernels
from revdeq_lightning.equilibrium.solvers import reversible

torch.manual_seed(0)  # float16, as the interpreter truncates to bfloat16, where a GPU rounds
solvers = [ReversibleSolver(beta=beta, max_steps=1) for beta in (0.5, 0.8, 1.2, 0.999)]
solvers += [MomentumSolver(momentum=m, beta=b) for m, b in ((-0.25, 0.9), (0.1875, 0.7))]
first, last = torch.contiguous_format, torch.channels_last
images, text = (3, 4, 5, 2), (2, 513)
copies = []
like = kernels._like
kernels._like = lambda tensor, state: copies.append(like(tensor, state) is not tensor) or like(tensor, state)
for i, solver in enumerate(solvers):
    cases = [(images, torch.float16, last, first)]  # layout of the state, and of the values
    if i in (1, 5):
        cases += [(text, torch.float32, first, first), (images, torch.float32, first, last)]
        cases += [(images, torch.float32, first, first), (images, torch.float32, last, last)]
    for shape, dtype, of_state, of_values in cases:
        exact = solver.state_arithmetic([dtype])
        start = exact.encode(20 * torch.randn(shape).to(dtype)).contiguous(memory_format=of_state)
        values = [30 * torch.randn(shape).to(dtype).contiguous(memory_format=of_values) for _ in range(4)]
        ours, theirs = exact.remainders(), exact.remainders()
        before = now = previous = current = start
        for value in values:
            before, now = now, exact.advance(before, now, value, theirs)
            following, iterate, largest = kernels.advance(exact, previous, current, value, ours, dtype)
            previous, current = current, following
            assert torch.equal(current, now) and torch.equal(iterate, exact.decode(now, dtype))
            assert largest == max(value.abs().max().float(), exact.decode(now, torch.float32).abs().max())
            assert all(torch.equal(a, b) for a, b in zip(ours.rows, theirs.rows, strict=True))
        for value in reversed(values):
            undone, iterate = kernels.invert_(exact, current, previous, value, ours, dtype)
            previous, current = undone, previous
            assert torch.equal(iterate, exact.decode(previous, dtype))
        assert torch.equal(previous, start) and torch.equal(current, start) and not ours.rows
        g, h = (torch.randn(shape).contiguous(memory_format=of_state) for _ in range(2))
        expected = h + 0.75 * values[0].float() + 0.5 * g, 0.25 * g
        kernels.carry_(h, g, values[0], 0.25, 0.5, 0.75)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-5) for a, b in zip((h, g), expected, strict=True))
assert not any(copies)
odd = torch.randn(2, 3, 5, 4).permute(0, 1, 3, 2)  # another order: copied
state = exact.encode(torch.randn(odd.shape))
assert torch.equal(kernels.advance(exact, state, state, odd, None, torch.float32)[0], exact.advance(state, state, odd))
assert sum(copies) == 1

for bad in (float("nan"), float("inf"), 1e9):  # wherever it is
    value = torch.zeros(1500)
    value[1200] = bad
    largest = kernels.advance(exact, *[exact.encode(torch.zeros(1500))] * 2, value, None, torch.float32)[2]
    assert not largest < exact.limit()

# A whole solve
x = torch.randn(3, 8, requires_grad=True)
counted = [0, 0]


class Counter(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counted[1] += not any(name in str(func) for name in ("empty", "view", "detach", "alias", "select"))
        return func(*args, **(kwargs or {}))


launch = kernels._launch


def counting_launch(*arguments, **options):
    counted[0] += 1
    with torch.utils._python_dispatch._disable_current_modes():
        launch(*arguments, **options)


kernels._launch = counting_launch


class Layer(torch.nn.Linear):
    def forward(self, z, x):
        return torch.tanh(super().forward(z) + x)


f = Layer(8, 8)


def solve(solver, adjoint, with_kernels):
    reversible.kernels_for = lambda tensor, dtype: kernels if with_kernels and tensor.dtype == dtype else None
    solution = solve_fixed_point(f, torch.zeros_like(x), x, solver=solver, adjoint=adjoint)
    return solution.value, *torch.autograd.grad(solution.value.cos().sum(), [x, *f.parameters()])


for make in (lambda n: ReversibleSolver(max_steps=n // 2), lambda n: MomentumSolver(max_steps=n)):
    value, *ours = solve(make(4), ReversibleAdjoint(mismatch="raise"), True)
    twin, *theirs = solve(make(4), BackpropAdjoint(), False)
    assert torch.equal(value, twin)
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(ours, theirs, strict=True))
    truncated = [solve(make(4), BackpropAdjoint(num_evaluations=2), with_kernels) for with_kernels in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*truncated, strict=True))
    totals = []
    for n in (2, 4):
        counted[:] = 0, 0
        with Counter():
            solve(make(n), ReversibleAdjoint(), True)
        totals.append(list(counted))
    kernels_a_pair, others = ((b - a) / 2 for a, b in zip(*totals, strict=True))
    counted[:] = 0, 0
    with Counter():
        with torch.no_grad():
            f(x, x)
        z = x.detach().requires_grad_()
        torch.autograd.grad(f(z, x), [z, x, *f.parameters()], torch.ones_like(x))
    sums = 3  # of the gradients of x and two parameters
    print("launches a pair:", kernels_a_pair, others - counted[1] - sums)
    assert kernels_a_pair == 3
    assert kernels_a_pair + others - counted[1] - sums <= 6
"""


def test_kernels_have_the_bits_of_their_twins_and_are_few():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("launches a pair") == 2


def test_a_pair_of_passes_moves_at_most_80_bytes_an_element():
    """Every load and store of the kernels, numbers of 4 bytes and digits of 1, whether it happens or not."""
    from revdeq_lightning.equilibrium.exact import kernels

    total = 0
    for kernel in (kernels.advance_kernel, kernels.invert_kernel, kernels.carry_kernel):
        for argument in re.findall(r"tl\.(?:load|store)\((\w+)", inspect.getsource(kernel.fn)):
            total += 1 if argument.startswith("row") else 4
    assert 60 <= total <= 80


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile_for_gpus(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from revdeq_lightning.equilibrium.exact import kernels

    constants = {"P": 1, "Q": 5, "SIGN": -1, "WIDTH": 3, "UNIT": 2.0**-20, "HAS_C": True, "KEEPS": True, "BLOCK": 1024}
    constants |= {"ROWS": 1024, "COLUMNS": 96}
    types = {"value": "*bf16", "iterate": "*bf16", "row0": "*u8", "row1": "*u8", "row2": "*u8", "n": "i32"}
    types |= {"offset": "i32", "scaled_b": "fp32", "a": "fp32", "b": "fp32", "c": "fp32"}
    types |= {"previous": "*fp32", "current": "*fp32", "product": "*fp32"}
    for kernel in (kernels.advance_kernel, kernels.invert_kernel, kernels.carry_kernel):
        given = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {n: "constexpr" if n in given else types.get(n, "*i32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=given)
        try:
            compiled = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}
            )
        except (RuntimeError, FileNotFoundError) as error:
            pytest.skip(f"Triton cannot compile for CUDA here: {error}")
        assert compiled.asm["cubin"]
        assert "f64" not in compiled.asm["ptx"]
        assert "fma" not in compiled.asm["ptx"]
