"""Image classifiers: one equilibrium per resolution, or one over all resolutions, and a linear readout.

    x_1 = stem(images),    z_i = f_i(z_i, x_i) by a solver from 0,    x_{i+1} = down_i(x_i + z_i)
    logits = head(mean(x_n + z_n))

`PaperSingleClassifier` and `PaperStagesClassifier` are the released architectures of arXiv:2509.12917 (same
parameters), `StagesClassifier` is ours, and `JointClassifier` solves all resolutions as one state, like multiscale DEQ
(MDEQ). `ResNet` is the baseline without an equilibrium.

Shape suffixes: B batch, C channels, H height, W width, V classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from revdeq_lightning.equilibrium import EquilibriumLayer, SolverStats
from revdeq_lightning.models.config import ClassifierConfig
from revdeq_lightning.models.own_block import own_block

PAPER_GROUP_SIZE, PAPER_POOL_SIZE, PAPER_BATCH_NORM_MOMENTUM = 16, 4, 0.01


class ClassifierOutput(NamedTuple):
    """Logits, and statistics of each solve (none without a solver)."""

    logits_BV: Tensor
    stats: tuple[SolverStats, ...]


def stage_solvers(config: ClassifierConfig, solver: Any) -> list[Any]:
    """The solver of each stage, with the steps of `config.steps` if given."""
    steps = config.steps or [solver.max_steps] * len(config.channels)
    return [dataclasses.replace(solver, max_steps=n) for n in steps]


def conv3x3(num_in: int, num_out: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the size (except for the stride)."""
    return nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)


