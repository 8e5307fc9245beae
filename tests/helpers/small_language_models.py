"""Small models of every kind, for tests."""

import torch

from revdeq_lightning.equilibrium import ReversibleAdjoint, ReversibleSolver
from revdeq_lightning.models import ExplicitTransformerLM, TransformerConfig, TransformerLM

SMALL = {"vocab_size": 23, "context_length": 12, "d_model": 16, "num_heads": 2, "loss_chunk_size": 7}
KINDS = ["paper", "modern", "two layers", "explicit"]


def make_model(kind, *, solver=None, adjoint=None, seed=0):
    """A small model with weights that all matter (the modern block starts with zeros)."""
    torch.manual_seed(seed)
    adjoint = adjoint or ReversibleAdjoint(mismatch="raise")
    solver = solver or ReversibleSolver(beta=0.8, max_steps=3)
    if kind == "explicit":
        model = ExplicitTransformerLM(TransformerConfig(**SMALL, num_layers=3))
    elif kind == "paper":
        model = TransformerLM(TransformerConfig(**SMALL, block="paper"), solver, adjoint)
    else:
        model = TransformerLM(TransformerConfig(**SMALL, num_layers=2 if kind == "two layers" else 1), solver, adjoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_batch(batch_size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SMALL["vocab_size"], (batch_size, SMALL["context_length"] + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    return tokens[:, :-1], targets
