"""Fits of tiny models on groups of processes.

A scenario is `TASK-STRATEGY-RANKS-ACCUMULATION`; all have the same global batch of 8, and 10 optimizer steps.
"""

import collections
import contextlib
import functools
import logging
import warnings

import torch
from lightning import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from revdeq_lightning.callbacks.reconstruction_certificate import ReconstructionCertificate
from revdeq_lightning.data.images.augmentation import AugmentationConfig
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.distributed.strategies import EquilibriumDDP, EquilibriumFSDP2
from revdeq_lightning.models import ClassifierConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.processes import whole
from revdeq_lightning.runs.divergence import DivergenceGuard
from revdeq_lightning.runs.probe import _Float64 as Float64
from revdeq_lightning.runs.stop_signal import StopSignal
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig
from tests.helpers.processes import run_group
from tests.helpers.runs import MUON, tiny_data, tiny_task, tiny_trainer

half = functools.partial(EquilibriumDDP, compress_gradients=True)
STRATEGIES = {"one": lambda: "auto", "ddp": EquilibriumDDP, "half": half, "fsdp2": EquilibriumFSDP2}
GLOBAL_BATCH, NUM_STEPS = 8, 10


class Seen(Callback):
    """The samples that this process trained on, as sums that name them; the buffers that it evaluated with."""

    def __init__(self):
        self.sums, self.statistics = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sums.append([float(x.double().sum()) for x in batch[0]])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.statistics = [float(b.double().sum()) for b in pl_module.model.buffers()]


class Collectives(Callback):
    """Counts the collective operations of one step, which is no logging step."""

    step = 5

    def __init__(self):
        self.counts, self.watched = collections.Counter(), contextlib.ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.watched.close()
        if trainer.global_step == self.step - 1:
            self.watched.enter_context(_Counted(self.counts))


class _Counted(TorchDispatchMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith(("c10d", "_c10d")):
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class DoubleClassification(ClassificationTask):
    """In float64, images and loss too."""

    def training_step(self, batch, batch_idx):
        with Float64():
            batch = batch._replace(images=batch.images.double(), weights=batch.weights.double())
            return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch._replace(images=batch.images.double()), batch_idx)


def image_data(folder, batch_size):
    augmentation = AugmentationConfig(crop_padding=1, mixup_alpha=0.3)
    cache = str(folder / "cache")
    return ImageDataModule("digits", image_size=8, batch_size=batch_size, augmentation=augmentation, cache_dir=cache)


def image_task():
    torch.manual_seed(0)
    network = ClassifierConfig(num_classes=10, num_channels=1, channels=[16, 32])
    optimizer = OptimizerConfig(lr=5e-3, weight_decay=0.1, ema_decay=0.9)
    # The exact state is a multiple of 2^-32: weights that differ in the last bit of float64, as sums in another order
    # do, now and then differ in one such multiple after 10 steps.
    solver = SolverConfig(max_steps=3, arithmetic="float64")
    return DoubleClassification(network, solver, optimizer, channels_last=True)


def fit(folder, name):
    task_name, strategy, ranks, accumulation = name.split("-")
    batch_size = GLOBAL_BATCH // int(ranks) // int(accumulation)
    if task_name == "lm":
        data = tiny_data(folder, batch_size=batch_size)
        task = tiny_task(data, optimizer=MUON)
    else:
        data, task = image_data(folder, batch_size), image_task()
    task.double()
    before = [p.detach().clone() for p in task.parameters()]
    seen = Seen()
    settings = {"devices": int(ranks), "accumulate_grad_batches": int(accumulation), "max_steps": NUM_STEPS}
    settings |= {"val_check_interval": 7 * int(accumulation), "limit_val_batches": 40 // (batch_size * int(ranks))}
    collectives = Collectives()
    callbacks = [collectives, StopSignal(), ReconstructionCertificate(), seen, DivergenceGuard(folder)]
    trainer = tiny_trainer(folder, callbacks, strategy=STRATEGIES[strategy](), **settings)
    trainer.fit(task, data)
    weights = {key: whole(p.detach()).clone() for key, p in task.named_parameters()}
    moved = max(float((w - b).abs().max()) for w, b in zip(weights.values(), before, strict=True))
    figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
    result = {"weights": weights, "moved": moved, "figures": figures, "seen": seen.sums, "statistics": seen.statistics}
    result["collectives"] = dict(collectives.counts)
    torch.save(result, folder / f"{name}.{trainer.global_rank}.pt")


def prepare(folder):
    """The text; Lightning without its messages."""
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    numbers = torch.randint(97, 113, (4000,), generator=torch.Generator().manual_seed(0))
    # Long enough that 20 steps end within the first epoch: at its end a step may be made of fewer batches.
    (folder / "text.txt").write_text("".join(" " if i % 5 == 0 else chr(n) for i, n in enumerate(numbers.tolist())))


def main(folder, *names):
    prepare(folder)
    for name in names:
        run_group(int(name.split("-")[2]), fit, folder, name)
