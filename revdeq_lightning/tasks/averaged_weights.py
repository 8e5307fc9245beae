"""An exponential moving average of the weights."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from revdeq_lightning.processes import is_sharded, local, shared_out_like, whole


class AveragedWeights(Callback):
    """Keep `average = d * average + (1 - d) * weights`, updated at each optimizer step, and validate with it.

    `d = min(decay, step / (step + 9))`, so that the initial weights are forgotten. A checkpoint's `state_dict`
    contains the average, which is evaluated when it is loaded; the weights in training are stored as `trained_weights`,
    from which a resumed fit continues. Floating-point buffers in the state, such as the running statistics of
    BatchNorm, are averaged like weights.

    Args:
        decay: In (0, 1); 0.999 averages over about the last thousand steps.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.num_updates = 0

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in averaged_tensors(pl_module).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._update(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)  # checkpoints are written after this

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.average:
            self._update(trainer, pl_module)  # a callback that saves may run before this one
            weights = checkpoint["state_dict"]
            checkpoint["trained_weights"] = {name: weights[name] for name in self.average if name in weights}
            checkpoint["state_dict"] = {**weights, **self._average_as(weights)}

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume: the average from `state_dict`, the weights from `trained_weights`, if there is an average.

        Evaluations, including those at the end of a fit, use the average in `state_dict`.
        """
        if "trained_weights" not in checkpoint or trainer.state.fn != "fit":
            return
        self.num_updates = checkpoint["global_step"]
        for name, p in averaged_tensors(pl_module).items():
            self.average[name] = shared_out_like(checkpoint["state_dict"][name], p).clone()
            p.copy_(shared_out_like(checkpoint["trained_weights"][name], p))

    @torch.no_grad()
    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self.num_updates:
            self.num_updates = trainer.global_step
            weight = 1 - min(self.decay, self.num_updates / (self.num_updates + 9))
            new = [local(p.detach()) for p in averaged_tensors(pl_module).values()]
            torch._foreach_lerp_([local(average) for average in self.average.values()], new, weight)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        # Copy values: FSDP2 gathers from a parameter's original memory, regardless of its `data`.
        for name, p in averaged_tensors(pl_module).items() if self.average else ():
            held = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(held)

    def _average_as(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The average as the strategy saves the weights: sharded, or complete on the first process."""
        if not any(map(is_sharded, self.average.values())):
            return self.average
        if any(map(is_sharded, weights.values())):
            return {name: average.cpu() for name, average in self.average.items()}
        gathered = {}
        for name, average in self.average.items():
            tensor = whole(average)  # on all processes, one after the other
            if name in weights:
                gathered[name] = tensor.cpu()
        return gathered


def averaged_tensors(module: LightningModule) -> dict[str, Tensor]:
    """Parameters and floating-point buffers of the state, by name."""
    state = module.state_dict().keys()
    buffers = {name: b for name, b in module.named_buffers() if name in state and b.is_floating_point()}
    return {**dict(module.named_parameters()), **buffers}
