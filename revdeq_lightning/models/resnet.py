"""The baseline without an equilibrium: a residual network with the stem, sizes, and readout of the classifiers."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from revdeq_lightning.equilibrium import SolverStats
from revdeq_lightning.models.classifier import AbstractClassifier, conv3x3, mean_pool, modern_stem
from revdeq_lightning.models.config import ClassifierConfig


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
