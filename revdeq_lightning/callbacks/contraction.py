"""Whether f contracts where the solver ends."""

import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.equilibrium import equilibria, spectral_radius
from revdeq_lightning.runs.probe import Loss, Probe, first_samples, reason_against
from revdeq_lightning.tasks.training_step import log_now, made_step


class ContractionWarning(UserWarning):
    """f expands near the state that the solver returns."""


class Contraction(Callback):
    """Estimates the spectral radius of df/dz at the state that the solver returns, by the power method, now and then.

    Below 1 f contracts there, and plain iteration converges at this rate. From 1 on a solver with a fixed number of
    steps still returns something, and its gradient is still exact, but the residual no longer falls with more steps,
    and a state that nothing bounds begins to grow: the warning comes before a `DivergenceError`. A relaxation `beta`
    below 1 converges a little beyond, if the largest eigenvalue is not positive.

    The run is bit for bit the same with and without this callback (see `Probe`). It costs a forward pass on some
    samples, and one evaluation of f and `num_iterations` vector-Jacobian products for each equilibrium.

    Keys, logged for every such step alone, over the samples of all processes: `equilibrium/spectral_radius` (the
    largest) and, with several equilibria, that of each, `equilibrium/1/spectral_radius` ... in the order of the calls.

    Assumes that f does not mix samples, automatic optimization and a `training_step` that can be called with fewer
    samples; what it changes besides buffers and metrics of torchmetrics is not restored: give a `loss` then.

    Args:
        every_n_steps: Optimizer steps from one estimate to the next.
        num_samples: Samples of each process; at least 2 where BatchNorm trains.
        num_iterations: Power iterations; the estimate is from below, good to a few percent.
        warn_at: Radius from which it warns; once, and again after the radius was below.
        loss: `(module, batch) -> loss` whose solves are looked at; None: the training step.

    Raises:
        ValueError: If a setting is out of its range; when training starts, if the module cannot be asked in this way:
            manual optimization without `loss`, sharded parameters, no equilibrium.

    Example:
        `Trainer(callbacks=[Contraction(every_n_steps=200)])`
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
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("num_samples", num_samples, 1),
            ("num_iterations", num_iterations, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not warn_at > 0:
            raise ValueError(f"warn_at must be positive, got {warn_at}")
        self.every_n_steps, self.num_samples, self.num_iterations = every_n_steps, num_samples, num_iterations
        self.warn_at, self.loss = warn_at, loss
        self._is_above = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be asked."""
        if reason := reason_against(pl_module, self.loss):
            raise ValueError(f"Contraction cannot look at the equilibria: {reason}")
        if not equilibria(pl_module):
            raise ValueError(f"Contraction needs an EquilibriumLayer, and {type(pl_module).__name__} has none")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate, at every n-th optimizer step."""
        if trainer.global_step % self.every_n_steps == 0 and made_step(trainer):
            figures = self.estimate(trainer, pl_module, batch)
            log_now(trainer, figures)
            self._warn(trainer, figures["equilibrium/spectral_radius"])

    def estimate(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, float]:
        """The radii of a batch, under their keys; all processes must call it."""
        probe = Probe(trainer, pl_module, first_samples(batch, self.num_samples), self.loss)
        solutions = probe.solutions()
        with probe.untraced(), probe.precision():
            radii = [
                spectral_radius(layer.f, z, x, num_iterations=self.num_iterations).max() for layer, x, z in solutions
            ]
        largest: list[float] = trainer.strategy.reduce(torch.stack(radii), reduce_op="max").tolist()
        figures = {"equilibrium/spectral_radius": max(largest)}
        if len(largest) > 1:
            figures |= {f"equilibrium/{i}/spectral_radius": radius for i, radius in enumerate(largest, 1)}
        return figures

    def _warn(self, trainer: Trainer, radius: float) -> None:
        was_above, self._is_above = self._is_above, not radius < self.warn_at
        if self._is_above and not was_above and trainer.is_global_zero:
            warnings.warn(
                f"f does not contract at step {trainer.global_step}: the spectral radius of df/dz where the solver ends"
                f" is {radius:.3g}. The residual will not fall with more steps, and the state may grow. Normalise the"
                " output of f, penalise its Jacobian (jacobian_regularization), bound its weights (spectral_norm), or"
                " lower the learning rate",
                ContractionWarning,
                stacklevel=2,
            )
