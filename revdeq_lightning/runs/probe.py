"""Run the training step without side effects on the run."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torchmetrics import Metric, MetricCollection

from revdeq_lightning.equilibrium import (
    AbstractAdjoint,
    AbstractSolver,
    EquilibriumLayer,
    SolverStats,
    equilibria,
    settle_checks,
)
from revdeq_lightning.equilibrium.function import is_compiled
from revdeq_lightning.processes import is_sharded
from revdeq_lightning.runs.random_state import untouched_random_state
from revdeq_lightning.state import exchanged

Loss = Callable[[LightningModule, Any], Tensor]
Gradients = dict[str, Tensor]
Choice = tuple[AbstractSolver, AbstractAdjoint]
"""What a layer solves with."""

OWN_STATE = (Metric, MetricCollection)
"""Modules with more state than their buffers."""


@dataclasses.dataclass
class Probe:
    """Loss and gradients of some samples, without side effects.

    Afterwards, random generators, buffers, `.grad`, training modes, solvers, and adjoints are restored; nothing is
    logged, no torchmetrics metric is updated, and DDP is not involved. Parameters are read in place, not copied.
    Compiled functions run eagerly, because other sizes would cause recompilation.

    Attributes:
        trainer: Trainer whose precision applies.
        module: The model.
        batch: Samples, as the training step takes them.
        loss: `(module, batch) -> loss`; None for that of `training_step`.
        dropout: Whether dropout stays on.
    """

    trainer: Trainer
    module: LightningModule
    batch: Any
    loss: Loss | None = None
    dropout: bool = True
    stats: list[SolverStats] = dataclasses.field(default_factory=list)
    """Of the newest call's solves."""
    num_active: ClassVar[int] = 0
    """Those that run now, whose solves are no part of a training step."""

    def gradients(
        self, choose: Callable[[EquilibriumLayer], Choice] | None = None, *, float64: bool = False
    ) -> Gradients:
        """Gradient of the loss for every parameter that has one, by name; all calls draw the same random numbers.

        `choose` gives solver and adjoint of each layer. With `float64`, all floating-point numbers are float64, without
        autocast, even if the model requests float32.
        """

        def run() -> Gradients:
            names = [name for name, p in parameters.items() if p.requires_grad]
            found = torch.autograd.grad(self._loss(float64), [parameters[n] for n in names], allow_unused=True)
            settle_checks()
            return {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, found, strict=True)}

        # Separate leaves: the gradient reaches neither `.grad` nor the hooks of the original parameters.
        parameters = {
            name: _cast(p.detach(), float64).requires_grad_(p.requires_grad)
            for name, p in self.module.named_parameters()
        }
        buffers = {name: _cast(b.clone(), float64) for name, b in self.module.named_buffers()}
        self.stats = []
        with (
            self.untraced(),
            chosen_solvers(self.module, choose),
            self._watched(lambda *call: self.stats.append(call[-1].stats)),
        ):
            with _Float64() if float64 else nullcontext():
                found: Gradients = _call_with(self.module, parameters | buffers, run)
            return found

    @torch.no_grad()
    def solutions(self) -> list[tuple[EquilibriumLayer, Any, Any]]:
        """Each layer with its input x and returned state, in order of the calls."""
        seen: list[tuple[EquilibriumLayer, Any, Any]] = []

        def note(layer: Any, args: Any, kwargs: Any, solution: Any) -> None:
            seen.append((layer, args[0] if args else kwargs["x"], solution.value))

        buffers: dict[str, Tensor] = {name: b.clone() for name, b in self.module.named_buffers()}
        with self.untraced(), self._watched(note):
            _call_with(self.module, buffers, self._loss)
        settle_checks()
        return seen

    def precision(self) -> AbstractContextManager[None]:
        """As in a training step."""
        return self.trainer.precision_plugin.train_step_context()

    def _loss(self, float64: bool = False) -> Tensor:
        batch = apply_to_collection(self.batch, Tensor, _cast, float64)
        with nullcontext() if float64 else self.precision():
            output = self.loss(self.module, batch) if self.loss else self._training_step(batch)
        value = output["loss"] if isinstance(output, dict) else output
        if not isinstance(value, Tensor):
            raise TypeError(f"the training step must return a loss, or a dict with one, got {type(value).__name__}")
        return value

    def _training_step(self, batch: Any) -> Any:
        takes_index = len(inspect.signature(self.module.training_step).parameters) > 1
        return self.module.training_step(batch, 0) if takes_index else self.module.training_step(batch)

    @contextmanager
    def _watched(self, note: Callable[..., None]) -> Iterator[None]:
        """Call `note(layer, args, kwargs, solution)` after every solve."""
        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in equilibria(self.module)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Context in which calls of the module have no side effects."""
        modules = list(self.module.modules())
        metrics = [(m, name, c) for m in modules for name, c in m.named_children() if isinstance(c, OWN_STATE)]
        dropouts = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
        changes: list[Any] = [((vars(self.module), name), lambda *_, **__: None) for name in ("log", "log_dict")]
        changes += [((parent._modules, name), copy.deepcopy(metric)) for parent, name, metric in metrics]
        changes += [((vars(dropout), "training"), self.dropout) for dropout in dropouts]
        eager = torch.compiler.set_stance("force_eager") if is_compiled(self.module) else nullcontext()
        with eager, untouched_random_state(), exchanged(changes):
            Probe.num_active += 1
            try:
                yield
            finally:
                Probe.num_active -= 1


def batch_size(batch: Any) -> int:
    """First size of the first tensor."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(len(t)) if t.dim() else None)
    return sizes[0] if sizes else 1


def first_samples(batch: Any, num_samples: int) -> Any:
    """The first samples of a batch of tensors with a common first size; tensors of other sizes are unchanged."""
    size = batch_size(batch)
    return apply_to_collection(batch, Tensor, lambda t: t[:num_samples] if t.dim() and len(t) == size else t)


def reason_against(module: LightningModule, loss: Loss | None) -> str | None:
    """Reason why the module cannot be probed, or None."""
    if loss is None and not module.automatic_optimization:
        return (
            f"the training_step of {type(module).__name__} steps the optimizer itself (automatic_optimization=False):"
            " pass loss=function(module, batch)"
        )
    if sharded := next((name for name, p in module.named_parameters() if is_sharded(p)), None):
        return f"parameter {sharded!r} is sharded: use one device or DDP"
    return None


def chosen_solvers(
    module: nn.Module, choose: Callable[[EquilibriumLayer], Choice] | None
) -> AbstractContextManager[None]:
    """Context in which every layer has the chosen solver and adjoint."""
    changes: list[Any] = []
    for layer in equilibria(module) if choose else []:
        solver, adjoint = choose(layer)  # type: ignore[misc]
        changes += [((vars(layer), "solver"), solver), ((vars(layer), "adjoint"), adjoint)]
    return exchanged(changes)


def _call_with(module: nn.Module, tensors: dict[str, Tensor], run: Callable[[], Any]) -> Any:
    """`run()` with these tensors in place of the module's."""
    around = nn.Module()  # `functional_call` runs a module: one that owns this one, and runs
    around.module, around.forward = module, run
    return torch.func.functional_call(around, {f"module.{name}": tensor for name, tensor in tensors.items()}, ())


def _cast(tensor: Tensor, float64: bool) -> Tensor:
    return tensor.double() if float64 and tensor.is_floating_point() else tensor


class _Float64(TorchFunctionMode):
    """Replace float32 by float64, because a loss computed in float32 could not serve as a reference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args, kwargs = tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return func(*args, **kwargs)
