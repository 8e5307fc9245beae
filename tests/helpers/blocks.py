"""Maps f(z, x) for the tests: none of them is made to contract."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """Pre-norm transformer block on the state, `(batch, time, dim)`; the state grows with every evaluation."""

    def __init__(self, dim: int = 32, num_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        batch, time, dim = z.shape
        qkv = self.qkv(self.norm1(z + x)).view(batch, time, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, dim)
        z = z + self.dropout(self.out(attended))
        return z + self.dropout(self.down(F.gelu(self.up(self.norm2(z)))))


class ConvBlock(nn.Module):
    """The paper's residual layer, `(batch, channels, height, width)`."""

    def __init__(self, channels: int = 16, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, channels) for _ in range(3))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = self.conv2(torch.relu(self.norm1(self.conv1(z))))
        return self.norm3(torch.relu(z + self.norm2(x + inner)))


def gradients(value: Tensor, *sources: Tensor) -> Tensor:
    """Gradient of a fixed random projection of `value`, flattened into one float64 vector."""
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(value.dtype)
    grads = torch.autograd.grad((value * weight).sum(), sources)
    return torch.cat([g.flatten().double() for g in grads])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    value, reference = value.detach(), reference.detach()
    return float((value - reference).norm() / reference.norm())
