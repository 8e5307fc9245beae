"""Your own block as f of the language model, by its import path in YAML (`block: own_block.Mixer`).

python examples/own_block.py [--trainer.max_steps=100 ...]
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """f(z, x): the running mean of earlier tokens, and an MLP.

    Args:
        width: Size of the state, `model.network.d_model`.
        expansion: Width of the MLP over that of the state, from `model.network.block_options`.
    """

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Evaluate f; a token may depend on itself and on earlier ones only."""
        counts = torch.arange(1, z.shape[1] + 1, device=z.device)[:, None]
        mean = self.mix(z).cumsum(1) / counts
        return self.norm(x + mean + self.down(torch.relu(self.up(z))))


if __name__ == "__main__":
    from revdeq_lightning.__main__ import run

    here = Path(__file__).resolve().parent
    sys.argv = ["revdeq", "fit", "--config", str(here / "own_block.yaml"), *sys.argv[1:]]
    run()
