"""Whether f contracts at the state that the solver returns."""

import warnings
from typing import Any

import torch
from lightning import LightningModule, Trainer

from revdeq_lightning.callbacks.abstract import AbstractProbing
from revdeq_lightning.equilibrium import spectral_radius
from revdeq_lightning.equilibrium.validation import require_count, require_in_range
from revdeq_lightning.runs.probe import Loss, Probe, first_samples


class ContractionWarning(UserWarning):
    """f expands near the state that the solver returns."""


class Contraction(AbstractProbing):
    """Estimates the spectral radius of df/dz at the state that the solver returns, by the power method.

    Below 1, f contracts there and plain iteration converges at this rate. From 1 on, a solver with a fixed number of
    steps still has an exact gradient, but the residual no longer falls with more steps and an unbounded state begins to
    grow: the warning comes before a `DivergenceError`. A relaxation `beta` below 1 converges a little beyond 1 if the
    largest eigenvalue is not positive.

    It costs a forward pass on some samples, and one evaluation of f and `num_iterations` vector-Jacobian products for
    each equilibrium. For assumptions and errors see `AbstractProbing`.

    Keys, logged at these steps only, over the samples of all processes: `equilibrium/spectral_radius` (the largest)
    and, with several equilibria, `equilibrium/1/spectral_radius` ... in the order of the calls.

    Args:
        every_n_steps: Optimizer steps from one estimate to the next.
        num_samples: Samples of each process; at least 2 where BatchNorm trains.
        num_iterations: Power iterations. The estimate is from below, accurate to a few percent.
        warn_at: Radius from which it warns: once, and again after the radius was below.
        loss: `(module, batch) -> loss` with the solves to examine; None: the training step.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        *,
        num_samples: int = 2,
        num_iterations: int = 30,
        warn_at: float = 1.0,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(every_n_steps, num_samples, loss)
        require_count("num_iterations", num_iterations, at_least=2)
        require_in_range("warn_at", warn_at, "(0, inf)")
        self.num_iterations, self.warn_at = num_iterations, warn_at
        self._is_above = False

    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
        probe = Probe(trainer, pl_module, first_samples(batch, self.num_samples), self.loss)
        solutions = probe.solutions()
        with probe.untraced(), probe.precision():
            radii = [spectral_radius(layer.f, z, x, num_iterations=self.num_iterations) for layer, x, z in solutions]
        largest_here = torch.stack([radius.max() for radius in radii])
        largest: list[float] = trainer.strategy.reduce(largest_here, reduce_op="max").tolist()
        self._warn(trainer, max(largest))
        figures = {"equilibrium/spectral_radius": max(largest)}
        if len(largest) > 1:
            figures |= {f"equilibrium/{i}/spectral_radius": radius for i, radius in enumerate(largest, 1)}
        return figures

    def _warn(self, trainer: Trainer, radius: float) -> None:
        was_above, self._is_above = self._is_above, not radius < self.warn_at
        if self._is_above and not was_above and trainer.is_global_zero:
            warnings.warn(
                f"f does not contract at step {trainer.global_step}: the spectral radius of df/dz where the solver ends"
                f" is {radius:.3g}. The residual will not fall with more steps, and the state may grow. Normalize the"
                " output of f, penalize its Jacobian (jacobian_regularization), bound its weights (spectral_norm), or"
                " lower the learning rate",
                ContractionWarning,
                stacklevel=2,
            )
