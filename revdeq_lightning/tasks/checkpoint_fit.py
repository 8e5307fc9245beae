"""Check that a checkpoint fits the model and the optimizer of this run, with one-line errors."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from revdeq_lightning.errors import CheckpointError

Changes = dict[str, tuple[Any, Any]]
"""Settings that differ, by dotted name: in the checkpoint, in this run."""

KEPT = (
    *("lr", "embedding_lr", "muon_lr", "betas", "eps", "muon_momentum", "weight_decay", "readout_decay"),
    *("plateau_factor", "plateau_patience", "plateau_window"),
)
"""Settings stored in the state of an optimizer or schedule; resuming restores the checkpoint's values."""


def changed_settings(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Changes:
    """Settings that differ, among those that both have."""
    changes: Changes = {}
    for key in there.keys() & here.keys():
        then, now = there[key], here[key]
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            changes |= changed_settings(then, now, f"{prefix}{key}.")
        elif _plain(then) != _plain(now):
            changes[f"{prefix}{key}"] = then, now
    return dict(sorted(changes.items()))


def check_weights(there: Mapping[str, Any], here: Mapping[str, Any], changed: Changes) -> None:
    """Raise CheckpointError if names or shapes differ, with the first difference and the settings that may cause it."""
    faults = [f"{name} is missing in the checkpoint" for name in here if name not in there]
    faults += [f"{name} of the checkpoint is not in the model" for name in there if name not in here]
    shapes = {name: (_shape(there[name]), _shape(here[name])) for name in here if name in there}
    faults += [f"{name} is {a} in the checkpoint and {b} in the model" for name, (a, b) in shapes.items() if a != b]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        reasons = _described({k: v for k, v in changed.items() if k.startswith(("network.", "solver."))})
        raise CheckpointError(
            f"the checkpoint does not fit this model: {faults[0]}{more}; {reasons or 'it is of another kind of model'}:"
            " use the settings of its run (remove --config), or start over without --ckpt_path"
        )


def kept_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's settings that a resumed run keeps although they changed, with a warning.

    Raises:
        CheckpointError: If the kind of optimizer or schedule changed.
    """
    changed = changed_settings(there, here)
    then, now = _schedule(there), _schedule(here)
    if "optimizer" in changed or then != now:
        if "optimizer" in changed:
            then, now = (f"optimizer={name}" for name in changed["optimizer"])
        raise CheckpointError(
            f"the checkpoint holds the state of {then}, this run has {now}: use {then}, or start over without"
            " --ckpt_path"
        )
    kept = {key: changed[key] for key in KEPT if key in changed}
    if kept:
        rank_zero_warn(f"a resumed run keeps its optimizer's settings; changes without effect: {_described(kept)}")
    return {key: then for key, (then, _) in kept.items()}


def _schedule(optimizer: Mapping[str, Any]) -> str:
    """The kind of schedule, whose states differ; linear and cosine decay have the same."""
    kind, warmup = optimizer.get("schedule", "constant"), optimizer.get("warmup_steps", 0)
    if kind == "constant":
        return "schedule=constant with warmup_steps" if warmup else "schedule=constant without warmup_steps"
    return "schedule=plateau" if kind == "plateau" else "schedule=linear or cosine"


def _described(changes: Changes) -> str:
    return ", ".join(f"{name} {then} -> {now}" for name, (then, now) in changes.items())


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
