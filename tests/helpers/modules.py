"""Models, tasks of others, and callbacks that disturb."""

import csv
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from revdeq_lightning.callbacks.contraction import Contraction
from revdeq_lightning.callbacks.cost import Cost
from revdeq_lightning.callbacks.depth_sweep import DepthSweep
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.callbacks.gradient_error import GradientError
from revdeq_lightning.callbacks.reconstruction_certificate import ReconstructionCertificate
from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.callbacks.samples import ImageSamples, TextSamples
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.equilibrium import EquilibriumLayer, MomentumSolver, ReversibleAdjoint, ReversibleSolver
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.models import ClassifierConfig, ExplicitTransformerLM, TransformerConfig, TransformerLM
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.runs.random_state import ResumableRandomState
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig
from tests.helpers.data import image_folder
from tests.helpers.runs import tiny_data, tiny_task

# Small models of every kind, for tests.


SMALL = {"vocab_size": 23, "context_length": 12, "d_model": 16, "num_heads": 2, "loss_chunk_size": 7}
KINDS = ["paper", "modern", "two layers", "around", "explicit"]
AROUND = {"num_prelude_layers": 1, "num_coda_layers": 1}


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
        options = {"two layers": {"num_layers": 2}, "around": AROUND}.get(kind, {})
        model = TransformerLM(TransformerConfig(**SMALL, **options), solver, adjoint)
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


# A LightningModule that knows nothing of this project's tasks, around equilibrium layers; and what watches it.


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


def sums(module, batch):
    """What an evaluation adds up, for `DepthSweep`."""
    logits = module(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1], reduction="sum"), "count": torch.tensor(len(batch[1]))}


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


# Callbacks that make training diverge, to be named in a configuration.


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


# All callbacks that watch, each as often as it can, on tiny tasks; files and weights of the runs.


def language(folder: Path):
    data = tiny_data(folder)
    return tiny_task(data), data


def classifier(folder: Path):
    """Two equilibria; BatchNorm before and behind them."""
    data = ImageDataModule(
        "folder", path=str(image_folder(folder)), image_size=16, batch_size=8, cache_dir=str(folder / "cache"), seed=3
    )
    data.prepare_data()
    torch.manual_seed(0)
    network = ClassifierConfig(num_classes=3, channels=[16, 16], stem_stride=2)
    solver = SolverConfig(max_steps=2, mismatch="raise")
    return ClassificationTask(network, solver, OptimizerConfig(lr=0.01, ema_decay=0.9)), data


def watching(every: int, validations: int) -> list:
    return [
        Cost(peak_flops=1e12),
        FunctionEvaluations(),
        ReconstructionCertificate("raise"),
        GradientError(every),
        Contraction(every, num_iterations=3, warn_at=100.0),
        ResidualCurve(every),
        DepthSweep(every_n_validations=validations),
        TextSamples(["a", "b c"], max_new_tokens=20, every_n_validations=validations),
        ImageSamples(num_images=5, every_n_validations=validations),
    ]


def whole_set(task, every: int = 2, validations: int = 1) -> list:
    """Without those of the other task."""
    other = ImageSamples if hasattr(task, "sample_text") else TextSamples
    return [callback for callback in watching(every, validations) if not isinstance(callback, other)]


def fit_whole_set(folder: Path, make, callbacks, ckpt_path=None, **settings):
    """Losses and random numbers of each step, and all that the run leaves."""
    task, data = make(folder)
    notes = StepByStep()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    run = Trainer(
        callbacks=[*callbacks(task), ResumableRandomState(), notes],
        logger=ContinuedCSVLogger(folder / "run"),
        **quiet
        | {"accelerator": "cpu", "devices": 1, "max_steps": 6, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
        | {"val_check_interval": 3, "check_val_every_n_epoch": None}
        | settings,
    )
    for logger in run.loggers:
        if ckpt_path:
            logger.rewind(torch.load(ckpt_path, weights_only=True)["global_step"])
    run.fit(task, data, ckpt_path=ckpt_path)
    return notes, run


def table(path: Path, without: str = "system/") -> list[dict[str, str]]:
    """Rows of a CSV file, but for the columns that hold times."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if v and not k.startswith(without)} for row in csv.DictReader(file)]
