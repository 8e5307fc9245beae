"""Training with another number of solver steps, or another beta, in every optimizer step."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.equilibrium import equilibria
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.runs.probe import chosen_solvers


class DepthJitter(Callback):
    """Draws the solver's steps and its beta for each batch from lists, so that the model also works at other depths.

    The draw depends only on the seed and the number of the batch in the run: all ranks draw the same values, and a
    resumed run continues with the same draws. All equilibria get the same values. Evaluation uses the solver as given.
    Logs no keys (`equilibrium/forward_nfe` shows the evaluations).

    Args:
        steps: Numbers of solver steps to draw from; empty: the solver's own.
        betas: Relaxation parameters to draw from; empty: the solver's own.
        seed: Of the draws.
        first_batch: Training batch, from 0, of the first draw; before it the solver is as given, which takes less time.

    Raises:
        ValueError: When training starts, if a solver does not accept one of the values.

    Example:
        In a configuration: `trainer.callbacks: [{class_path: revdeq_lightning.callbacks.depth_jitter.DepthJitter,
        init_args: {steps: [2, 4, 8]}}]`
    """

    def __init__(
        self, steps: Sequence[int] = (), betas: Sequence[float] = (), seed: int = 0, first_batch: int = 0
    ) -> None:
        if not steps and not betas:
            raise ValueError(f"DepthJitter needs steps or betas to draw from, got {list(steps)} and {list(betas)}")
        require_count("seed", seed, at_least=0)
        require_count("first_batch", first_batch, at_least=0)
        self.steps, self.betas, self.seed, self.first_batch = list(steps), list(betas), seed, first_batch
        self._jittered = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = equilibria(pl_module)
        if not layers:
            raise ValueError(f"DepthJitter needs an EquilibriumLayer, {type(pl_module).__name__} has none")
        for layer in layers:  # a value that a solver does not accept is an error before training
            for num_steps in self.steps:
                changed(layer.solver, max_steps=num_steps)
            for beta in self.betas:
                changed(layer.solver, beta=beta)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        number = progress.total.processed
        if number < self.first_batch:
            return
        # Raw bits: the one stream that NumPy promises never to change.
        first, second = np.random.PCG64(np.random.SeedSequence([self.seed, number])).random_raw(2)
        drawn: dict[str, float] = {}
        if self.steps:
            drawn["max_steps"] = self.steps[int(first) % len(self.steps)]
        if self.betas:
            drawn["beta"] = self.betas[int(second) % len(self.betas)]
        choice = chosen_solvers(pl_module, lambda layer: (changed(layer.solver, **drawn), layer.adjoint))
        self._jittered.enter_context(choice)

    def on_train_batch_end(self, *_: Any) -> None:
        self._jittered.close()

    def on_exception(self, *_: Any) -> None:
        self._jittered.close()


def changed(solver: Any, **settings: float) -> Any:
    """The solver with other settings."""
    if "beta" in settings and not hasattr(solver, "beta"):
        raise ValueError(f"{type(solver).__name__} has no beta, got DepthJitter(betas=...)")
    return dataclasses.replace(solver, **settings)
