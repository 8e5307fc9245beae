"""Optimizers and learning rate schedules, each from one dataclass."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from revdeq_lightning.equilibrium.validation import refuse_unused, require_count, require_in_range
from revdeq_lightning.processes import shared_out_like, whole


@dataclass
class OptimizerConfig:
    """Optimizer, schedule, and averaging of the weights; for gradient clipping use `trainer.gradient_clip_val`.

    Attributes:
        optimizer: adamw, or muon: Muon for the matrices and kernels inside the model, AdamW for embedding, readout and
            vectors.
        lr: Peak learning rate of AdamW.
        embedding_lr: Peak learning rate of the embeddings; null for `lr`.
        muon_lr: Peak learning rate of Muon.
        betas: Betas of AdamW.
        eps: Epsilon of AdamW.
        muon_momentum: Momentum of Muon.
        weight_decay: Decoupled weight decay of matrices and kernels, times the learning rate, with either optimizer.
        readout_decay: Weight decay of the readout; not of reasoners, whose readout counts as a part of the inside.
        schedule: After the warm-up: constant, linear or cosine decay over the whole run, or plateau: multiply by
            plateau_factor when the training loss, averaged over plateau_window steps, has not improved for
            plateau_patience such windows.
        warmup_steps: Steps over which the learning rate rises linearly from 0. None with plateau.
        final_lr_fraction: Final learning rate of linear and cosine decay, as a fraction of the peak.
        plateau_factor: See schedule.
        plateau_patience: See schedule.
        plateau_window: See schedule.
        ema_decay: If above 0, validation, test, and generation use an exponential moving average of the weights with
            this decay per step.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    embedding_lr: float | None = None
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_momentum: float = 0.95
    weight_decay: float = 0.0
    readout_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    warmup_steps: int = 0
    final_lr_fraction: float = 0.0
    plateau_factor: float = 0.5
    plateau_patience: int = 10
    plateau_window: int = 200
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {list(self.betas)}")
        self.betas = (self.betas[0], self.betas[1])
        for name, value in (*(("betas", beta) for beta in self.betas), ("muon_momentum", self.muon_momentum)):
            require_in_range(name, value, "[0, 1)")
        for name in ("lr", "muon_lr", "eps"):
            require_in_range(name, getattr(self, name), "(0, inf)")
        if self.embedding_lr is not None:
            require_in_range("embedding_lr", self.embedding_lr, "(0, inf)")
        for name in ("weight_decay", "readout_decay"):
            require_in_range(name, getattr(self, name), "[0, inf)")
        require_count("warmup_steps", self.warmup_steps, at_least=0)
        for name in ("plateau_patience", "plateau_window"):
            require_count(name, getattr(self, name))
        for name in ("ema_decay", "final_lr_fraction"):
            require_in_range(name, getattr(self, name), "[0, 1)")
        if self.schedule == "plateau" and self.warmup_steps:
            raise ValueError(f"schedule='plateau' has no warm-up, got warmup_steps={self.warmup_steps}")


class MuonAdamW(Optimizer):
    """Muon for the parameter groups that have a `momentum`, AdamW for the others.

    Muon moves each matrix by its orthogonalized (Nesterov) momentum; a kernel is the matrix
    `(out, in * height * width)`, and a matrix with more rows than columns moves `sqrt(rows / columns)` times as far.
    `torch.optim.Muon` does not support kernels and always computes in bfloat16, which is 30 times slower on a CPU
    without instructions for it, and slower than the model. Here CPUs compute in float32. Matrices sharded over
    processes (FSDP2) are gathered one at a time on every process, which sends as many additional bytes as the
    gradients.

    Args:
        groups: Parameter groups, with `lr`, `momentum` and `weight_decay` for Muon, or with `lr`, `betas`, `eps` and
            `weight_decay` for AdamW.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        # Both kinds of groups keep the keys of earlier versions, which used two PyTorch optimizers.
        super().__init__([group if "momentum" in group else group | {"fused": True} for group in groups], {})
        vectors = [tuple(p.shape) for group in groups if "momentum" in group for p in group["params"] if p.dim() < 2]
        if vectors:
            raise ValueError(f"Muon needs matrices or kernels, got a parameter of shape {vectors[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step = self._step_muon if "momentum" in group else self._step_adamw
            step(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            grad: Any = p.grad
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            # Gather a sharded matrix, because orthogonalization needs all of it.
            update = whole(grad.lerp(buffer, group["momentum"])).flatten(1)
            if not p.is_cpu:
                update = update.bfloat16()
            rows, columns = update.shape
            direction = shared_out_like(orthogonalize(update).to(p.dtype).view(p.shape), p)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(direction, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device, dtype=torch.float32)
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        means, squares, steps = ([self.state[p][k] for p in parameters] for k in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        rates = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        options: Any = {"fused": True, "amsgrad": False, "maximize": False}
        grads: Any = [p.grad for p in parameters]
        adamw(parameters, grads, means, squares, [], steps, beta1=beta1, beta2=beta2, **rates, **options)


def orthogonalize(g: Tensor) -> Tensor:
    """Push the singular values of a matrix toward 1 (Newton-Schulz): `x = a x + (b x x' + c (x x')^2) x`, five times.

    Source of the coefficients: as for `MuonAdamW`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.shape[0] > g.shape[1] else g
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.shape[0] > g.shape[1] else x


