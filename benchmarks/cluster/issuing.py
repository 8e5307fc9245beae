"""Time that Python and PyTorch need to issue a training step, for `benchmarks.cluster.scaling`.

The models of the configurations with all widths reduced to a minimum: the same operations with almost no computation.
On a GPU, where a kernel launch replaces this small computation, a step takes at least this time for any number of
samples.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from revdeq_lightning.models import ClassifierConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier, build_language_model
from revdeq_lightning.tasks.optimizers import OptimizerConfig, build_optimizer

WARMUP, STEPS = 5, 25


class Issued(NamedTuple):
    """Seconds of processor time per step, and its number of PyTorch operations."""

    seconds: float
    operations: int


def issue(settings: dict[str, Any]) -> Issued:
    """Time the steps of a configuration: loss, gradients in bfloat16 autocast, optimizer; one thread."""
    # Without a tolerance, so that all steps are issued.
    solver = SolverConfig(**settings["model"]["solver"] | {"rtol": 0.0})
    model, loss = shrunk(settings["model"]["network"], solver, "context_length" in settings["data"])
    optimizer = build_optimizer(model, OptimizerConfig(**settings["model"]["optimizer"]))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(WARMUP + STEPS):
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    with _Counter() as counter:
        step()
    torch.set_num_threads(threads)
    return Issued(statistics.median(seconds[WARMUP:]), counter.operations)


def shrunk(network: dict[str, Any], solver: SolverConfig, is_text: bool) -> tuple[Any, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    if is_text:
        config = TransformerConfig(64, 8, **network | {"d_model": 2 * network["num_heads"]})
        model: Any = build_language_model(config, solver)
        tokens = torch.randint(64, (1, 9))
        return model, lambda: model.loss(tokens[:, :-1], tokens[:, 1:]).loss
    network = network | {"channels": [8] * len(network["channels"])}
    model = build_image_classifier(ClassifierConfig(num_classes=10, **network), solver)
    images = torch.randn(2, 3, 64, 64)
    return model, lambda: model(images).logits_BV.float().sum()


class _Counter(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))
