"""The weights of a checkpoint as one safetensors file; no Lightning in here."""

import json
import os
from pathlib import Path

from revdeq_lightning.cli.language_inference import load_checkpoint
from revdeq_lightning.errors import CheckpointError


def export_weights(ckpt_path: str, output: str | None = None) -> str:
    """Write the model's weights (the averaged ones, where there are such) to one file, without optimizer and position.

    The file's metadata hold the settings of the model as JSON, under `hyper_parameters`, and `global_step`.

    Args:
        ckpt_path: Checkpoint of any task: a file, or the folder of a sharded one.
        output: File to write; null: beside the checkpoint, with the ending .safetensors.

    Returns:
        One line for the user.

    Raises:
        CheckpointError: If the checkpoint is damaged, or something else.
        OSError: If there is no checkpoint, or the file cannot be written; one that was there is left as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(ckpt_path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    target = Path(output) if output else path.with_suffix(".safetensors")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    try:
        checkpoint = load_checkpoint(path)
        weights, settings, step = (checkpoint[key] for key in ("state_dict", "hyper_parameters", "global_step"))
    except (ValueError, OSError):  # they say what is wrong
        raise
    except Exception as error:  # torch raises many kinds for what is not a checkpoint
        raise CheckpointError(f"{path} is not a checkpoint of a training run ({type(error).__name__})") from None
    prefix = "model."
    # Each with its own memory: tied weights are one tensor under two names.
    tensors = {n.removeprefix(prefix): w.clone().contiguous() for n, w in weights.items() if n.startswith(prefix)}
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside, {"hyper_parameters": json.dumps(settings), "global_step": str(step)})
        beside.replace(target)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {target}: {error}; choose another --output") from None
    finally:
        beside.unlink(missing_ok=True)
    return f"{sum(w.numel() for w in tensors.values()):,} parameters in {len(tensors)} tensors, in {target}"
