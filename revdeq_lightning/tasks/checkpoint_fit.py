"""Check that a checkpoint fits the model and the optimizer of this run, with one-line errors."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from revdeq_lightning.errors import CheckpointError

Changes = dict[str, tuple[Any, Any]]
"""Settings that differ, by dotted name: in the checkpoint, in this run."""

KEPT_BY_OPTIMIZER = ("lr", "embedding_lr", "muon_lr", "betas", "eps", "muon_momentum", "weight_decay", "readout_decay")
"""Settings stored in an optimizer's state; resuming restores the checkpoint's values."""


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
    faults += [
        f"{name} is {_shape(there[name])} in the checkpoint and {_shape(here[name])} in the model"
        for name in here
        if name in there and _shape(there[name]) != _shape(here[name])
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        reasons = _described({k: v for k, v in changed.items() if k.startswith(("network.", "solver."))})
        raise CheckpointError(
            f"the checkpoint does not fit this model: {faults[0]}{more}; {reasons or 'it is of another kind of model'}:"
            " use the settings of its run (remove --config), or start over without --ckpt_path"
        )


def check_optimizer(changed: Changes) -> None:
    """Raise CheckpointError for another kind of optimizer, and warn of changed settings that have no effect."""
    own = {key.removeprefix("optimizer."): value for key, value in changed.items() if key.startswith("optimizer.")}
    if "optimizer" in own:
        then, now = own["optimizer"]
        raise CheckpointError(
            f"the checkpoint holds the state of optimizer={then}, this run has optimizer={now}: use {then}, or"
            " start over without --ckpt_path"
        )
    kept = {key: own[key] for key in KEPT_BY_OPTIMIZER if key in own}
    if kept:
        rank_zero_warn(f"a resumed run keeps its optimizer's settings; changes without effect: {_described(kept)}")


def _described(changes: Changes) -> str:
    return ", ".join(f"{name} {then} -> {now}" for name, (then, now) in changes.items())


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
