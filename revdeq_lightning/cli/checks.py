"""Refuse settings that would break a run's guarantees, and weights that do not fit."""

import json
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import WandbLogger
from safetensors import SafetensorError, safe_open

from revdeq_lightning.callbacks.config import DiagnosticsConfig
from revdeq_lightning.cli.errors import fail
from revdeq_lightning.distributed.strategies import is_fsdp2
from revdeq_lightning.equilibrium import ReversibleAdjoint, equilibria
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.tasks.checkpoint_fit import changed_settings, check_weights

NOT_SUPPORTED: dict[type, str] = {
    LearningRateFinder: "it would train before the run; set model.optimizer.lr",
    BatchSizeFinder: "it would train before the run; set data.batch_size",
    StochasticWeightAveraging: "checkpoints would not have the average; set model.optimizer.ema_decay",
    WeightAveraging: "checkpoints would not have the average; set model.optimizer.ema_decay",
    EMAWeightAveraging: "set model.optimizer.ema_decay",
}
"""Callbacks of Lightning, and what to do instead."""
UNUSED = {
    "default_root_dir": "set run.folder",
    "model_registry": "remove it",
    "use_distributed_sampler": "the data is always divided among the processes",
}
"""Options of the trainer without effect here, and why or what to do instead."""


def check_settings(trainer: Any, diagnostics: DiagnosticsConfig, model: Any) -> None:
    """Fail for settings of the trainer that training does not support."""
    if trainer.get("logger") is False:
        fail("trainer.logger=false: a run always writes its metrics to a folder; set run.folder to choose it")
    if (every := trainer.get("log_every_n_steps")) is not None and every < 1:
        fail(
            f"trainer.log_every_n_steps={every}: at logging steps a run certifies its gradients and checks"
            " whether a checkpoint is due; choose a large number to log rarely"
        )
    is_exact = any(
        isinstance(layer.adjoint, ReversibleAdjoint) and getattr(layer.solver, "is_exact", False)
        for layer in equilibria(model)
    )
    if diagnostics.certificate != "warn" and not is_exact:
        fail(
            f"diagnostics.certificate={diagnostics.certificate}: no gradient of this model is certified; use"
            " model.solver.adjoint=reversible with arithmetic=exact, or remove it"
        )
    if trainer.get("benchmark") and is_exact:
        fail(
            "trainer.benchmark=true: cuDNN would choose other kernels in the backward pass, and the gradient would"
            " not be exact: remove it, or set model.solver.arithmetic=float64"
        )
    for name, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        if (value := trainer.get(name)) is not None and value < least:
            fail(f"trainer.{name} must be at least {least}, got {value}")
    for name, instead in UNUSED.items():
        if trainer.get(name) not in (None, True):
            fail(f"trainer.{name}={trainer[name]} has no effect: {instead}")
    if trainer.get("gradient_clip_algorithm") and not trainer.get("gradient_clip_val"):
        fail(f"trainer.gradient_clip_algorithm={trainer['gradient_clip_algorithm']} needs trainer.gradient_clip_val")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if trainer.get(name) == 0:
            fail(f"trainer.{name}=0 would train nothing: give a positive number, or leave it out")
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        if trainer.get(name) == 0:
            fail(f"trainer.{name} must be positive, got 0")
    needs_whole_model = diagnostics.gradient_error_every_n_steps or diagnostics.contraction_every_n_steps
    if needs_whole_model and is_fsdp2(trainer.get("strategy")):
        fail(
            "diagnostics.gradient_error_every_n_steps and contraction_every_n_steps need the whole model in"
            " each process: use trainer.strategy=ddp, not fsdp2"
        )
    for callback in as_list(trainer.get("callbacks")):
        if advice := NOT_SUPPORTED.get(type(callback)):
            fail(f"trainer.callbacks: {type(callback).__name__} is not supported: {advice}")
    if any(isinstance(logger, WandbLogger) for logger in as_list(trainer.get("logger"))):
        fail("trainer.logger=WandbLogger would wait for a key: use run.wandb=auto, online or offline")


def load_weights(task: Any, path: str) -> None:
    """Load exported weights into a task's model; CheckpointError if they do not fit."""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            settings = json.loads((file.metadata() or {}).get("hyper_parameters", "{}"))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no file of weights, or a damaged one ({error})") from None
    check_weights(weights, task.model.state_dict(), changed_settings(settings, dict(task.hparams)))
    task.model.load_state_dict(weights)


def as_list(value: Any) -> list[Any]:
    """The value or values of a setting as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
