"""Base class of tasks: optimizer, schedule, and averaged weights from one dataclass, and the Jacobian penalty."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from revdeq_lightning.equilibrium import SolverStats, equilibria, jacobian_regularization, settle_checks
from revdeq_lightning.equilibrium.validation import require_in_range
from revdeq_lightning.errors import ParallelismError
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.tasks.averaged_weights import AveragedWeights
from revdeq_lightning.tasks.checkpoint_fit import changed_settings, check_weights, kept_settings
from revdeq_lightning.tasks.optimizers import OptimizerConfig, WindowedPlateau, build_optimizer, build_scheduler

_is_deferred: ContextVar[bool] = ContextVar("weights_deferred", default=False)


@contextmanager
def deferred_weights(enabled: bool = True) -> Iterator[None]:
    """Context in which tasks build models on the meta device, without weights, until FSDP2 shards them.

    Only the first process then ever holds the complete model, once, in CPU memory.
    """
    token = _is_deferred.set(enabled)
    try:
        yield
    finally:
        _is_deferred.reset(token)


class TrainingOutput(NamedTuple):
    """Output of a training step for callbacks, under the key `step`.

    Attributes:
        stats: Statistics of each solve, in order of the equilibria; empty without a solver.
        num_items: Number of items that this process trained on in this step, in units of `unit`.
        unit: "tokens" or "images".
    """

    stats: tuple[SolverStats, ...]
    num_items: int
    unit: str


class AbstractTask(LightningModule):
    """A model with its loss and optimizer.

    Args:
        network: Sizes of the model, of `network_class`.
        solver: How the equilibria are found and differentiated.
        optimizer: Optimizer, schedule, averaging of the weights.
        build: Builds the model from `network` and `solver`.
        compile: Compile each f, or the layers of a model without an equilibrium, with torch.compile.
        jacobian_weight: If above 0, add this times the mean of `jacobian_regularization` over the equilibria, at their
            solutions, to the training loss. It costs one evaluation of f with a double backward pass.
        others: Other settings of the task, for its checkpoints.

    Raises:
        ValueError: If the weight is negative or not finite, or the model has no equilibrium, or a compiled one.
    """

    model: Any
    network_class: type[Any]
    batch_type: type[Any]
    """Named tuple of the batches; its first two fields are enough, as a pair of tensors."""
    metrics: nn.ModuleDict
    """By split, "val" and "test"."""

    def __init__(
        self,
        network: Any,
        solver: SolverConfig,
        optimizer: OptimizerConfig,
        build: Callable[[Any, SolverConfig], nn.Module],
        *,
        compile: bool,
        jacobian_weight: float,
        **others: Any,
    ) -> None:
        super().__init__()
        require_in_range("jacobian_weight", jacobian_weight, "[0, inf)")
        # A checkpoint contains plain containers.
        network = self.network_class(**network) if isinstance(network, dict) else network
        solver = SolverConfig(**solver) if isinstance(solver, dict) else solver
        optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        settings = {"network": asdict(network), "solver": asdict(solver), "optimizer": asdict(optimizer), **others}
        self.save_hyperparameters(settings | {"compile": compile, "jacobian_weight": jacobian_weight}, logger=False)
        self.optimizer_config, self.jacobian_weight = optimizer, jacobian_weight
        self._build, self._random_state = partial(build, network, solver), torch.get_rng_state()
        with torch.device("meta") if _is_deferred.get() else nullcontext():
            self.model = self._build()
        layers = equilibria(self.model)
        if jacobian_weight and not layers:
            raise ValueError(f"jacobian_weight={jacobian_weight} needs a model with an equilibrium: remove it")
        if jacobian_weight and compile:
            raise ValueError(
                f"jacobian_weight={jacobian_weight} needs second derivatives, which torch.compile does not support: set"
                " compile=false"
            )
        if compile:
            around = [getattr(self.model, name, None) for name in ("prelude", "coda")]
            blocks = [layer.f for layer in layers] or [getattr(self.model, "block", self.model)]
            for block in [*blocks, *filter(None, around)]:
                block.compile()

    @contextmanager
    def penalized(self) -> Iterator[list[Tensor]]:
        """Context in which the Jacobian penalty of every solve is added to the list, if it has a weight."""
        penalties: list[Tensor] = []

        def add(layer: Any, args: Any, kwargs: Any, solution: Any) -> None:
            x = args[0] if args else kwargs["x"]
            penalties.append(jacobian_regularization(layer.f, solution.value, x))

        with ExitStack() as hooks:
            for layer in equilibria(self.model) if self.jacobian_weight else ():
                hooks.enter_context(layer.register_forward_hook(add, with_kwargs=True))
            yield penalties

    def with_penalty(self, loss: Tensor, penalties: list[Tensor]) -> Tensor:
        """Return the training loss, and log the mean penalty without its weight as `train/jacobian_penalty`."""
        if not penalties:
            return loss
        penalty = torch.stack(penalties).mean()
        self.log("train/jacobian_penalty", penalty.detach())
        return loss + self.jacobian_weight * penalty

    def from_data(self, name: str) -> Any:
        """An attribute of the data module; None without it, as a task also trains on a loader of somebody else."""
        return getattr(getattr(self.trainer, "datamodule", None), name, None)

    def as_batch(self, batch: Any) -> Any:
        """The batch, or one made of a pair of tensors.

        Raises:
            TypeError: If the batch is neither a pair nor has the fields of `batch_type`.
        """
        fields = self.batch_type._fields
        if all(hasattr(batch, name) for name in fields):
            return batch
        if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
            return self.batch_of(*batch)
        raise TypeError(
            f"{type(self).__name__} takes batches of a pair of tensors ({', '.join(fields[:2])}) or of the fields of"
            f" {self.batch_type.__name__}, got {_described(batch)}: change the collate_fn of the DataLoader"
        )

    def batch_of(self, inputs: Tensor, targets: Tensor) -> Any:
        parts = zip(self.batch_type._fields, (inputs, targets), strict=False)
        return self.batch_type(*(integers(name, part) for name, part in parts))

    @abstractmethod
    def _add_to(self, split: str, batch: Any) -> Any:
        """Add a batch to the sums over a split, "val" or "test"; the return value is for callbacks."""

    def _log_figures(self, split: str) -> None:
        self.log_dict({f"{split}/{key}": value for key, value in self._take(split).items()}, sync_dist=True)

    def _metric(self, name: str) -> Any:
        return self.metrics[name]

    def _take(self, name: str, *arguments: Any) -> dict[str, Tensor]:
        """Compute the figures of a metric and reset it."""
        figures: dict[str, Tensor] = self._metric(name).compute(*arguments)
        self._metric(name).reset()
        return figures

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log the learning rates of this step: `train/lr` of AdamW and, with Muon, `train/muon_lr`."""
        groups = self.trainer.optimizers[0].param_groups  # embeddings, whose rate may differ, come first
        rates = {"train/muon_lr" if "momentum" in group else "train/lr": group["lr"] for group in groups}
        self.log_dict({name: torch.tensor(rate) for name, rate in rates.items()})  # on the host, without a wait

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The model's output for a batch, or for its inputs alone."""
        return self(batch if isinstance(batch, Tensor) else self.as_batch(batch)[0])

    # Several loaders count as one.
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._add_to("val", self.as_batch(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._add_to("test", self.as_batch(batch))

    def on_validation_epoch_end(self) -> None:
        settle_checks()
        self._log_figures("val")

    def on_predict_epoch_end(self) -> None:
        settle_checks()

    def on_test_epoch_end(self) -> None:
        settle_checks()
        self._log_figures("test")

    def configure_model(self) -> None:
        """Shard the model if the strategy does so."""
        if self._trainer is None:  # loaded from a checkpoint without a trainer
            return
        strategy = self.trainer.strategy
        if shard := getattr(strategy, "shard_model", None):  # `EquilibriumFSDP2`
            if self.jacobian_weight:
                raise ParallelismError(
                    f"model.jacobian_weight={self.jacobian_weight} evaluates f outside its layer, where FSDP2 keeps its"
                    " parameters sharded: use trainer.strategy=ddp"
                )
            shard(self.model, self._rebuild)
            return
        if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ParallelismError(
                f"{type(strategy).__name__} would shard f separately from its solver and lose its gradient: use"
                " trainer.strategy=fsdp2 or ddp"
            )
        if any(p.is_meta for p in self.model.parameters()):
            raise ParallelismError(
                f"a model built within deferred_weights() has no weights without trainer.strategy=fsdp2, got"
                f" {type(strategy).__name__}"
            )

    def _rebuild(self) -> nn.Module:
        """The model with its original initial weights; advances the generator past them."""
        torch.set_rng_state(self._random_state)
        return self._build()

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.optimizer_config)
        scheduler = build_scheduler(optimizer, self.optimizer_config, self.trainer.estimated_stepping_batches)
        if scheduler is None:
            return optimizer
        schedule: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, WindowedPlateau):
            # Lightning would do it after the checkpoint of the step, which would then miss it.
            schedule["reduce_on_plateau"] = False
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, WindowedPlateau):
            metric = self.trainer.callback_metrics["train/loss"]
        super().lr_scheduler_step(scheduler, metric)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        there, own = checkpoint.get("hyper_parameters", {}), dict(self.hparams)
        if "state_dict" in checkpoint:  # weights of sharded checkpoints are checked when they are read
            check_weights(checkpoint["state_dict"], self.state_dict(), changed_settings(there, own))
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if "optimizer" in there:
            own["optimizer"].update(kept_settings(there["optimizer"], own["optimizer"]))  # the next checkpoint has them
        if not self.optimizer_config.ema_decay and "state_dict" in checkpoint:
            checkpoint["state_dict"] |= checkpoint.get("trained_weights", {})  # its `state_dict` holds the average

    def configure_callbacks(self) -> list[Callback]:
        averaging = self.optimizer_config.ema_decay > 0 and self.trainer.state.fn == "fit"
        return [AveragedWeights(self.optimizer_config.ema_decay)] if averaging else []


def integers(name: str, tensor: Tensor) -> Tensor:
    """The tensor as int64. Raise TypeError unless it holds integers."""
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be integers, got {tensor.dtype} of shape {tuple(tensor.shape)}: convert them")
    return tensor.long()


def _described(batch: Any) -> str:
    """Type of a batch, with its parts."""
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with {', '.join(map(str, batch))}"
    if isinstance(batch, tuple | list):
        return f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return type(batch).__name__
