"""Write a trained model for others: its weights, or a folder for `transformers`."""

import json
import os
from pathlib import Path
from typing import Literal

from revdeq_lightning.cli.huggingface import export_folder
from revdeq_lightning.cli.inference import check_output, load_checkpoint, weights_of_model
from revdeq_lightning.errors import CheckpointError


def export_weights(
    ckpt_path: str, output: str | None = None, format: Literal["safetensors", "huggingface"] = "safetensors"
) -> str:
    """Write the model's weights (averaged weights, if any) to one safetensors file, or to a folder for transformers.

    The file's metadata hold the settings of the model as JSON, under `hyper_parameters`, and `global_step`.

    Args:
        ckpt_path: Checkpoint of any task: a file, or the folder of a sharded one.
        output: File or folder to write; null: next to the checkpoint, with the suffix .safetensors, or without one.
        format: safetensors, or huggingface: a folder for `from_pretrained` of transformers (language models only).

    Raises:
        CheckpointError: If the checkpoint is damaged, or not of a training run.
        OSError: If there is no checkpoint, or the file cannot be written; an existing file is left unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(ckpt_path)
    if format == "huggingface":
        return export_folder(path, Path(output or path.with_suffix("")))
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    target = check_output(output or path.with_suffix(".safetensors"))
    try:
        checkpoint = load_checkpoint(path)
        weights, settings, step = (checkpoint[key] for key in ("state_dict", "hyper_parameters", "global_step"))
    except (ValueError, OSError):  # their messages already say what is wrong
        raise
    except Exception as error:  # torch raises many types for files that are not checkpoints
        raise CheckpointError(f"{path} is not a checkpoint of a training run ({type(error).__name__})") from None
    # Copies, as safetensors does not allow tied weights to share memory.
    tensors = {name: w.clone().contiguous() for name, w in weights_of_model(weights).items()}
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside, {"hyper_parameters": json.dumps(settings), "global_step": str(step)})
        beside.replace(target)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {target}: {error}; choose another --output") from None
    finally:
        beside.unlink(missing_ok=True)
    return f"{sum(w.numel() for w in tensors.values()):,} parameters in {len(tensors)} tensors, in {target}"
