"""Commands that need only a checkpoint, which holds settings, tokenizer and class names.

They import Lightning only to prepare images.
"""

import csv
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from revdeq_lightning.checkpoints.files import other_checkpoint, read_checkpoint
from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
from revdeq_lightning.checkpoints.sharded import read_whole
from revdeq_lightning.data.text.tokenizers import AbstractTokenizer, tokenizer_from_state
from revdeq_lightning.equilibrium import settle_checks
from revdeq_lightning.equilibrium.validation import require_count
from revdeq_lightning.errors import CheckpointError
from revdeq_lightning.models import ClassifierConfig, ReasonerConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier, build_language_model, build_reasoner
from revdeq_lightning.models.classifier import AbstractClassifier
from revdeq_lightning.models.generation import continue_text

MODELS: dict[str, tuple[str, str, Any, Any]] = {
    "tokenizer": ("a language model", "runs/lm", TransformerConfig, build_language_model),
    "preprocessing": ("an image classifier", "runs/image", ClassifierConfig, build_image_classifier),
    "puzzles": ("a reasoner", "runs/reasoning", ReasonerConfig, build_reasoner),
}
"""By the entry that only such checkpoints have: their model, folder of runs, settings of the network, and builder."""


@dataclass
class SolverSteps:
    """How the equilibrium is found.

    Attributes:
        max_steps: Solver steps at the training size; null: as trained.
        rtol: Tolerance at which each puzzle stops; null: as trained.
    """

    max_steps: int | None = None
    rtol: float | None = None


@dataclass
class ModelSettings:
    """What may differ from training."""

    solver: SolverSteps = field(default_factory=SolverSteps)


AS_TRAINED = ModelSettings()


def check_output(path: str | Path, *inputs: str | Path) -> Path:
    """Raise OSError, before the work, if this file cannot be written, or would replace one of the inputs."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        if any(path.resolve() == Path(given).resolve() for given in inputs):
            raise FileExistsError(errno.EEXIST, "it is the input")
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; choose another --output") from None
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written; errors of other files name them."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) not in (None, str(path)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}; choose another --output") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file or folder replaces that of `path` at the end."""
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        yield Path(folder, path.name)
        Path(folder, path.name).replace(path)


def solver_for(settings: dict[str, Any], model: ModelSettings) -> SolverConfig:
    """The solver of a checkpoint's settings, with what is to differ."""
    changed = {name: value for name, value in asdict(model.solver).items() if value is not None}
    if changed and settings["network"].get("steps"):
        raise ValueError(
            f"the model has solver steps of its own for each stage, {settings['network']['steps']}: remove "
            + ", ".join(f"--model.solver.{name}" for name in changed)
        )
    if changed and settings["solver"]["solver"] == "none":
        raise ValueError("the model has no solver: remove " + ", ".join(f"--model.solver.{name}" for name in changed))
    own = {name: value for name, value in settings["solver"].items() if name != "reversible_stored_evaluations"}
    return SolverConfig(**own | changed)  # nothing is stored for a gradient here, which a tolerance would forbid


def read_trained(ckpt_path: str | Path, state: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Any]:
    """Read settings, weights (averaged weights, if any) and the entry `state`, such as one of `MODELS`.

    A missing file is a FileNotFoundError, a damaged one or one without this entry a CheckpointError.
    """
    kind, folder, *_ = MODELS.get(state, ("a training run", "runs/TASK"))
    if not Path(ckpt_path).exists():
        raise FileNotFoundError(f"no checkpoint {ckpt_path}: training writes it to {folder}/NAME/DATE/checkpoints")
    try:
        checkpoint = load_checkpoint(Path(ckpt_path))
        settings, weights, needed = (checkpoint[key] for key in ("hyper_parameters", "state_dict", state))
    except KeyError as error:
        raise CheckpointError(f"{ckpt_path} is not a checkpoint of {kind} (it has no {error})") from None
    return settings, {n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")}, needed


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file or, without optimizers, a sharded checkpoint's folder, without running code from it."""
    try:
        content = read_checkpoint(path)
        return content | read_whole(path, "state_dict") if is_sharded_checkpoint(path) else content
    except CheckpointError as error:
        raise CheckpointError(f"{error}{other_checkpoint(path)}") from None


def load_model(ckpt_path: str | Path, state: str, device: str, model: ModelSettings) -> tuple[Any, Any]:
    """Load the model of a checkpoint that has this entry of `MODELS`, and the entry."""
    *_, config, build = MODELS[state]
    settings, weights, needed = read_trained(ckpt_path, state)
    try:
        sizes = config(**settings["network"])
    except TypeError as error:
        raise CheckpointError(f"{ckpt_path} has settings that this version does not have: {error}") from None
    network = build(sizes, solver_for(settings, model))
    network.load_state_dict(weights)
    return network.to(device).eval(), needed


def load_language_model(
    ckpt_path: str | Path, device: str = "cpu", model: ModelSettings = AS_TRAINED
) -> tuple[Any, AbstractTokenizer]:
    """Load model and tokenizer of a checkpoint. Raises as `read_trained`."""
    network, tokenizer = load_model(ckpt_path, "tokenizer", device, model)
    return network, tokenizer_from_state(tokenizer)


def load_classifier(
    ckpt_path: str | Path, device: str = "cpu", model: ModelSettings = AS_TRAINED
) -> tuple[AbstractClassifier, dict[str, Any]]:
    """Load the model of a checkpoint and the preprocessing of its images. Raises as `read_trained`."""
    return load_model(ckpt_path, "preprocessing", device, model)


def load_reasoner(
    ckpt_path: str | Path, device: str = "cpu", model: ModelSettings = AS_TRAINED
) -> tuple[Any, dict[str, Any]]:
    """Load the model of a checkpoint and the settings of its kind of puzzle. Raises as `read_trained`."""
    return load_model(ckpt_path, "puzzles", device, model)


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
    model: ModelSettings = AS_TRAINED,
) -> str:
    """Continue a text.

    Args:
        ckpt_path: Checkpoint of a training run.
        prompt: Text to continue.
        max_new_tokens: Tokens to add.
        temperature: 0 for the most likely token; higher for more variety.
        top_k: Draw only from the k most likely tokens.
        top_p: Draw only from the most likely tokens with at least this total probability.
        seed: Random seed.
        device: cpu, cuda, ...
        warm_start: For solvers with a tolerance: start each solve from the last states, to save evaluations.
        model: What may differ from training.
    """
    network, tokenizer = load_language_model(ckpt_path, device, model)
    return continue_text(
        network,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        warm_start=warm_start,
    )


