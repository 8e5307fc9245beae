"""Reasoners: embed the cells of a puzzle, solve for a fixed point over the grid or string, read out each cell.

    x = embedding(cells),    z = f(z, x) by a solver,    logits = head(z)

With convolutions a reasoner answers puzzles of any size; larger ones get more evaluations of f.

Shape suffixes: B batch, C channels, A answers, N cells, ... the puzzle's own dimensions, `(length,)` or
`(height, width)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdeq_lightning.equilibrium import EquilibriumLayer, FixedPointSolution
from revdeq_lightning.equilibrium.validation import require_in_range
from revdeq_lightning.models.config import ReasonerConfig, TransformerConfig
from revdeq_lightning.models.own_block import own_block
from revdeq_lightning.models.transformer_blocks import MODERN_NORM_EPS, ModernBlock


class ReasonerOutput(NamedTuple):
    """Logits of every cell, `(B, A, ...)`, how they were reached (None without a solver), and at what cost.

    `evaluations` are those of f for each puzzle, `(B,)`.
    """

    logits: Tensor
    solution: FixedPointSolution | None
    evaluations: Tensor


def convolution(config: ReasonerConfig, num_in: int, num_out: int, size: int = 3, *, bias: bool = True) -> nn.Module:
    """A convolution over strings or grids that keeps the size."""
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d}[config.ndim]
    mode = config.padding if size > 1 else "zeros"
    return cast(nn.Module, kind(num_in, num_out, size, padding=size // 2, bias=bias, padding_mode=mode))


class ChannelNorm(nn.Module):
    """Normalize each cell to root mean square 1 over its channels, whatever the size of the puzzle."""

    def __init__(self, ndim: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, *[1] * ndim))

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(1, keepdim=True) + MODERN_NORM_EPS) * self.weight


class ConvolutionLayer(nn.Module):
    """`norm2(h + conv2(silu(norm1(conv1(h)))))`; conv2 starts at zero."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv1, self.conv2 = (convolution(config, channels, channels, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (ChannelNorm(config.ndim, channels) for _ in range(2))
        nn.init.zeros_(cast(Tensor, self.conv2.weight))

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.norm2(h + self.conv2(F.silu(self.norm1(self.conv1(h))))))


class ConvolutionBlock(nn.Module):
    """`f(z, x) = layers(z + x)`."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ConvolutionLayer(config) for _ in range(config.num_layers)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(z + x))


class AttentionBlock(nn.Module):
    """The language model's modern block, with attention from every cell to every cell."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.block = ModernBlock(
            TransformerConfig(
                vocab_size=config.num_symbols,
                context_length=math.prod(config.shape),
                d_model=config.channels,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                d_mlp=config.d_mlp,
            ),
            is_causal=False,
        )

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z_BNC, x_BNC = (state.flatten(2).transpose(1, 2) for state in (z, x))
        return cast(Tensor, self.block(z_BNC, x_BNC).transpose(1, 2).reshape(z.shape))


class AbstractReasoner(nn.Module):
    """Embedding and readout, around whatever maps embedded cells to states.

    Args:
        config: Sizes and block.
    """

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.embedding = nn.Embedding(config.num_symbols, channels)
        if config.block == "attention":
            self.position = nn.Parameter(torch.randn(channels, *config.shape))
            self.mix: nn.Module = nn.Identity()
            self.head = nn.Sequential(convolution(config, channels, config.num_answers, 1))
        else:
            self.mix = convolution(config, channels, channels)
            self.head = nn.Sequential(
                convolution(config, channels, channels), nn.SiLU(), convolution(config, channels, config.num_answers, 1)
            )

    def embed(self, inputs: Tensor) -> Tensor:
        """Input injection x, `(B, C, ...)`.

        Raises:
            ValueError: If the puzzles do not have the model's dimensions, a symbol is not one of the model's, or
                attention has no positions for the shape.
        """
        config = self.config
        if inputs.dim() != config.ndim + 1 or inputs.is_floating_point():
            raise ValueError(
                f"puzzles must be integers with {config.ndim + 1} dimensions, batch first, got {inputs.dtype} of shape "
                f"{tuple(inputs.shape)}"
            )
        if config.block == "attention" and list(inputs.shape[1:]) != list(config.shape):
            raise ValueError(
                f"attention has learned positions for puzzles of shape {tuple(config.shape)}, got "
                f"{tuple(inputs.shape[1:])}: use block='convolution' for other sizes"
            )
        if inputs.device.type == "cpu":  # on CUDA, where looking waits for the device, the embedding's kernel stops
            wrong = inputs[(inputs < 0) | (inputs >= config.num_symbols)]
            if wrong.numel():
                raise ValueError(f"symbols must be from 0 to {config.num_symbols - 1}, got {int(wrong[0])}")
        x: Tensor = self.mix(self.embedding(inputs).movedim(-1, 1))
        return x + self.position if config.block == "attention" else x

    def readout(self, state: Tensor) -> Tensor:
        return cast(Tensor, self.head(state))


