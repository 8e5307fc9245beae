"""The core in plain PyTorch: fit a small function with an equilibrium layer, and check every gradient.

python examples/plain_pytorch.py
"""

import torch
from torch import Tensor, nn

from revdeq_lightning import EquilibriumLayer, MomentumSolver


class Block(nn.Module):
    """f(z, x): any module whose result has the shape of z."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Evaluate f."""
        return self.norm(torch.relu(self.linear(z)) + x)


def main() -> float:
    """Train and return the last loss."""
    torch.manual_seed(0)
    layer = EquilibriumLayer(Block(32), solver=MomentumSolver(max_steps=8))
    encoder, head = nn.Linear(2, 32), nn.Linear(32, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *layer.parameters(), *head.parameters()], lr=3e-3)
    inputs = torch.rand(512, 2) * 2 - 1
    targets = torch.sin(3 * inputs[:, :1]) * inputs[:, 1:]
    for step in range(201):
        solution = layer(encoder(inputs))
        loss = nn.functional.mse_loss(head(solution.value), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Filled in by the backward pass: elements of the start that did not come back.
        assert solution.stats.reconstruction_mismatch == 0
        if step % 50 == 0:
            residual = float(solution.stats.relative_residual.mean())
            print(f"step {step:>3}: loss {float(loss.detach()):.4f}  residual {residual:.1e}  mismatch 0")
    return float(loss.detach())


if __name__ == "__main__":
    main()
