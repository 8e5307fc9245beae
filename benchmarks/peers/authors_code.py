"""The authors' JAX code as a competitor, from a copy of their repository; imported in a separate process.

Three variants: `released`, `batched` (the same model with the batch inside f, which needs less memory and time than
the released batch of solves), and `checkpointed` (their backpropagation with checkpoints, which reconstructs
nothing; batch inside f).
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.released_names import our_name
from benchmarks.peers.tasks import Task

NEVER = 1e-30
"""Tolerance of their solver; 0 would stop it before the first step."""


class Competitor:
    """One compiled step: loss and gradients of every weight."""

    def __init__(self, task: Task, loss: Callable[..., Any], model: Any, inputs: tuple[Any, ...]) -> None:
        self.task, self.model, self.inputs = task, model, inputs
        self.compiled = eqx.filter_jit(eqx.filter_value_and_grad(loss)).lower(model, *inputs).compile()
        self.value: Any = None

    def step(self) -> None:
        self.value = None
        self.value = jax.block_until_ready(self.compiled(self.model, *self.inputs))

    def results(self) -> tuple[float, dict[str, np.ndarray]]:
        """Loss, and gradients under our parameter names."""
        self.step()
        loss, gradients = self.value
        leaves = jax.tree_util.tree_flatten_with_path(gradients)[0]
        named = {our_name(self.task.model, jax.tree_util.keystr(path)): np.asarray(leaf) for path, leaf in leaves}
        return float(loss), {name: gradient for name, gradient in named.items() if name}


def build(repository: Path, variant: str, task: Task, arrays: Mapping[str, np.ndarray]) -> Competitor:
    """Build the variant with these weights and inputs, in the precision of the arrays."""
    _import_path(repository)
    build_task = {"language": _language, "classifier": _classifier}[task.model]
    return build_task(repository, variant, task, arrays)


def _import_path(repository: Path) -> None:
    # Modules that their training loops need, but the models do not.
    for name in ("optax", "wandb", "transformers", "datasets"):
        sys.modules.setdefault(name, MagicMock())
    sys.path.insert(0, str(repository))


def _load(path: Path, dtype: Any) -> ModuleType:
    spec = importlib.util.spec_from_file_location("authors_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.W_DTYPE = dtype  # type: ignore[attr-defined]
    return module


def _filled(task: Task, model: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Their model with our weights; arrays without a counterpart (a norm never applied, the mask) are kept."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    filled = []
    for path, leaf in leaves:
        name = our_name(task.model, jax.tree_util.keystr(path)) if eqx.is_inexact_array(leaf) else None
        filled.append(jnp.asarray(arrays[name]).reshape(leaf.shape) if name else leaf)
    return jax.tree_util.tree_unflatten(structure, filled)


class _BatchInside(eqx.Module):
    """Their f for a whole batch: one solve instead of a batch of solves."""

    function: Any

    def __call__(self, z: Any, x: Any) -> Any:
        return eqx.filter_vmap(self.function)(z, x)


def _solve_batch(deq: Any, variant: str, x: Any) -> Any:
    import reversible_deq

    adjoint = deq.adjoint if variant == "batched" else reversible_deq.RecursiveCheckpointAdjoint()
    z0 = jnp.zeros(x.shape, jnp.float64)
    solution = reversible_deq.solve(_BatchInside(deq.function), z0, x, deq.solver, adjoint, deq.tol, deq.max_steps)
    return solution.z1.astype(x.dtype)


def _language(repository: Path, variant: str, task: Task, arrays: Mapping[str, np.ndarray]) -> Competitor:
    dtype = arrays["head.weight"].dtype
    module = _load(repository / "experiments" / "language" / "language-deq.py", dtype)
    import reversible_deq

    solver, adjoint = reversible_deq.Reversible(task.beta), reversible_deq.ReversibleAdjoint()
    sizes = (task.vocab_size, task.context, task.dim, task.num_heads)
    model = module.Model(*sizes, solver, adjoint, NEVER, task.num_steps, jax.random.PRNGKey(0))

    def batched_loss(model: Any, tokens: Any, targets: Any) -> Any:
        position = jax.vmap(model.pos_emb)(jnp.arange(task.context))
        x = jax.vmap(jax.vmap(model.tok_emb))(tokens) + position
        z = _solve_batch(model.deq, variant, x)
        log_p = jax.nn.log_softmax(jax.vmap(jax.vmap(model.head))(z))
        return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=2))

    loss = module.loss_fn if variant == "released" else batched_loss
    return Competitor(task, loss, _filled(task, model, arrays), (arrays["tokens"], arrays["targets"]))


def _classifier(repository: Path, variant: str, task: Task, arrays: Mapping[str, np.ndarray]) -> Competitor:
    dtype = arrays["head.weight"].dtype
    module = _load(repository / "experiments" / "vision" / "_models.py", dtype)
    channels, widths = task.channels, task.widths
    model, state = eqx.nn.make_with_state(module.ImplicitResNet)(
        (3, task.image_size, task.image_size),
        channels,
        widths,
        [task.num_steps] * len(channels),
        task.beta,
        NEVER,
        jax.random.PRNGKey(0),
    )

    def over_batch(function: Any) -> Any:
        return eqx.filter_vmap(function, axis_name="batch", in_axes=(0, None), out_axes=(0, None))

    def released_loss(model: Any, images: Any, labels: Any) -> Any:
        keys = jax.random.split(jax.random.PRNGKey(0), len(images))
        log_p, _, _ = eqx.filter_vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None, 0))(
            images, state, keys
        )
        return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))

    def batched_loss(model: Any, images: Any, labels: Any) -> Any:
        x, batch_state = over_batch(lambda image, s: model.encoder_norm(model.encoder_conv(image), s))(images, state)
        x = jax.nn.relu(x)
        for deq, down in zip(model.deq_layers, [*model.down_layers, None], strict=True):
            x = x + _solve_batch(deq, variant, x)
            if down is not None:
                x, batch_state = over_batch(down)(x, batch_state)
        logits = jax.vmap(lambda a: model.final_linear(model.pool(a).ravel()))(x)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

    loss = released_loss if variant == "released" else batched_loss
    return Competitor(task, loss, _filled(task, model, arrays), (arrays["images"], arrays["labels"]))
