"""Train until budgets of FLOPs, steps, and CPU time of one thread are spent; one run gives the quality at each.

The learning rate is constant after its warm-up and the evaluated weights are a moving average. No schedule depends on
the end of the run, so the same run can be evaluated at any cost.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import yaml
from lightning import Callback, LightningModule, Trainer, seed_everything
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import peak_tensor_bytes
from revdeq_lightning.equilibrium import DivergenceError, equilibria
from revdeq_lightning.runs.probe import Probe
from revdeq_lightning.tasks.averaged_weights import AveragedWeights

ROOT = Path(__file__).resolve().parents[2]
COUNT_EVERY = 50
"""Steps between two counts of a step's FLOPs, which change with f if the solver has a tolerance."""
RATES = ("lr", "embedding_lr", "muon_lr")


class Budget(NamedTuple):
    """Budgets of a run, which ends when all finite ones are spent, or after `longest` CPU seconds."""

    cpu_seconds: float
    flops: float
    longest: float
    num_points: int = 8
    """Number of points of the curve, equally spaced in `cpu_seconds`; 0: no curve and no depths."""
    steps: float = math.inf


@dataclasses.dataclass
class Outcome:
    """Outcome of a run.

    Attributes:
        at: Figure on the whole validation split when the budget of that name, "cpu", "flops", or "steps", was spent.
        spent: CPU seconds, FLOPs, and steps at that moment.
        curve: CPU seconds, FLOPs, steps, and the figure on a part of the split.
        depths: Number of evaluations of f and the final figure with it, on a part of the split.
        forward_nfe: Mean evaluations of f in the forward pass of a training step.
        peak_bytes: Peak of the tensors of one training step.
        diverged: Whether the loss became non-finite; figures not reached are then `nan`.
    """

    parameters: int = 0
    forward_nfe: float = 0.0
    peak_bytes: int = 0
    at: dict[str, Any] = dataclasses.field(default_factory=dict)
    spent: dict[str, tuple[float, float, int]] = dataclasses.field(default_factory=dict)
    curve: list[tuple[float, float, int, float]] = dataclasses.field(default_factory=list)
    depths: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    diverged: bool = False


class FlopCount(TorchDispatchMode):
    """Count FLOPs of matrix products and convolutions by PyTorch's formulas, including inner backward passes.

    `FlopCounterMode` tracks modules with hooks that do not work with an `autograd.grad` inside a backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def step_flops(run: Callable[[], Any]) -> int:
    """FLOPs of `run`; attention as plain matrix products, for which every version of PyTorch has formulas."""
    with sdpa_kernel(SDPBackend.MATH), FlopCount() as count:
        run()
    return count.total


class Meter(Callback):
    """Count the cost of the training steps, evaluate when a budget is spent, and end the run.

    The clock is the CPU time of this process from the end of one batch to the end of the next, including data loading.
    It stops during evaluations.
    """

    def __init__(self, budget: Budget, evaluate: Callable[[LightningModule, bool], Any]) -> None:
        self.budget, self.evaluate = budget, evaluate
        self.outcome = Outcome()
        self.seconds = self.flops = 0.0
        self.steps = 0
        budgets = {"cpu": budget.cpu_seconds, "flops": budget.flops, "steps": budget.steps}
        self._budgets = {name: value for name, value in budgets.items() if math.isfinite(value)}
        self._flops_a_step = 0
        self._nfe = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.outcome.parameters = sum(p.numel() for p in pl_module.parameters())
        self._since = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.process_time() - self._since
        if self.steps % COUNT_EVERY == 0:
            self._count(trainer, pl_module, batch)
        self.steps += 1
        self.flops += self._flops_a_step
        self._nfe += sum(s.forward_nfe for s in outputs["step"].stats)
        self.outcome.diverged = not bool(torch.isfinite(outputs["loss"]))
        if not self.outcome.diverged:
            self._look(trainer, pl_module)
        is_spent = self.outcome.at.keys() == self._budgets.keys()
        if self.outcome.diverged or is_spent or self.seconds >= self.budget.longest:
            trainer.should_stop = True
        self._since = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate with depths other than in training."""
        self.outcome.forward_nfe = self._nfe / self.steps
        if self.outcome.diverged or not self.budget.num_points:
            return
        with _averaged(trainer, pl_module):
            for evaluations in (1, 2, 4, 8, 16) if equilibria(pl_module) else (1,):
                with _depth(pl_module, evaluations) as possible:
                    if possible:
                        self.outcome.depths.append((evaluations, self.evaluate(pl_module, False)))

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        probe = Probe(trainer, pl_module, batch)
        self._flops_a_step = step_flops(probe.gradients)
        if self.steps in (0, COUNT_EVERY):  # the first one allocates what is kept
            self.outcome.peak_bytes = peak_tensor_bytes(probe.gradients)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        spent = {"cpu": self.seconds, "flops": self.flops, "steps": self.steps}
        due = [name for name, end in self._budgets.items() if spent[name] >= end and name not in self.outcome.at]
        share = self.seconds / self.budget.cpu_seconds
        is_point = share * self.budget.num_points >= len(self.outcome.curve) + 1
        if not due and not is_point:
            return
        now = (self.seconds, self.flops, self.steps)
        with _averaged(trainer, pl_module):
            if due:
                figure = self.evaluate(pl_module, True)
                self.outcome.at |= dict.fromkeys(due, figure)
                self.outcome.spent |= dict.fromkeys(due, now)
            if is_point:
                self.outcome.curve.append((*now, self.evaluate(pl_module, False)))


