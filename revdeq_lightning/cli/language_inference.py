"""Text from a checkpoint alone: it holds the settings of the model and the tokenizer. No Lightning in here."""

from pathlib import Path
from typing import Any, NamedTuple

from revdeq_lightning.checkpoints.files import other_checkpoint, read_checkpoint
from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
from revdeq_lightning.checkpoints.sharded import read_whole
from revdeq_lightning.data.text.tokenizers import AbstractTokenizer, tokenizer_from_state
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_language_model
from revdeq_lightning.models.generation import continue_text


class Trained(NamedTuple):
    """A checkpoint's settings, weights (the averaged ones, where it has them) and what else `state` names."""

    settings: dict[str, Any]
    weights: dict[str, Any]
    state: Any


def read_trained(ckpt_path: str | Path, state: str, kind: str, folder: str) -> Trained:
    """Read the checkpoint of a model of this kind.

    Args:
        ckpt_path: Checkpoint of a training run.
        state: Key of what such a model needs beside its weights.
        kind: What the model is, for the error.
        folder: Where training writes such runs, for the error.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or something else.
    """
    if not Path(ckpt_path).exists():
        raise FileNotFoundError(f"no checkpoint {ckpt_path}: training writes it to {folder}/NAME/DATE/checkpoints")
    try:
        checkpoint = load_checkpoint(Path(ckpt_path))
        settings, weights, needed = (checkpoint[key] for key in ("hyper_parameters", "state_dict", state))
    except KeyError as error:
        raise CheckpointError(f"{ckpt_path} is not a checkpoint of {kind} (it has no {error})") from None
    prefix = "model."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return Trained(settings, own, needed)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, of a file or of a sharded one's folder (without optimizers); no code in it is run."""
    try:
        content = read_checkpoint(path)
        return content | read_whole(path, "state_dict") if is_sharded_checkpoint(path) else content
    except CheckpointError as error:
        raise CheckpointError(f"{error}{other_checkpoint(path)}") from None


def load_language_model(ckpt_path: str | Path, device: str = "cpu") -> tuple[Any, AbstractTokenizer]:
    """Model and tokenizer of a checkpoint; errors as of `read_trained`."""
    settings, weights, tokenizer = read_trained(ckpt_path, "tokenizer", "a language model", "runs/lm")
    model = build_language_model(TransformerConfig(**settings["network"]), SolverConfig(**settings["solver"]))
    model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer_from_state(tokenizer)


def generate_text(
    ckpt_path: str,
    prompt: str = "\n",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    warm_start: bool = False,
) -> str:
    """Continue a text.

    Args:
        ckpt_path: Checkpoint of a training run.
        prompt: Text to continue.
        max_new_tokens: Tokens to add.
        temperature: 0 for the most likely token; below 1 safer, above 1 wilder.
        top_k: Draw among so many most likely tokens only.
        top_p: Draw among the most likely tokens that together have this probability.
        seed: Of the draws.
        device: cpu, cuda, ...
        warm_start: Of a solver with a tolerance: start each solve from the states of the last one, to save evaluations.
    """
    model, tokenizer = load_language_model(ckpt_path, device)
    return continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        warm_start=warm_start,
    )