def group_norm(channels: int, group_size: int = PAPER_GROUP_SIZE) -> nn.GroupNorm:
    """GroupNorm with this group size, or one group (size 0, or few channels); without running statistics."""
    return nn.GroupNorm(max(1, channels // (group_size or channels)), channels)


def mean_pool(x_BCHW: Tensor) -> Tensor:
    """Mean over the positions, in float32 or better."""
    return x_BCHW.flatten(2).mean(-1)


class PaperConvBlock(nn.Module):
    """`f(z, x) = norm3(relu(z + norm2(x + conv2(relu(norm1(conv1(z)))))))`.

    Source: github.com/sammccallum/reversible-deq, experiments/vision.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(channels, width * channels), conv3x3(width * channels, channels)
        groups = max(1, channels // PAPER_GROUP_SIZE)
        self.norm1 = nn.GroupNorm(width * groups, width * channels)
        self.norm2, self.norm3 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)

    def forward(self, z_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv2(F.relu(self.norm1(self.conv1(z_BCHW))))
        return cast(Tensor, self.norm3(F.relu(z_BCHW + self.norm2(x_BCHW + h_BCHW))))


class ModernConvBlock(nn.Module):
    """`f(z, x) = norm3(h + conv2(silu(norm2(conv1(silu(norm1(h)))))))`, `h = z + x`; conv2 is initialized to zero.

    The last norm keeps the state at unit scale, so that it contracts. Dropout uses one mask per solve.
    """

    def __init__(self, channels: int, width: int, dropout: float, group_size: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(channels, width * channels), conv3x3(width * channels, channels)
        sizes = (channels, width * channels, channels)
        self.norm1, self.norm2, self.norm3 = (group_norm(c, group_size) for c in sizes)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, z_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        h_BCHW = z_BCHW + x_BCHW
        a_BCHW = F.silu(self.norm2(self.conv1(F.silu(self.norm1(h_BCHW)))))
        return cast(Tensor, self.norm3(h_BCHW + self.conv2(self.dropout(a_BCHW))))


def make_block(config: ClassifierConfig, stage: int) -> nn.Module:
    """Build f for one resolution."""
    channels, width = config.channels[stage], config.widths[stage]
    if config.block == "paper" or config.architecture.startswith("paper"):
        return PaperConvBlock(channels, width)
    if config.block == "modern":
        return ModernConvBlock(channels, width, config.dropout, config.group_size)
    return own_block(config.block, channels, config.block_options)


class PreActDownsample(nn.Module):
    """`conv2(relu(norm2(conv1(relu(norm1(x)))))) + residual_conv(x)` at half the resolution, BatchNorm."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_in, momentum=PAPER_BATCH_NORM_MOMENTUM)
        self.norm2 = nn.BatchNorm2d(num_out, momentum=PAPER_BATCH_NORM_MOMENTUM)
        self.conv1, self.conv2 = conv3x3(num_in, num_out, stride=2), conv3x3(num_out, num_out)
        self.residual_conv = nn.Conv2d(num_in, num_out, 1, stride=2, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.relu(self.norm1(x_BCHW)))
        return cast(Tensor, self.conv2(F.relu(self.norm2(h_BCHW))) + self.residual_conv(x_BCHW))


class Downsample(nn.Sequential):
    """`conv(silu(norm(x)))` at half the resolution."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(nn.BatchNorm2d(num_in), nn.SiLU(), conv3x3(num_in, num_out, stride=2))


class AbstractClassifier(nn.Module):
    """Readout and interface around a map from images to features."""

    head: nn.Linear

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def features(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[SolverStats, ...]]:
        """Input of the head, shape `(B, head.in_features)`, and statistics."""

    def forward(self, images_BCHW: Tensor) -> ClassifierOutput:
        """Logits of normalized images.

        Raises:
            ValueError: If the images are not floating-point of shape `(B, num_channels, H, W)`.
        """
        if images_BCHW.dim() != 4 or images_BCHW.shape[1] != self.config.num_channels:
            raise ValueError(
                f"images must have shape (B, {self.config.num_channels}, H, W), got {tuple(images_BCHW.shape)}: set "
                "num_channels to that of the data"
            )
        if not images_BCHW.is_floating_point():
            raise ValueError(f"images must be normalized floating-point tensors, got {images_BCHW.dtype}")
        features, stats = self.features(images_BCHW)
        return ClassifierOutput(self.head(features), stats)

    @property
    def output_weight_VD(self) -> Tensor:
        return self.head.weight


class PaperSingleClassifier(AbstractClassifier):
    """Released single-scale classifier: one equilibrium at full resolution."""

    def __init__(self, config: ClassifierConfig, solver: Any, adjoint: Any) -> None:
        super().__init__(config)
        (channels,) = config.channels
        (layer_solver,) = stage_solvers(config, solver)
        self.stem = nn.Conv2d(config.num_channels, channels, 3, padding=1)
        self.stem_norm = group_norm(channels)
        self.equilibrium = EquilibriumLayer(make_block(config, 0), solver=layer_solver, adjoint=adjoint)
        self.pool = nn.AdaptiveAvgPool2d(PAPER_POOL_SIZE)
        self.head = nn.Linear(channels * PAPER_POOL_SIZE**2, config.num_classes)

    def features(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[SolverStats, ...]]:
        solution = self.equilibrium(self.stem_norm(self.stem(images_BCHW)))
        return self.pool(solution.value).flatten(1), (solution.stats,)


class AbstractStagesClassifier(AbstractClassifier):
    """One equilibrium per resolution, `x = x + z`, with downsampling in between."""

    def __init__(
        self, config: ClassifierConfig, solver: Any, adjoint: Any, stem: nn.Module, downsample: Any, final: nn.Module
    ) -> None:
        super().__init__(config)
        self.stem = stem
        self.equilibria = nn.ModuleList(
            EquilibriumLayer(make_block(config, i), solver=stage_solver, adjoint=adjoint)
            for i, stage_solver in enumerate(stage_solvers(config, solver))
        )
        self.downsamples = nn.ModuleList(downsample(a, b) for a, b in itertools.pairwise(config.channels))
        self.drop = StochasticDepth(config.stochastic_depth, "row")
        self.final = final
        self.head = nn.Linear(config.channels[-1], config.num_classes)

    def features(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[SolverStats, ...]]:
        x_BCHW, stats = self.stem(images_BCHW), []
        for i, equilibrium in enumerate(self.equilibria):
            x_BCHW = x_BCHW if i == 0 else self.downsamples[i - 1](x_BCHW)
            solution = equilibrium(x_BCHW)
            x_BCHW = x_BCHW + self.drop(solution.value)
            stats.append(solution.stats)
        return mean_pool(self.final(x_BCHW)), tuple(stats)


class PaperStagesClassifier(AbstractStagesClassifier):
    """Released multi-scale classifier."""

    def __init__(self, config: ClassifierConfig, solver: Any, adjoint: Any) -> None:
        norm = nn.BatchNorm2d(config.channels[0], momentum=PAPER_BATCH_NORM_MOMENTUM)
        stem = nn.Sequential(conv3x3(config.num_channels, config.channels[0]), norm, nn.ReLU())
        super().__init__(config, solver, adjoint, stem, PreActDownsample, nn.Identity())


class StagesClassifier(AbstractStagesClassifier):
    """Our classifier for images of any size: `stem_stride` 1 or 2 for 32x32, 4 for 224x224."""

    def __init__(self, config: ClassifierConfig, solver: Any, adjoint: Any) -> None:
        final = nn.Sequential(nn.BatchNorm2d(config.channels[-1]), nn.SiLU())
        super().__init__(config, solver, adjoint, modern_stem(config), Downsample, final)


def modern_stem(config: ClassifierConfig) -> nn.Module:
    """A convolution with overlapping kernels: 3x3 for stride 1 and 2, 7x7 for stride 4."""
    size = 3 if config.stem_stride < 4 else 2 * config.stem_stride - 1
    convolution = nn.Conv2d(
        config.num_channels, config.channels[0], size, config.stem_stride, padding=size // 2, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(config.channels[0]))


class JointBlock(nn.Module):
    """All resolutions at once: a residual block in each, then the normalized sum of all, resampled to each.

        h_i = block_i(z_i, x_i),    f(z, x)_i = norm_i(sum_j resample_ji(h_j))

    Source: Bai, Koltun, Kolter 2020, arXiv:2006.08656 (MDEQ).
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        channels = config.channels
        n = len(channels)
        self.blocks = nn.ModuleList(make_block(config, i) for i in range(n))
        pairs = itertools.permutations(range(n), 2)
        self.resample = nn.ModuleDict(
            {f"{j}to{i}": resampling(channels[j], channels[i], i - j, config.group_size) for j, i in pairs}
        )
        self.norms = nn.ModuleList(group_norm(c, config.group_size) for c in channels)

    def forward(self, z: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = [block(z_i, x_i) for block, z_i, x_i in zip(self.blocks, z, x, strict=True)]
        out = []
        for i, norm in enumerate(self.norms):
            others = [self.resample[f"{j}to{i}"](h[j]) for j in range(len(h)) if j != i]
            # If the finer resolution has an odd size, doubling gives one row and column too many.
            out.append(norm(h[i] + sum(other[..., : h[i].shape[-2], : h[i].shape[-1]] for other in others)))
        return tuple(out)


def resampling(num_in: int, num_out: int, halvings: int, group_size: int) -> nn.Module:
    """Halve the resolution by stride-2 convolutions, or (negative) double it by repeating pixels."""
    if halvings < 0:
        upsample = nn.Upsample(scale_factor=2**-halvings, mode="nearest")
        return nn.Sequential(nn.Conv2d(num_in, num_out, 1, bias=False), group_norm(num_out, group_size), upsample)
    strided = [conv3x3(num_in, num_out if k == halvings - 1 else num_in, stride=2) for k in range(halvings)]
    return nn.Sequential(*strided, group_norm(num_out, group_size))


class JointClassifier(AbstractClassifier):
    """One equilibrium whose state is a tuple with a tensor per resolution."""

    def __init__(self, config: ClassifierConfig, solver: Any, adjoint: Any) -> None:
        super().__init__(config)
        channels = config.channels
        self.stem = modern_stem(config)
        self.downsamples = nn.ModuleList(Downsample(a, b) for a, b in itertools.pairwise(channels))
        self.equilibrium = EquilibriumLayer(JointBlock(config), solver=solver, adjoint=adjoint)
        self.final = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.SiLU()) for c in channels)
        self.head = nn.Linear(sum(channels), config.num_classes)

    def features(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[SolverStats, ...]]:
        x = [self.stem(images_BCHW)]
        for downsample in self.downsamples:
            x.append(downsample(x[-1]))
        solution = self.equilibrium(tuple(x), tuple(x_i.new_zeros(x_i.shape) for x_i in x))
        pooled = [mean_pool(final(a + z)) for final, a, z in zip(self.final, x, solution.value, strict=True)]
        return torch.cat(pooled, dim=1), (solution.stats,)


class BasicBlock(nn.Module):
    """`relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))`, BatchNorm.

    Source: He, Zhang, Ren, Sun 2015, arXiv:1512.03385.
    """

    def __init__(self, num_in: int, num_out: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(num_in, width * num_out, stride), conv3x3(width * num_out, num_out)
        self.norm1, self.norm2 = nn.BatchNorm2d(width * num_out), nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_BCHW)))))
        return F.relu(h_BCHW + self.shortcut(x_BCHW))


