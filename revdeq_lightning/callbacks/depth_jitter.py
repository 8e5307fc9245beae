"""Training with another number of solver steps in every optimizer step."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from revdeq_lightning.equilibrium import equilibria
from revdeq_lightning.equilibrium.validation import require_count, require_in_range
from revdeq_lightning.runs.probe import chosen_solvers


class DepthJitter(Callback):
    """Draws the number of solver steps for each batch from a list, so that the model also works at other depths.

    The draw depends only on the seed and the number of the batch in the run: all ranks draw the same numbers, and a
    resumed run continues with the same draws. All equilibria get the same number. Evaluation uses the solver as given.
    Logs no keys (`equilibrium/forward_nfe` shows the evaluations).

    Args:
        steps: Numbers of solver steps to draw from. Or several such lists, each with the fraction of the run at which
            it begins: `{0: [1], 0.5: [2, 4]}`. Before the first one the solver is as given.
        seed: Of the draws.

    Raises:
        ValueError: When training starts, if a solver does not accept one of the numbers, or if fractions are given and
            the trainer has neither `max_steps` nor `max_epochs`.

    Example:
        In a configuration: `trainer.callbacks: [{class_path: revdeq_lightning.callbacks.depth_jitter.DepthJitter,
        init_args: {steps: [2, 4, 8]}}]`
    """

    def __init__(self, steps: Sequence[int] | Mapping[float, Sequence[int]], seed: int = 0) -> None:
        self.steps = dict(sorted(steps.items())) if isinstance(steps, Mapping) else {0.0: list(steps)}
        if not self.steps or not all(self.steps.values()):
            raise ValueError(f"steps must be numbers of solver steps to draw from, got {steps}")
        for fraction in self.steps:
            require_in_range("a fraction in steps", fraction, "[0, 1)")
        require_count("seed", seed, at_least=0)
        self.seed = seed
        self._by_step: dict[int, Sequence[int]] = {}
        self._jittered = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = equilibria(pl_module)
        if not layers:
            raise ValueError(f"DepthJitter needs an EquilibriumLayer, {type(pl_module).__name__} has none")
        for layer in layers:  # a number that a solver does not accept is an error before training
            for max_steps in {n for choices in self.steps.values() for n in choices}:
                dataclasses.replace(layer.solver, max_steps=max_steps)
        total = trainer.estimated_stepping_batches if any(self.steps) else 0
        if math.isinf(total):
            raise ValueError("DepthJitter takes fractions of a run with an end: set trainer.max_steps or max_epochs")
        self._by_step = {math.ceil(round(fraction * total, 6)): choices for fraction, choices in self.steps.items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        begun = [choices for step, choices in self._by_step.items() if step <= trainer.global_step]
        if not begun:
            return
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        # Raw bits: the one stream that NumPy promises never to change.
        draw = np.random.PCG64(np.random.SeedSequence([self.seed, progress.total.processed])).random_raw()
        max_steps = begun[-1][int(draw) % len(begun[-1])]

        def choice(layer: Any) -> Any:
            return dataclasses.replace(layer.solver, max_steps=max_steps), layer.adjoint

        self._jittered.enter_context(chosen_solvers(pl_module, choice))

    def on_train_batch_end(self, *_: Any) -> None:
        self._jittered.close()

    def on_exception(self, *_: Any) -> None:
        self._jittered.close()
