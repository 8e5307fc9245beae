"""A Hugging Face GPT-2 block with random weights as f, trained with an exact gradient.

pip install transformers
python examples/gpt2_block.py

A block with pretrained weights goes in the same way: `GPT2Model.from_pretrained("gpt2").h[0]`.
"""

import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from revdeq_lightning import EquilibriumLayer, MomentumSolver


class Injected(nn.Module):
    """f(z, x) = norm(block(z + x)): the norm bounds the state, and x is injected in each evaluation."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.block = GPT2Block(config, layer_idx=0)
        self.norm = nn.LayerNorm(config.n_embd)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Evaluate f."""
        value = self.block(z + x)
        return self.norm(value[0] if isinstance(value, tuple) else value)


def main(num_steps: int = 201) -> tuple[float, float]:
    """Learn to repeat the token before the last one; return the first and the last loss."""
    torch.manual_seed(0)
    # Eager attention makes the same bits with and without autograd; dropout has one mask a solve.
    config = GPT2Config(n_embd=64, n_head=4, n_layer=1, attn_implementation="eager")
    embedding = nn.Embedding(8, config.n_embd)
    positions = nn.Parameter(0.02 * torch.randn(12, config.n_embd))
    layer = EquilibriumLayer(Injected(config), solver=MomentumSolver(max_steps=6))
    head = nn.Linear(config.n_embd, 8)
    parameters = [*embedding.parameters(), positions, *layer.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(num_steps):
        tokens = torch.randint(8, (64, 12))
        solution = layer(embedding(tokens) + positions)
        logits = head(solution.value)[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert solution.stats.reconstruction_mismatch == 0
        losses.append(float(loss.detach()))
        if step % 40 == 0:
            print(f"step {step:>3}: loss {losses[-1]:.3f}  mismatch 0")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
