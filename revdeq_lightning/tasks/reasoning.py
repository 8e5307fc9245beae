"""Reasoning: the loss of training, and how many puzzles of each size are solved."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.data.puzzles.module import PuzzleBatch
from revdeq_lightning.equilibrium import equilibria
from revdeq_lightning.equilibrium.validation import refuse_unused, require_count, require_in_range
from revdeq_lightning.host import send
from revdeq_lightning.metrics import ReasoningMetrics
from revdeq_lightning.models import ReasonerConfig
from revdeq_lightning.models.build import SolverConfig, build_reasoner
from revdeq_lightning.models.cross_entropy import corrected_loss
from revdeq_lightning.tasks.base import AbstractTask, TrainingOutput
from revdeq_lightning.tasks.optimizers import OptimizerConfig


class ReasoningTask(AbstractTask):
    """Train and evaluate a reasoner.

    Logs `train/loss` (nats per cell, at the end of the solve) and, over whole splits, `val/` and `test/`: `loss`,
    `cell_accuracy`, `solved` (fraction of the puzzles with a solution as the answer) and `evaluations` of f per puzzle.
    A test also logs them for each size (`test/solved_39x39`), and, for the first batch of each size,
    `solved_from_random` and `same_from_random`: the fractions of the puzzles that are solved from a random initial
    state, and that get the same answer as from zero. Any loader of pairs (inputs, targets) will do; without a
    `PuzzleDataModule`, there are no figures for each size, and only the answer in the targets solves a puzzle.

    Args:
        network: Sizes and block; symbols, answers and shape come from the data.
        solver: How the equilibrium is found and differentiated.
        optimizer: Optimizer, schedule, averaging of the weights.
        random_start: Fraction of the puzzles of a training batch whose solve starts from a random state, in [0, 1].
        late_start: Fraction whose solve continues from the state after some solver steps without a gradient, so that
            an answer stays once it is found.
        late_steps: Largest number of these steps; each batch draws its number.
        compile: Compile f with torch.compile: worth its minutes on a GPU.
        jacobian_weight: Weight of the penalty on df/dz at the fixed point; 0 for none (see `AbstractTask`).
    """

    network_class = ReasonerConfig
    batch_type = PuzzleBatch

    def __init__(
        self,
        network: ReasonerConfig,
        solver: SolverConfig,
        optimizer: OptimizerConfig,
        random_start: float = 0.0,
        late_start: float = 0.0,
        late_steps: int = 64,
        compile: bool = False,
        jacobian_weight: float = 0.0,
    ) -> None:
        super().__init__(
            network,
            solver,
            optimizer,
            build_reasoner,
            compile=compile,
            jacobian_weight=jacobian_weight,
            random_start=random_start,
            late_start=late_start,
            late_steps=late_steps,
        )
        for name, value in (("random_start", random_start), ("late_start", late_start)):
            require_in_range(name, value, "[0, 1]")
            if value and not equilibria(self.model):
                raise ValueError(f"{name}={value} needs a model with an equilibrium: remove it")
        require_count("late_steps", late_steps)
        if not late_start:
            refuse_unused({"late_steps": late_steps}, ReasoningTask, "late_start", "late_steps")
        self.random_start, self.late_start, self.late_steps = random_start, late_start, late_steps
        self.metrics = nn.ModuleDict({"val": ReasoningMetrics(), "test": ReasoningMetrics()})
        self._sizes: list[str] = []

    def setup(self, stage: str) -> None:
        if check_model := self.from_data("check_model"):
            check_model(num_symbols=self.model.config.num_symbols, num_answers=self.model.config.num_answers)
        shapes = [*map(list, self.from_data("test_shapes") or ())]
        if self.model.config.block == "attention" and any(shape != self.model.config.shape for shape in shapes):
            raise MisconfigurationException(
                f"attention has learned positions for puzzles of shape {self.model.config.shape}, and the test puzzles"
                f" have the shapes {shapes}: change data.test_sizes or data.test_path, or use block=convolution"
            )
        self._sizes = [shape_name(shape) for shape in shapes]
        for size in self._sizes:
            self.metrics[f"test_{size}"] = ReasoningMetrics()
            self.metrics[f"random_{size}"] = ReasoningMetrics()

    def forward(self, inputs: Tensor) -> Any:
        """Logits `(B, A, ...)` and how they were reached."""
        return self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Mean nats per cell; with fixed-point correction, the weighted mean over the parts of the solve."""
        batch = self.as_batch(batch)
        starts = {"z0": self._starts(batch.inputs)} if self.random_start or self.late_start else {}
        with self.penalized() as penalties:
            output = self.model(batch.inputs, **starts)
        loss = self._nats(output.logits, batch.targets)
        self.log("train/loss", loss)
        stats: tuple[Any, ...] = ()
        if output.solution is not None:
            earlier = output.solution.earlier
            stats = tuple(part.stats for part in (*earlier, output.solution))
            if earlier:
                losses = [self._nats(self.model.readout(part.value), batch.targets) for part in earlier]
                loss = corrected_loss([*losses, loss], self.model.loss_decay)
        loss = self.with_penalty(loss, penalties)
        return {"loss": loss, "step": TrainingOutput(stats, len(batch.inputs), "puzzles")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "network" in (there := checkpoint.get("hyper_parameters", {})):
            self.model.config.shape = list(there["network"]["shape"])  # from which evaluations grow, whatever is tested

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if kind_settings := self.from_data("kind_settings"):
            checkpoint["puzzles"] = kind_settings()

    def evaluation_sums(self, batch: Any) -> dict[str, Tensor]:
        """Sums over the puzzles of the batch, for `DepthSweep`."""
        batch = self.as_batch(batch)
        sums = self._sums(batch, self(batch.inputs))
        accuracy = sums["right_cells"] / sums["cells"].clamp(min=1) * sums["puzzles"]
        return {"solved": sums["solved"], "cell_accuracy": accuracy, "count": sums["puzzles"]}

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        batch = self.as_batch(batch)
        logits: Tensor = self._add_to("test", batch)
        size = shape_name(batch.inputs.shape[1:])
        if batch_idx == 0 and equilibria(self.model) and size in self._sizes:
            generator = torch.Generator(batch.inputs.device).manual_seed(0)
            output = self.model(batch.inputs, z0=self.model.random_state(batch.inputs, generator))
            sums = self._sums(batch, output)
            same = (output.logits.argmax(1) == logits.argmax(1)).flatten(1).all(1) & is_real(batch)
            self._metric(f"random_{size}").update(**sums | {"right_cells": same.sum(), "cells": sums["puzzles"]})
        return logits

    def _add_to(self, split: str, batch: PuzzleBatch) -> Tensor:
        output = self(batch.inputs)
        sums = self._sums(batch, output)
        self._metric(split).update(**sums)
        if split == "test" and (size := shape_name(batch.inputs.shape[1:])) in self._sizes:
            self._metric(f"test_{size}").update(**sums)
        return cast(Tensor, output.logits)

    def _log_figures(self, name: str) -> None:
        values = {f"{name}/{key}": value for key, value in self._take(name).items()}
        for size in self._sizes if name == "test" else ():
            values |= {f"test/{key}_{size}": value for key, value in self._take(f"test_{size}").items()}
            if equilibria(self.model):
                found = self._take(f"random_{size}")
                values[f"test/solved_from_random_{size}"] = found["solved"]
                values[f"test/same_from_random_{size}"] = found["cell_accuracy"]
        self.log_dict(values, sync_dist=True)

    def _sums(self, batch: PuzzleBatch, output: Any) -> dict[str, Tensor]:
        """Sums over the puzzles of a batch, as `ReasoningMetrics` takes them."""
        targets, answers = batch.targets, output.logits.argmax(1)
        counted, real = targets != IGNORE_INDEX, is_real(batch)
        return {
            "nats": self._nats(output.logits, targets, reduction="sum"),
            "right_cells": ((answers == targets) & counted).sum(),
            "cells": counted.sum(),
            "solved": (self.solved(batch, answers) & real).sum(),
            "evaluations": (output.evaluations * real).sum(),
            "puzzles": real.sum(),
        }

    def solved(self, batch: PuzzleBatch, answers: Tensor) -> Tensor:
        """Whether each puzzle is solved: by the answers in the targets, or by another solution; shape `(puzzles,)`."""
        is_solved = ((answers == batch.targets) | (batch.targets == IGNORE_INDEX)).flatten(1).all(1)
        if kind := self.from_data("kind"):
            wrong = ~is_solved
            pairs = zip(*(tensor[wrong].cpu().numpy() for tensor in (batch.inputs, answers)), strict=True)
            found = [kind.is_solved(*pair) for pair in pairs]
            is_solved[wrong] = torch.tensor(found, dtype=torch.bool, device=wrong.device)
        return is_solved

    @staticmethod
    def _nats(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction=reduction)

    def _starts(self, inputs: Tensor) -> Tensor:
        """Zeros, random states, and late states, each for a randomly drawn part of the batch."""
        z0: Tensor = self.model.random_state(inputs)
        # Drawn on the CPU, as the host would wait for masks on the device.
        at_zero = torch.rand(len(inputs)) >= self.random_start
        is_late = torch.rand(len(inputs)) < self.late_start
        z0.index_fill_(0, send(at_zero.nonzero().flatten(), inputs.device), 0)
        if is_late.any():
            late = send(is_late.nonzero().flatten(), inputs.device)
            steps = int(torch.randint(1, self.late_steps + 1, ()))
            with torch.no_grad():
                z0[late] = self.model(inputs[late], max_steps=steps, z0=z0[late]).solution.value
        return z0


def is_real(batch: PuzzleBatch) -> Tensor:
    """Whether a puzzle has targets, `(B,)`: one that only fills a batch has none."""
    return (batch.targets != IGNORE_INDEX).flatten(1).any(1)


def shape_name(shape: Iterable[int]) -> str:
    """`39x39`, or `512`."""
    return "x".join(map(str, shape))
