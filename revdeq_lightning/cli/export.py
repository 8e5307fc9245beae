"""Trained models for others: weights alone, language models in `transformers` and `lm-evaluation-harness`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from revdeq_lightning.cli.inference import (
    AS_TRAINED,
    ModelSettings,
    check_output,
    read_trained,
    replacing,
    solver_for,
    writing,
)
from revdeq_lightning.data.text.tokenizers import (
    AbstractTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    tokenizer_from_state,
    without_loss,
)
from revdeq_lightning.equilibrium.validation import require_count

END = "<|endoftext|>"
USUAL = {
    "bos_token": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", END),
    "eos_token": (END, "</s>", "<eos>", "[EOS]", "<|end_of_text|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
}
"""Names of the special tokens that begin, end, and pad texts; a file of a tokenizer does not say which do."""


def export_weights(
    ckpt_path: str, output: str | None = None, format: Literal["safetensors", "huggingface"] = "safetensors"
) -> str:
    """Write the model's weights (averaged weights, if any) to one safetensors file, or to a folder for transformers.

    The file's metadata hold the settings of the model as JSON, under `hyper_parameters`, and `global_step`. An existing
    file is left unchanged if that fails.

    Args:
        ckpt_path: Checkpoint of any task: a file, or the folder of a sharded one.
        output: File or folder to write; null: next to the checkpoint, with the suffix .safetensors, or without one.
        format: safetensors, or huggingface: a folder for `from_pretrained` of transformers (language models only).
    """
    from safetensors.torch import save_file

    path = Path(ckpt_path)
    if format == "huggingface":
        return export_folder(path, Path(output or path.with_suffix("")))
    target = check_output(output or path.with_suffix(".safetensors"), path)
    settings, weights, step = read_trained(path, "global_step")
    # Copies, as safetensors does not allow tied weights to share memory.
    tensors = {name: w.clone().contiguous() for name, w in weights.items()}
    with replacing(target) as file:
        save_file(tensors, file, {"hyper_parameters": json.dumps(settings), "global_step": str(step)})
    return f"{sum(w.numel() for w in tensors.values()):,} parameters in {len(tensors)} tensors, in {target}"


def export_folder(ckpt_path: Path, folder: Path) -> str:
    """Write weights, settings, and tokenizer for `from_pretrained`."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another --output")
    check_output(folder)
    model, tokenizer = load(ckpt_path)
    with replacing(folder) as whole:
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
    return f"{model.num_parameters():,} parameters and the tokenizer, in {folder}"


def evaluate(
    ckpt_path: str,
    tasks: str,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    output: str | None = None,
    device: str = "cpu",
    model: ModelSettings = AS_TRAINED,
) -> str:
    """Measure a language model on tasks of lm-evaluation-harness.

    Args:
        ckpt_path: Checkpoint of a training run.
        tasks: Names of tasks, separated by commas.
        include_path: Folder with the YAML files of tasks of your own, which replace those of the harness.
        num_fewshot: Solved examples before each question; null: as the task says.
        limit: Use only this number of examples of each task.
        batch_size: Number of texts at a time.
        output: JSON file for the results; null: none.
        device: cpu, cuda, ...
        model: What may differ from training.
    """
    _require("lm_eval", "evaluation")
    _require("accelerate", "evaluation")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    for count, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None:
            require_count(count, value, at_least=least)
    target = check_output(output) if output else None
    if include_path and not Path(include_path).is_dir():
        raise FileNotFoundError(f"no folder {include_path}: set --include_path to that of your tasks")
    if not (names := [name.strip() for name in tasks.split(",") if name.strip()]):
        raise ValueError("tasks must be names separated by commas, got none: see `lm_eval ls tasks`")
    known = TaskManager(include_path=include_path, include_defaults=include_path is None)  # all take half a minute
    if unknown := [name for name in names if not known.match_tasks([name])]:
        raise ValueError(f"no task {', '.join(unknown)}: see `lm_eval ls tasks`, or set --include_path to its folder")
    network, tokenizer = load(ckpt_path, model)
    settings = {"task_manager": known, "num_fewshot": num_fewshot, "limit": limit, "log_samples": False}
    try:
        # Without a token that begins texts, a line end does.
        start = tokenizer.encode("\n")[0] if tokenizer.bos_token_id is None else None
        harness = HFLM(network.to(device), "causal", tokenizer=tokenizer, batch_size=batch_size, prefix_token_id=start)
        results: Any = simple_evaluate(harness, tasks=names, **settings)
    except Exception as error:
        if isinstance(error, AssertionError) and "max tokens to generate" in str(error):
            raise ValueError(f"{error}: set generation_kwargs.max_gen_toks of the task") from None
        if "[UNK]" not in str(error):
            raise
        raise ValueError("the tasks need characters that the training text did not have, or a line end") from None
    if target:
        results["config"] |= {"model": str(ckpt_path), "model_args": asdict(model.solver), "batch_size": batch_size}
        with writing(target):
            target.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return str(make_table(results)).rstrip() + (f"\nResults in {target}" if target else "")


def load(ckpt_path: str | Path, model: ModelSettings = AS_TRAINED) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint as those of transformers. Raises the errors of `read_trained`."""
    _require("transformers", "huggingface")
    from revdeq_lightning.models.huggingface import RevDEQConfig, RevDEQForCausalLM

    settings, weights, state = read_trained(ckpt_path, "tokenizer")
    solver = vars(solver_for(settings, model)).copy()
    steps = solver.pop("max_steps")
    config = RevDEQConfig(settings["network"], solver, None if solver["solver"] == "none" else steps)
    whole = RevDEQForCausalLM(config).eval()
    whole.model.load_state_dict(weights)
    return whole, fast_tokenizer(tokenizer_from_state(state), config.max_position_embeddings)


def fast_tokenizer(ours: AbstractTokenizer, context_length: int) -> Any:
    """The same tokens for the same texts in transformers.

    Where no token ends texts, `<|endoftext|>` is added, which the model does not know.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    match ours:
        case ByteTokenizer():
            # Characters that stand for bytes: those below 256 for themselves, the others in order for the rest.
            signs = sorted(pre_tokenizers.ByteLevel.alphabet())
            others = (sign for sign in signs if ord(sign) >= 256)
            vocab = {chr(b) if chr(b) in signs else next(others): b for b in range(256)}
            same = Tokenizer(models.BPE(vocab, []))
            same.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            same.decoder = decoders.ByteLevel()
        case CharacterTokenizer():
            # Without an unknown token, an unknown character is an error, as in ours.
            same = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ours.characters)}))
            same.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            same.decoder = decoders.Fuse()
        case _:
            definition = json.loads(without_loss(ours.state()["definition"])) | {"post_processor": None}
            same = Tokenizer.from_str(json.dumps(definition))
    special = [token.content for token in same.get_added_tokens_decoder().values() if token.special]
    found = {kind: next((name for name in names if name in special), None) for kind, names in USUAL.items()}
    end = found["eos_token"] or END
    try:
        is_text = not special and bool(ours.encode(END))
    except ValueError:  # a character that the text did not have
        is_text = False
    return PreTrainedTokenizerFast(
        tokenizer_object=same,
        bos_token=found["bos_token"],
        eos_token=end,
        pad_token=found["pad_token"] or end,
        padding_side="left",
        split_special_tokens=is_text,
        clean_up_tokenization_spaces=False,
        model_max_length=context_length,
    )


def _require(package: str, extra: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'revdeq-lightning[{extra}]'") from None