@contextmanager
def _averaged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Context for evaluation as in a validation: averaged weights, evaluation mode, no gradients."""
    averages: list[Any] = [c for c in trainer.callbacks if isinstance(c, AveragedWeights)]  # type: ignore[attr-defined]
    for callback in averages:
        callback.on_validation_start(trainer, module)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()
        for callback in averages:
            callback.on_validation_end(trainer, module)


@contextmanager
def _depth(module: LightningModule, evaluations: int) -> Iterator[bool]:
    """Context in which every equilibrium makes this many evaluations of f, ignoring tolerances; yields if it can."""
    layers = equilibria(module)
    own = [layer.solver for layer in layers]
    if any(evaluations % solver.evaluations_per_step for solver in own):
        yield False
        return
    for layer, solver in zip(layers, own, strict=True):
        steps = evaluations // solver.evaluations_per_step
        layer.solver = dataclasses.replace(solver, max_steps=steps, rtol=0.0, atol=0.0)
    try:
        yield True
    finally:
        for layer, solver in zip(layers, own, strict=True):
            layer.solver = solver


def settings_of(configs: Sequence[str], changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Configuration files, each overriding the previous ones, with some settings changed by their dotted names."""
    merged = OmegaConf.merge(*(OmegaConf.create(yaml.safe_load((ROOT / path).read_text())) for path in configs))
    settings: Any = OmegaConf.to_container(merged)
    for key, value in changes.items():
        place = settings
        *path, last = key.split(".")
        for name in path:
            place = place[name]
        place[last] = value
    return settings


def scaled(optimizer: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Optimizer settings with every learning rate times `rate`, constant after the warm-up."""
    rates = {name: optimizer[name] * rate for name in RATES if optimizer.get(name) is not None}
    return {**optimizer, **rates, "schedule": "constant"}


def spend(
    make: Callable[[], tuple[LightningModule, Any]],
    evaluate: Callable[[LightningModule, Any, bool], Any],
    budget: Budget,
    seed: int,
    clip: float | None = None,
) -> Outcome:
    """Train the task and data that `make()` returns until the budget is spent.

    Args:
        make: Called after the seed is set.
        evaluate: `(task, data, whole)` returns the figure on the whole validation split or on a part of it.
        budget: Budget of the run.
        seed: Seed of the weights.
        clip: Largest norm of the gradient.
    """
    seed_everything(seed, verbose=False)
    task, data = make()
    meter = Meter(budget, lambda module, whole: evaluate(module, data, whole))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=-1,
        max_epochs=-1,
        logger=False,
        callbacks=[meter],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        gradient_clip_val=clip,
    )
    try:
        trainer.fit(task, data)
    except DivergenceError:
        meter.outcome.diverged = True
    return meter.outcome
