"""A LightningModule that knows nothing of this project's tasks, around equilibrium layers; and what watches it."""

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from revdeq_lightning.equilibrium import EquilibriumLayer, MomentumSolver

NUM_INPUTS, DIM, NUM_CLASSES = 5, 6, 3


class CountingBlock(nn.Module):
    """`f(z, x) = dropout(tanh(W z + x))`, which counts its calls; `offset` makes it another function."""

    def __init__(self, dim: int = DIM, scale: float = 0.4, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.linear.weight, std=scale / dim**0.5)
        self.dropout = nn.Dropout(dropout)
        self.calls, self.offset = 0, 0.0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(torch.tanh(self.linear(z) + x + self.offset))


class Stranger(LightningModule):
    """Encoder with BatchNorm, equilibria one after the other, dropout, head; returns nothing but the loss."""

    def __init__(self, *solvers, adjoint=None, dropout=0.0, scale=0.4, lr=0.02, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.lr = lr
        self.encoder = nn.Sequential(nn.Linear(NUM_INPUTS, DIM), nn.BatchNorm1d(DIM))
        self.layers = nn.ModuleList(
            EquilibriumLayer(CountingBlock(scale=scale, dropout=dropout), solver=solver, adjoint=adjoint)
            for solver in solvers or [MomentumSolver(max_steps=4)]
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(DIM, NUM_CLASSES)
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        h = self.encoder(inputs)
        for layer in self.layers:
            h = layer(h).value
        return self.head(self.dropout(h))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    @property
    def calls(self) -> int:
        return sum(layer.f.calls for layer in self.layers)


class Validated(Stranger):
    """With a validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))


class StepByStep(Callback):
    """Losses, random numbers and gradients of every batch, of this process."""

    def __init__(self):
        self.losses, self.draws, self.gradients = [], [], []

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.draws.append(torch.rand(()).item())


def loader(num_samples=48, batch_size=8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(num_samples, NUM_INPUTS, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()), batch_size)


def trainer(folder, callbacks=(), **settings) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"max_steps": 6, "log_every_n_steps": 2, "accelerator": "cpu", "devices": 1} | quiet | settings
    settings = {"logger": CSVLogger(folder, name="", version="logs")} | settings
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)


def state(trainer: Trainer) -> dict:
    """All that a run leaves: weights, buffers, optimizer, loops, callbacks' own."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


class Spy(TorchDispatchMode):
    """Counts what reads a tensor's values on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "masked_select",
            "item",
        )
        return func(*args, **(kwargs or {}))
