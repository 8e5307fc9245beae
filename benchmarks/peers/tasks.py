"""The two training steps compared with the authors' code: sizes, inputs, and our implementation."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.core.reference import with_plain_loops
from revdeq_lightning.equilibrium import ReversibleAdjoint, ReversibleSolver
from revdeq_lightning.models import ClassifierConfig, TransformerConfig, TransformerLM, build_classifier


class Task(NamedTuple):
    """Sizes of a released `language` model or multi-scale `classifier`; only the fields of that model are used."""

    model: str
    num_steps: int
    beta: float
    batch: int
    vocab_size: int = 0
    context: int = 0
    dim: int = 0
    num_heads: int = 0
    channels: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    image_size: int = 32


def language(num_steps: int) -> Task:
    return Task("language", num_steps, beta=0.5, batch=8, vocab_size=512, context=128, dim=256, num_heads=8)


def classifier(num_steps: int) -> Task:
    return Task("classifier", num_steps, beta=0.8, batch=16, channels=(32, 64, 64, 32), widths=(1, 3, 3, 1))


def build_model(task: Task) -> nn.Module:
    solver = ReversibleSolver(beta=task.beta, max_steps=task.num_steps)
    adjoint = ReversibleAdjoint(mismatch="raise")
    if task.model == "language":
        config = TransformerConfig(
            vocab_size=task.vocab_size,
            context_length=task.context,
            d_model=task.dim,
            num_heads=task.num_heads,
            block="paper",
            double_projection=True,
        )
        return TransformerLM(config, solver, adjoint)
    sizes = ClassifierConfig(10, architecture="paper_stages", channels=list(task.channels), widths=list(task.widths))
    return build_classifier(sizes, solver, adjoint)


def make_arrays(task: Task, dtype: str) -> dict[str, np.ndarray]:
    """Weights under our names, and inputs.

    Not the initial weights, where zero biases are at the kinks of ReLUs and some parts have no effect.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        weights = {name: p + 0.05 * torch.randn_like(p) for name, p in build_model(task).named_parameters()}
    arrays = {name: weight.numpy().astype(dtype) for name, weight in weights.items()}
    if task.model == "language":
        tokens = torch.randint(task.vocab_size, (task.batch, task.context + 1)).numpy()
        return arrays | {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    images = torch.randn(task.batch, 3, task.image_size, task.image_size).numpy().astype(dtype)
    return arrays | {"images": images, "labels": torch.randint(10, (task.batch,)).numpy()}


class Competitor:
    """Our step: loss and gradients of every weight."""

    def __init__(self, task: Task, model: nn.Module, inputs: list[Tensor]) -> None:
        self.task, self.model, self.inputs = task, model, inputs
        self.loss: Tensor | None = None

    def step(self) -> None:
        self.model.zero_grad()
        first, second = self.inputs
        model: Any = self.model
        if self.task.model == "language":
            self.loss = model.loss(first, second).loss
        else:
            self.loss = F.cross_entropy(model(first).logits_BV, second)
        assert self.loss is not None
        self.loss.backward()  # type: ignore[no-untyped-call]

    def results(self) -> tuple[float, dict[str, np.ndarray]]:
        self.step()
        assert self.loss is not None
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        return self.loss.item(), {name: g.numpy() for name, g in gradients.items() if g is not None}


def build(variant: str, task: Task, arrays: dict[str, np.ndarray]) -> Competitor:
    """Build ours, `reversible` or `stored` (backpropagation through a plain loop), with these weights and inputs."""
    torch.set_num_threads(1)
    inputs = [torch.from_numpy(arrays[name].copy()) for name in list(arrays)[-2:]]
    weights = {name: torch.from_numpy(array.copy()) for name, array in list(arrays.items())[:-2]}
    model = build_model(task).to(weights["head.weight"].dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("running" in name or "num_batches" in name for name in missing)
    return Competitor(task, with_plain_loops(model) if variant == "stored" else model, inputs)
