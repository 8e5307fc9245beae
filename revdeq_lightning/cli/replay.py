"""Repeats the step that made training diverge and reports which numbers are not finite."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from revdeq_lightning.checkpoints.files import read_checkpoint
from revdeq_lightning.equilibrium import equilibria, settle_checks
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.runs.divergence import WEIGHTS
from revdeq_lightning.runs.random_state import set_random_state
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.reasoning import ReasoningTask

TASKS: dict[str, Any] = {task.__name__: task for task in (LanguageModelingTask, ClassificationTask, ReasoningTask)}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def replay(file: str, device: str = "cpu") -> str:
    """Repeat the batches of a step that diverged, with its weights, random numbers and precision.

    The text tells the loss, what was raised, and the parameters whose gradient is not finite.

    Args:
        file: `RUN/diverged/step-N/process-R.ckpt`, which a run that diverges writes.
        device: cpu, cuda, ...
    """
    content = read_checkpoint(file)
    if content.get("task") not in TASKS or "batches" not in content:
        raise CheckpointError(f"{file} is not a saved batch of a diverged run: use RUN/diverged/step-N/process-R.ckpt")
    try:
        task = TASKS[content["task"]](**content["hyper_parameters"])
    except TypeError as error:
        raise CheckpointError(f"{file} has settings that this version does not have: {error}") from None
    task.load_state_dict(read_checkpoint(Path(file).with_name(WEIGHTS))["state_dict"])
    task.to(device, WHOLE.get(content["precision"])).train()
    task.log = lambda *_, **__: None  # there is no trainer
    lines = [f"Step {content['global_step'] + 1}, as recorded: {content['reason']}"]
    for number, entry in enumerate(content["batches"], 1):
        for layer, settings in zip(equilibria(task), entry["solvers"], strict=True):
            layer.solver = type(layer.solver)(**settings)
        set_random_state(entry["random_state"])
        batch = apply_to_collection(task.batch_type(**entry["batch"]), torch.Tensor, lambda t: t.to(device))
        lines.append(f"Batch {number} of {len(content['batches'])}: {_run(task, batch, content['precision'])}")
    return "\n".join(lines)


def _run(task: Any, batch: Any, precision: str) -> str:
    dtype = AUTOCAST.get(precision)
    context: Any = torch.autocast(task.device.type, dtype) if dtype else contextlib.nullcontext()
    task.zero_grad()
    try:
        with context:
            loss = task.training_step(batch, 0)["loss"]
        loss.backward()
        settle_checks()
    except RuntimeError as error:  # DivergenceError among others
        return f"{type(error).__name__}: {error}"
    parameters = [(name, p.grad) for name, p in task.named_parameters() if p.grad is not None]
    bad = [name for name, grad in parameters if not bool(grad.isfinite().all())]
    first = f", first {bad[0]}" if bad else ""
    return f"loss {loss.item():.6g}; of {len(parameters)} gradients {len(bad)} not finite{first}"