@torch.no_grad()
def predict_images(
    ckpt_path: str,
    images: str,
    output: str = "predictions.csv",
    batch_size: int = 64,
    undecodable: Literal["raise", "skip"] = "raise",
    device: str = "cpu",
    model: ModelSettings = AS_TRAINED,
) -> str:
    """Write the class probabilities of image files to a CSV file: path, most likely class, one column per class.

    Args:
        ckpt_path: Checkpoint of a training run.
        images: Image file, or folder, searched with its subfolders.
        output: CSV file to write.
        batch_size: Number of images at a time.
        undecodable: What to do with a file that cannot be decoded: raise, or skip with a warning.
        device: cpu, cuda, ...
        model: What may differ from training.
    """
    from revdeq_lightning.data.images.batches import preprocess_files
    from revdeq_lightning.data.images.decoding import find_images

    require_count("batch_size", batch_size)
    target = check_output(output, ckpt_path, images)
    classifier, state = load_classifier(ckpt_path, device, model)
    names = state["class_names"]
    paths = find_images(images)
    num_written = 0
    with writing(target), target.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "prediction", *names])
        for start in range(0, len(paths), batch_size):
            files, images_BCHW = preprocess_files(paths[start : start + batch_size], state, undecodable=undecodable)
            if not files:
                continue
            probabilities_BV = classifier(images_BCHW.to(device)).logits_BV.float().softmax(-1).cpu()
            settle_checks()
            for path, row in zip(files, probabilities_BV, strict=True):
                writer.writerow([path, names[int(row.argmax())], *(f"{p:.6f}" for p in row.tolist())])
            num_written += len(files)
    if not num_written:
        raise ValueError(f"none of the {len(paths)} files in {images} could be decoded")
    return f"{num_written:,} images, class probabilities in {output}"


@dataclass
class PuzzleFile:
    """What to solve.

    Attributes:
        path: Archive with the integer array `inputs`, `(N, L)` or `(N, H, W)`.
    """

    path: str


@torch.no_grad()
def predict_puzzles(
    ckpt_path: str,
    data: PuzzleFile,
    output: str = "predictions.npz",
    model: ModelSettings = AS_TRAINED,
    batch_size: int = 32,
    device: str = "cpu",
) -> str:
    """Write the answers to puzzles to an npz archive: `predictions`, of the shape of `inputs`, and `evaluations` of f.

    Args:
        ckpt_path: Checkpoint of a training run.
        data: What to solve.
        output: Archive to write.
        model: What may differ from training.
        batch_size: Number of puzzles at a time.
        device: cpu, cuda, ...
    """
    import numpy as np

    from revdeq_lightning.data.puzzles.kinds import checked
    from revdeq_lightning.data.puzzles.module import build_kind, read_npz

    require_count("batch_size", batch_size)
    target = check_output(output, ckpt_path, data.path)
    reasoner, kind_settings = load_reasoner(ckpt_path, device, model)
    inputs, _ = checked(
        build_kind(**kind_settings), read_npz(data.path, need_targets=False), data.path, use_targets=False
    )
    answers, made = [], []
    for start in range(0, len(inputs), batch_size):
        result = reasoner(torch.from_numpy(inputs[start : start + batch_size]).to(device))
        answers.append(result.logits.argmax(1).cpu().numpy())
        made.append(result.evaluations.cpu().numpy())
        settle_checks()
    with writing(target), target.open("wb") as file:
        np.savez_compressed(file, predictions=np.concatenate(answers), evaluations=np.concatenate(made))
    mean = float(np.concatenate(made).mean())
    return f"{len(inputs):,} puzzles, {mean:.1f} evaluations of f each, answers in {output}"