class ResNet(AbstractClassifier):
    """`config.blocks` basic blocks per stage; with channels 64, 128, 256, 512 and 2 blocks each, it is ResNet-18."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        channels = config.channels
        self.stem = nn.Sequential(*modern_stem(config).children(), nn.ReLU())
        sizes = [(channels[0], channels[0], 1), *((a, b, 2) for a, b in itertools.pairwise(channels))]
        blocks: list[nn.Module] = []
        for (num_in, num_out, stride), num_blocks, width in zip(
            sizes, config.blocks or [2] * len(channels), config.widths, strict=True
        ):
            blocks.append(BasicBlock(num_in, num_out, width, stride))
            blocks.extend(BasicBlock(num_out, num_out, width, 1) for _ in range(num_blocks - 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], config.num_classes)

    def features(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[SolverStats, ...]]:
        return mean_pool(self.blocks(self.stem(images_BCHW))), ()


CLASSIFIERS: dict[str, Any] = {
    "stages": StagesClassifier,
    "joint": JointClassifier,
    "paper_single": PaperSingleClassifier,
    "paper_stages": PaperStagesClassifier,
}


def build_classifier(config: ClassifierConfig, solver: Any, adjoint: Any) -> AbstractClassifier:
    """Build the classifier selected by `config.architecture`.

    Args:
        config: Sizes and architecture.
        solver: Solver of every equilibrium; `config.steps` sets its steps in each stage.
        adjoint: Gradient rule of every equilibrium.
    """
    return cast(AbstractClassifier, CLASSIFIERS[config.architecture](config, solver, adjoint))
