"""The weights of a checkpoint as one safetensors file; no Lightning in here."""

import json
from pathlib import Path

from revdeq_lightning.checkpoints import CheckpointError
from revdeq_lightning.tasks.inference import load_checkpoint


def export_weights(ckpt_path: str, output: str | None = None) -> str:
    """Write the model's weights (the averaged ones, where there are such) to one file, without optimizer and position.

    The file's metadata hold the settings of the model as JSON, under `hyper_parameters`, and `global_step`.

    Args:
        ckpt_path: Checkpoint of any task: a file, or the folder of a sharded one.
        output: File to write; null: beside the checkpoint, with the ending .safetensors.

    Returns:
        One line for the user.
    """
    from safetensors.torch import save_file

    path = Path(ckpt_path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    target = Path(output) if output else path.with_suffix(".safetensors")
    try:
        checkpoint = load_checkpoint(path)
        weights, settings, step = (checkpoint[key] for key in ("state_dict", "hyper_parameters", "global_step"))
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for what is not a checkpoint
        raise ValueError(f"{path} is not a checkpoint of a training run ({type(error).__name__})") from None
    prefix = "model."
    # Each with its own memory: tied weights are one tensor under two names.
    tensors = {n.removeprefix(prefix): w.clone().contiguous() for n, w in weights.items() if n.startswith(prefix)}
    save_file(tensors, target, {"hyper_parameters": json.dumps(settings), "global_step": str(step)})
    return f"{sum(w.numel() for w in tensors.values()):,} parameters in {len(tensors)} tensors, in {target}"
