"""Callbacks that make training diverge, to be named in a configuration."""

import math

import torch
from lightning.pytorch.callbacks import Callback


def poison_cotangent(layer, inputs, solution):
    solution.value.register_hook(lambda gradient: gradient * math.nan)


class Poison(Callback):
    """Puts NaN into one number of a process, in one step.

    what: "pixel" (diverges in the state), "label weight" (in the loss), "gradient", or "cotangent" (of an equilibrium's
    result: an implicit gradient's linear solve diverges, in the midst of the backward pass).
    """

    def __init__(self, what: str, step: int, rank: int = 0):
        self.what, self.step, self.rank = what, step, rank
        self.weights, self.handle = [], None

    def strikes(self, trainer, what, steps_made=False):
        here = trainer.global_rank == self.rank and trainer.global_step + (not steps_made) == self.step
        return self.what == what and here

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights = [p.detach().clone() for p in pl_module.parameters()]
        if self.strikes(trainer, "pixel"):
            batch.images[0, 0, 0, 0] = math.nan
        if self.strikes(trainer, "label weight"):
            batch.weights[0] = math.nan
        if self.strikes(trainer, "cotangent"):
            layer = pl_module.model.equilibria[0]
            self.handle = layer.register_forward_hook(poison_cotangent)

    def on_after_backward(self, trainer, pl_module):
        if self.strikes(trainer, "gradient"):
            next(pl_module.parameters()).grad.view(-1)[0] = math.nan

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.handle is not None:
            self.handle.remove()

    def on_validation_start(self, trainer, pl_module):
        if self.strikes(trainer, "weight", steps_made=True):
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] = math.nan

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.strikes(trainer, "validation pixel", steps_made=True):
            batch.images[0, 0, 0, 0] = math.nan

    def on_exception(self, trainer, pl_module, exception):
        kept = all(torch.equal(a, b) for a, b in zip(self.weights, pl_module.parameters(), strict=True))
        print(f"process {trainer.global_rank}: weights {'unchanged' if kept else 'changed'}", flush=True)