class WindowedPlateau(ReduceLROnPlateau):
    """`ReduceLROnPlateau` on the mean of `window` values (over all processes); synchronizes once per window."""

    def __init__(self, optimizer: Optimizer, *, factor: float, patience: int, window: int) -> None:
        # Ours reduces at the patience-th window without improvement, PyTorch's one window later.
        super().__init__(optimizer, factor=factor, patience=patience - 1)
        self.window, self.num_values, self.total = window, 0, torch.zeros(())

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]
        self.total = self.total.to(metrics.device) + metrics.detach()
        self.num_values += 1
        if self.num_values < self.window:
            return
        mean = self.total / self.num_values
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        super().step(float(mean))
        self.num_values, self.total = 0, torch.zeros_like(self.total)


def group_parameters(model: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """Each trainable parameter in one of four lists.

    Returns:
        Matrices (weights of linear maps and convolutions, without the readout), embeddings, readout (the model's
        `output_weight_VD`, unless it is the embedding), and all others, which are small.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    readout = id(getattr(model, "output_weight_VD", None))
    groups: tuple[list[nn.Parameter], ...] = ([], [], [], [])
    for p in model.parameters():
        if p.requires_grad:
            kind = 1 if id(p) in embeddings else 2 if id(p) == readout else 0 if id(p) in matrices else 3
            groups[kind].append(p)
    return groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer over the trainable parameters of the model."""
    matrices, embeddings, readout, others = group_parameters(model)
    for name, there in (("embedding_lr", embeddings), ("readout_decay", readout)):
        if not there:
            refuse_unused(vars(config), OptimizerConfig, f"such weights in {type(model).__name__}", name)
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}
    groups = [
        adam | {"params": embeddings, "lr": config.embedding_lr or config.lr},
        adam | {"params": readout, "weight_decay": config.readout_decay},
        adam | {"params": others},
    ]
    if config.optimizer == "adamw":
        refuse_unused(vars(config), OptimizerConfig, "optimizer='muon'", "muon_lr", "muon_momentum")
        groups.append(adam | {"params": matrices, "weight_decay": config.weight_decay})
        optimizer: Any = AdamW([group for group in groups if group["params"]], fused=True)
        # Otherwise a gradient scaler leaves the unscaling to the step, and Lightning refuses to clip before it.
        optimizer._step_supports_amp_scaling = False
        return cast(Optimizer, optimizer)
    if not matrices:
        raise ValueError(f"optimizer='muon' needs linear layers to train, {type(model).__name__} has none: use 'adamw'")
    muon = {"lr": config.muon_lr, "momentum": config.muon_momentum, "weight_decay": config.weight_decay}
    return MuonAdamW([muon | {"params": matrices}, *(group for group in groups if group["params"])])


def build_scheduler(optimizer: Optimizer, config: OptimizerConfig, total_steps: float) -> LRScheduler | None:
    """Build the schedule over `total_steps` optimizer steps, to be stepped after each; None for a constant rate.

    Raises:
        ValueError: If the schedule decays over the run and the run has no end, or for settings of another schedule.
    """
    if config.schedule not in ("linear", "cosine"):
        refuse_unused(vars(config), OptimizerConfig, "schedule='linear' or 'cosine'", "final_lr_fraction")
    if config.schedule == "plateau":
        return WindowedPlateau(
            optimizer, factor=config.plateau_factor, patience=config.plateau_patience, window=config.plateau_window
        )
    plateau = ("plateau_factor", "plateau_patience", "plateau_window")
    refuse_unused(vars(config), OptimizerConfig, "schedule='plateau'", *plateau)
    if config.schedule == "constant" and not config.warmup_steps:
        return None
    if config.schedule != "constant" and not math.isfinite(total_steps):
        raise ValueError(
            f"schedule={config.schedule!r} decays over the run: set trainer.max_steps or trainer.max_epochs"
            " (trainer.max_time alone leaves the number of steps open)"
        )

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.schedule == "constant":
            return warmup
        progress = min(1.0, step / total_steps)
        remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return warmup * (config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining)

    return LambdaLR(optimizer, factor)
