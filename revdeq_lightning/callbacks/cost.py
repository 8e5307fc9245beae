"""What training costs: time and where it goes, memory, evaluations of f, and how much of the device is used."""

import dataclasses
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from revdeq_lightning.callbacks.abstract import AbstractWatching
from revdeq_lightning.callbacks.peaks import peak_flops
from revdeq_lightning.equilibrium import BackpropAdjoint, EquilibriumLayer, ReversibleAdjoint, equilibria
from revdeq_lightning.equilibrium.validation import require_in_range
from revdeq_lightning.runs.probe import Choice, Loss, Probe, batch_size, first_samples, reason_against
from revdeq_lightning.tasks.training_step import is_logging_step, log_on_host, made_step

LOGGED_PHASES = ("data", "forward", "backward", "optimizer", "other")
PAUSED = "paused"


class Cost(AbstractWatching):
    """Logs throughput, where the time of a step goes, memory, evaluations per second and model FLOP utilization.

    All are averages since the last logging step, without evaluation. On a GPU, times are measured by events in its
    stream: nothing waits for the device except at logging steps.

    Keys, all beginning with `system/`, of the first process unless stated otherwise:

    * `tokens_per_second` or `images_per_second`, of all processes together: the unit is the module's, else `samples`.
    * `seconds_per_step`, of an optimizer step, and its parts: `data_seconds` (loggers, waiting for the loader,
      transfer), `forward_seconds`, `backward_seconds` (with the exchange of gradients), `optimizer_seconds` (with
      clipping), `other_seconds` (callbacks, checkpoints).
    * `peak_memory_bytes`: since the start, of the tensors on the GPU, otherwise of the process.
    * `evaluations_per_second`: of f, forward and backward passes.
    * `model_flop_utilization`: floating-point operations of the iteration and its derivative, without evaluations of f
      repeated to save memory, as a fraction of the device's peak in the precision of training. Only if the peak is
      known, the module is not sharded, and the adjoint differentiates the iteration (reversible, backprop).

    The operations are counted once, before the first batch, with one and two solver steps on two samples, and scaled to
    the evaluations and samples of each batch. Counting does not change the run.

    Assumes automatic optimization, and that the training step returns what it processed as `outputs["step"].num_items`
    and `.unit`; otherwise the batch size counts.

    Args:
        peak_flops: Floating-point operations per second of one device, for utilization; None: from `PEAKS`.
        loss: `(module, batch) -> loss` to count the operations of; None: that of the training step.
    """

    def __init__(self, peak_flops: float | None = None, loss: Loss | None = None) -> None:
        if peak_flops is not None:
            require_in_range("peak_flops", peak_flops, "(0, inf)")
        self.peak_flops, self.loss = peak_flops, loss
        self.flops: FlopCount | None = None
        self._peak: float | None = None
        self._can_count = False
        self._clock: _Clock | None = None
        self._undo = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._num_items = self._num_steps = self._nfe = 0
        self._num_flops: float | None = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if cast(Any, trainer).log_every_n_steps == 0:
            return  # the marks would pile up
        self._reset()
        self._clock = _Clock(pl_module.device)
        for optimizer in trainer.optimizers:
            handle = optimizer.register_step_post_hook(lambda *_: self._mark("other"))
            self._undo.callback(handle.remove)
        last = _Last(self._clock)
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        callbacks.append(last)
        self._undo.callback(callbacks.remove, last)
        self._peak = self.peak_flops or known_peak(trainer, pl_module)
        differentiates = all(isinstance(m.adjoint, BackpropAdjoint | ReversibleAdjoint) for m in equilibria(pl_module))
        self._can_count = differentiates and self._peak is not None and not reason_against(pl_module, self.loss)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._can_count and self.flops is None:
            self._mark(PAUSED)
            self._can_count = False
            try:
                self.flops = count_flops(trainer, pl_module, batch, self.loss)
            except Exception as error:  # the module's step may not work with two samples
                warnings.warn(f"no model FLOP utilization: the operations cannot be counted: {error!r}", stacklevel=2)
        self._mark("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._mark("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("optimizer" if made_step(trainer) else "other")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._mark("other")
        stats = self.take(outputs)
        step = outputs.get("step") if isinstance(outputs, Mapping) else None
        self._num_items += batch_size(batch) if step is None else step.num_items
        self._num_steps += made_step(trainer)
        self._nfe += sum(s.forward_nfe + (s.backward_nfe or 0) for s in stats)
        if self.flops is not None and self._num_flops is not None:
            of_sample = self.flops.of_sample([s.forward_nfe for s in stats])
            self._num_flops = None if of_sample is None else self._num_flops + of_sample * batch_size(batch)
        if is_logging_step(trainer):
            unit = "samples" if step is None else step.unit
            figures = self._figures(trainer, pl_module, unit)
            log_on_host(pl_module, {f"system/{key}": value for key, value in figures.items()})
            self._reset()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(PAUSED)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("other")

    on_train_epoch_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        super().on_exception(trainer, pl_module)
        self._clock = None
        self._undo.close()

    on_train_end = on_exception

    def _mark(self, phase: str) -> None:
        if self._clock is not None:
            self._clock.mark(phase)

    def _figures(self, trainer: Trainer, pl_module: LightningModule, unit: str) -> dict[str, float]:
        assert self._clock is not None
        seconds = self._clock.take()
        total = sum(seconds[phase] for phase in LOGGED_PHASES)
        figures = {
            f"{unit}_per_second": self._num_items * trainer.world_size / total,
            "seconds_per_step": total / self._num_steps,
            **{f"{phase}_seconds": seconds[phase] / self._num_steps for phase in LOGGED_PHASES},
            "peak_memory_bytes": peak_memory_bytes(pl_module.device),
        }
        if self._nfe:
            figures["evaluations_per_second"] = self._nfe / total
        if self.flops is not None and self._num_flops is not None and self._peak is not None:
            figures["model_flop_utilization"] = self._num_flops / (total * self._peak)
        return figures


@dataclasses.dataclass
class FlopCount:
    """Operations of one sample, forward and backward: `fixed + sum(of_evaluation[i] * nfe[i])` over the layers i."""

    fixed: float
    of_evaluation: list[float]

    def of_sample(self, nfe: Sequence[float]) -> float | None:
        """Operations for these evaluations of each solve; None if the solves do not match the layers."""
        if len(self.of_evaluation) == 1 and nfe:  # one layer, perhaps called several times
            nfe = [sum(nfe) / len(nfe)]
        if len(nfe) != len(self.of_evaluation):
            return None
        return self.fixed + sum(flops * n for flops, n in zip(self.of_evaluation, nfe, strict=True))


def count_flops(trainer: Trainer, module: LightningModule, batch: Any, loss: Loss | None = None) -> FlopCount:
    """Count the operations of the iteration and its derivative (BPTT), without changing the run.

    They are linear in the evaluations of each layer: count with one step in each layer, then with two in one of them.
    """
    samples = first_samples(batch, 2)
    probe = Probe(trainer, module, samples, loss)

    def count(twice: EquilibriumLayer | None = None) -> float:
        def choose(layer: EquilibriumLayer) -> Choice:
            steps = 2 if layer is twice else 1
            return dataclasses.replace(layer.solver, max_steps=steps, rtol=0.0, atol=0.0), BackpropAdjoint()

        with FlopCounterMode(display=False) as counter:
            probe.gradients(choose)
        return float(counter.get_total_flops()) / batch_size(samples)

    layers = equilibria(module)
    once = count()
    steps = [count(layer) - once for layer in layers]
    of_evaluation = [step / layer.solver.evaluations_per_step for step, layer in zip(steps, layers, strict=True)]
    return FlopCount(once - sum(steps), of_evaluation)


class _Clock:
    """Time in each phase, by the processor's clock or, on CUDA, by events in the stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.marks: list[tuple[str, Any]] = []
        self.mark("other")

    def mark(self, phase: str) -> None:
        """Begin a phase and end the one before."""
        moment: Any = time.perf_counter()
        if self.device is not None:
            moment = cast(Any, torch.cuda.Event)(enable_timing=True)
            moment.record(torch.cuda.current_stream(self.device))
        self.marks.append((phase, moment))

    def take(self) -> dict[str, float]:
        """Return the seconds spent in each phase since the last call."""
        self.mark(self.marks[-1][0])
        if self.device is not None:
            self.marks[-1][1].synchronize()
        seconds = dict.fromkeys((*LOGGED_PHASES, PAUSED), 0.0)
        for (phase, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds[phase] += end - begin if self.device is None else begin.elapsed_time(end) / 1000
        self.marks = self.marks[-1:]
        return seconds


class _Last(Callback):
    """Starts the phase "data" after all other callbacks, as no hook says that the next batch is fetched."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.clock.mark("data")

    on_train_epoch_start = on_validation_end = on_train_batch_end


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes of the tensors on a GPU, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def known_peak(trainer: Trainer, module: LightningModule) -> float | None:
    """Operations per second of the GPU in the precision of training."""
    if module.device.type != "cuda":
        return None
    dtypes = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    precision = str(trainer.precision)
    dtype = next((dtype for name, dtype in dtypes.items() if precision.startswith(name)), torch.float32)
    return peak_flops(torch.cuda.get_device_name(module.device), dtype)