class ExplicitReasoner(AbstractReasoner):
    """The baseline without an equilibrium: `config.num_layers` layers with weights of their own, evaluated once."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__(config)
        self.block = make_block(config)

    def forward(self, inputs: Tensor) -> ReasonerOutput:
        x = self.embed(inputs)
        return ReasonerOutput(self.readout(self.block(torch.zeros_like(x), x)), None, inputs.new_ones(len(inputs)))


class Reasoner(AbstractReasoner):
    """The equilibrium reasoner: the state is a fixed point of one block.

    Args:
        config: Sizes and block.
        solver: Solver of the fixed point, such as `MomentumSolver(max_steps=32)`.
        adjoint: Gradient rule, such as `ReversibleAdjoint()`.
        num_losses: Fixed-point correction: the parts of the solve, each with a loss in training; 1 for none.
        loss_decay: Weight of each part's loss over that of the next.
    """

    def __init__(
        self, config: ReasonerConfig, solver: Any, adjoint: Any, num_losses: int = 1, loss_decay: float = 0.8
    ) -> None:
        super().__init__(config)
        require_in_range("loss_decay", loss_decay, "(0, 1]")
        self.loss_decay = loss_decay
        self.equilibrium = EquilibriumLayer(make_block(config), solver=solver, adjoint=adjoint, num_parts=num_losses)

    def forward(self, inputs: Tensor, *, max_steps: int | None = None, z0: Tensor | None = None) -> ReasonerOutput:
        """Solve the puzzles.

        Args:
            inputs: Symbols, `(B, ...)`.
            max_steps: Solver steps; None: those of the solver in training, and `steps_for` otherwise.
            z0: Where the solve starts, `(B, C, ...)`; None: at zero.
        """
        x = self.embed(inputs)
        if max_steps is None and not self.training:
            max_steps = self.steps_for(inputs.shape[1:])
        solution = self.equilibrium(x, z0, **({} if max_steps is None else {"max_steps": max_steps}))
        steps = sum(part.stats.num_steps for part in (*solution.earlier, solution))
        evaluations = steps * self.equilibrium.solver.evaluations_per_step
        return ReasonerOutput(self.readout(solution.value), solution, evaluations)

    def steps_for(self, shape: Iterable[int]) -> int:
        """Solver steps for puzzles of this shape.

        `max_steps` at the training size; more for larger ones, in proportion to their cells to the power of
        `config.growth`.
        """
        ratio = math.prod(shape) / math.prod(self.config.shape)
        return cast(int, math.ceil(self.equilibrium.solver.max_steps * max(1.0, ratio) ** self.config.growth))

    def random_state(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A state of standard normal numbers, to start from."""
        shape = (len(inputs), self.config.channels, *inputs.shape[1:])
        return torch.randn(shape, generator=generator, device=inputs.device)

    @torch.no_grad()
    def answers_along(self, inputs: Tensor, evaluations: Sequence[int], max_steps: int | None = None) -> list[Tensor]:
        """Read out the answers of one solve after these numbers of evaluations of f, and at its end.

        Args:
            inputs: Symbols, `(B, ...)`.
            evaluations: Numbers of evaluations, ascending, without repetition. A solve that stops earlier, because
                all puzzles converged, has its final answers there.
            max_steps: As for `forward`.
        """
        wanted, found, made = set(evaluations), [], 0

        def look(block: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal made
            if made in wanted:
                found.append(self.readout(args[0]).argmax(1))
            made += 1

        with self.equilibrium.f.register_forward_pre_hook(look):
            last = self(inputs, max_steps=max_steps).logits.argmax(1)
        return [*found, *[last] * (len(evaluations) + 1 - len(found))]


def make_block(config: ReasonerConfig) -> nn.Module:
    """The f that `config.block` names."""
    if config.block == "convolution":
        return ConvolutionBlock(config)
    if config.block == "attention":
        return AttentionBlock(config)
    return own_block(config.block, config.channels, config.block_options)
