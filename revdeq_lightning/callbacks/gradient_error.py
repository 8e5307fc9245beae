"""How far the gradient that trains the model is from the exact one."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from revdeq_lightning.callbacks.abstract import AbstractProbing
from revdeq_lightning.equilibrium import (
    AndersonSolver,
    BackpropAdjoint,
    DivergenceError,
    EquilibriumLayer,
    ImplicitAdjoint,
)
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.runs.probe import Choice, Gradients, Loss, Probe, first_samples

REFERENCES = ("bptt", "converged")


class GradientError(AbstractProbing):
    """Compares the gradient of the active adjoint with two references, on the first samples of a batch.

    * `bptt`: the same iteration, differentiated by backpropagation. The difference is the error of the adjoint.
    * `converged`: the gradient at the fixed point, by the implicit function theorem, after the same solver has
      continued to a tolerance. The difference is what stopping early costs, not an error of the adjoint.

    It needs memory for the iterates of the samples and for the parameters' gradients twice, with `float64` also for a
    copy of the parameters. On a CPU, at the sizes of configs/lm/default.yaml and configs/cifar10/cpu.yaml, a comparison
    took 0.2 to 0.8 training steps, with `float64` 0.8 to 2.9: at the default interval less than 0.2 % and 0.6 % of the
    time. For assumptions and errors see `AbstractProbing`.

    Keys, logged at these steps only, over the samples of all processes; REFERENCE is `bptt` or `converged`:

    * `gradient_error/REFERENCE/relative_l2`: `norm(g - reference) / norm(reference)`, over all parameters.
    * `gradient_error/REFERENCE/cosine`: of the angle between them.
    * `gradient_error/REFERENCE/GROUP/relative_l2` and `.../cosine`: the same for a group of parameters.
    * `gradient_error/converged/relative_residual`: the largest residual at the end of that reference's solves, forward
      and backward. It shows how far the reference can be trusted.

    A group whose reference is 0 is left out, as is `converged` where its solves diverge (with one warning).

    Args:
        every_n_steps: Optimizer steps from one comparison to the next.
        num_samples: Samples of each process; at least 2 where BatchNorm trains.
        references: One or both of them.
        float64: Whether to compute the references in float64, from the same parameters and without autocast. Dropout is
            then off in all gradients, as its masks would differ.
        max_steps: Largest number of steps of the solvers of `converged`.
        rtol: Their tolerance; None: 1e-5, and 1e-9 with `float64`.
        group: Maps a parameter's name to the name of its group; None: `default_group`.
        loss: `(module, batch) -> loss`; None: that of the training step.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        *,
        num_samples: int = 2,
        references: tuple[str, ...] = REFERENCES,
        float64: bool = False,
        max_steps: int = 100,
        rtol: float | None = None,
        group: Callable[[str], str] | None = None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(every_n_steps, num_samples, loss)
        require_count("max_steps", max_steps)
        if not references or not set(references) <= set(REFERENCES):
            raise ValueError(f"references must be some of {REFERENCES}, got {references}")
        self.references, self.float64, self.max_steps, self.group = references, float64, max_steps, group
        self.rtol = (1e-9 if float64 else 1e-5) if rtol is None else rtol
        self._warned = False

    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
        samples = first_samples(batch, self.num_samples)
        probe = Probe(trainer, pl_module, samples, self.loss, dropout=not self.float64)
        active = probe.gradients()
        group = self.group or default_group(pl_module)
        figures: dict[str, float] = {}
        for reference in self.references:
            sums, residual = self._sums_and_residual(probe, active, reference, group)
            sums = {name: trainer.strategy.reduce(values, reduce_op="sum") for name, values in sums.items()}
            total = torch.stack(list(sums.values())).sum(0)
            names = {"": total} | ({f"{name}/": values for name, values in sums.items()} if len(sums) > 1 else {})
            for name, values in names.items():
                figures |= {f"gradient_error/{reference}/{name}{key}": v for key, v in _errors(values).items()}
            if reference == "converged":
                worst = float(trainer.strategy.reduce(residual, reduce_op="max"))
                if math.isfinite(worst):
                    figures[f"gradient_error/{reference}/relative_residual"] = worst
        return figures

    def _sums_and_residual(
        self, probe: Probe, active: Gradients, reference: str, group: Callable[[str], str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sums of each group, NaN if the reference diverges, and the largest residual of its solves."""
        try:
            choose = self._backprop if reference == "bptt" else self._converged
            gradients = probe.gradients(choose, float64=self.float64)
        except DivergenceError as error:
            if reference == "bptt":
                raise
            if not self._warned:
                self._warned = True
                warnings.warn(f"no gradient at the fixed point to compare with: {error}", stacklevel=2)
            gradients = {name: torch.full_like(g, math.nan) for name, g in active.items()}
            return _sums(active, gradients, group), torch.tensor(math.inf, device=probe.module.device)
        residuals = [r for s in probe.stats for r in (s.relative_residual, s.backward_relative_residual)]
        largest = torch.stack([r.max().float() for r in residuals if r is not None]).max()
        return _sums(active, gradients, group), largest

    def _backprop(self, layer: EquilibriumLayer) -> Choice:
        return layer.solver, BackpropAdjoint(checkpoint=True)

    def _converged(self, layer: EquilibriumLayer) -> Choice:
        backward = AndersonSolver(max_steps=self.max_steps, rtol=self.rtol)
        solver = dataclasses.replace(layer.solver, max_steps=self.max_steps, rtol=self.rtol, atol=0.0)
        return solver, ImplicitAdjoint(solver=backward, unconverged="ignore")


def default_group(module: LightningModule) -> Callable[[str], str]:
    """Group parameters by their equilibrium layer, or otherwise by the first module below the model."""
    layers = [name for name, m in module.named_modules() if isinstance(m, EquilibriumLayer)]
    # If all parameters are those of one attribute, `model.head.weight` belongs to `head`.
    tops = {name.split(".")[0] for name, _ in module.named_parameters()}
    prefix = f"{tops.pop()}." if len(tops) == 1 else ""

    def group(name: str) -> str:
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        return name.removeprefix(prefix).split(".")[0] if owner is None else owner.removeprefix(prefix)

    return group


def _sums(gradients: Gradients, references: Gradients, group: Callable[[str], str]) -> dict[str, Tensor]:
    """For each group the sums of `(g - reference)^2`, `g^2`, `reference^2` and `g * reference`, in float64."""
    sums: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        g, reference = gradient.double().flatten(), references[name].double().flatten()
        products = torch.stack([(g - reference).square().sum(), g @ g, reference @ reference, g @ reference])
        sums[group(name)] = sums.get(group(name), 0) + products
    return sums


def _errors(sums: Tensor) -> dict[str, float]:
    """Relative L2 distance and cosine; nothing where the reference is 0 or does not exist."""
    difference, square, square_of_reference, product = sums.tolist()
    if not square_of_reference > 0:
        return {}
    errors = {"relative_l2": math.sqrt(difference / square_of_reference)}
    return errors | ({"cosine": product / math.sqrt(square * square_of_reference)} if square > 0 else {})
