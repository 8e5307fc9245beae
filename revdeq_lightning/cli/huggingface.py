"""Trained language models for `transformers` and `lm-evaluation-harness`, imported only where needed."""

import json
import tempfile
from pathlib import Path
from typing import Any

from revdeq_lightning.cli.inference import AS_TRAINED, ModelSettings, check_output, read_trained, solver_for, writing
from revdeq_lightning.data.text.tokenizers import (
    AbstractTokenizer,
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    _without_loss,
    tokenizer_from_state,
)
from revdeq_lightning.equilibrium.validation import require_count

END = "<|endoftext|>"


def export_folder(ckpt_path: Path, folder: Path) -> str:
    """Write weights, settings, and tokenizer for `from_pretrained`."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another --output")
    check_output(folder)
    model, tokenizer = load(ckpt_path)
    with writing(folder), tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside, folder.name)
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.replace(folder)
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
        include_path: Folder with the YAML files of tasks of your own.
        num_fewshot: Solved examples before each question; null: as the task says.
        limit: Use only this number of examples of each task.
        batch_size: Number of texts at a time.
        output: JSON file for the results; null: none.
        device: cpu, cuda, ...
        model: What may differ from training.
    """
    _require("lm_eval", "evaluation")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    require_count("batch_size", batch_size)
    target = check_output(output) if output else None
    names = tasks.split(",")
    for with_all in (False, True):  # reading the files of all tasks takes half a minute
        known = TaskManager(include_path=include_path, include_defaults=with_all)
        unknown = [name for name in names if not known.match_tasks([name])]
        if not unknown:
            break
    else:
        raise ValueError(f"no task {', '.join(unknown)}: see `lm_eval ls tasks`, or set --include_path to its folder")
    network, tokenizer = load(ckpt_path, model)
    # Begins a text; a line end where the model does not know the token that ends texts.
    start = tokenizer.eos_token_id if tokenizer.eos_token_id < network.config.vocab_size else tokenizer.encode("\n")[0]
    harness = HFLM(
        pretrained=network.to(device),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        prefix_token_id=start,
    )
    results: Any = simple_evaluate(
        harness, tasks=names, task_manager=known, num_fewshot=num_fewshot, limit=limit, log_samples=False
    )
    if target:
        with writing(target):
            target.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return str(make_table(results)).rstrip() + (f"\nResults in {target}" if target else "")


def load(ckpt_path: str | Path, model: ModelSettings = AS_TRAINED) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint as those of transformers. Raises the errors of `read_trained`."""
    _require("transformers", "huggingface")
    from transformers import GenerationConfig

    from revdeq_lightning.models.huggingface import RevDEQConfig, RevDEQForCausalLM

    settings, weights, state = read_trained(ckpt_path, "tokenizer", "a language model", "runs/lm")
    solver = vars(solver_for(settings, model)).copy()
    steps = solver.pop("max_steps")
    config = RevDEQConfig(settings["network"], solver, None if solver["solver"] == "none" else steps)
    whole = RevDEQForCausalLM(config).eval()
    whole.model.load_state_dict(weights)
    whole.generation_config = GenerationConfig()
    return whole, fast_tokenizer(tokenizer_from_state(state), config.max_position_embeddings)


def fast_tokenizer(ours: AbstractTokenizer, context_length: int) -> Any:
    """The same tokens for the same texts in transformers.

    `<|endoftext|>`, added where there is no such token, only pads and ends texts.

    Raises:
        ValueError: If the tokenizer is not one that this library can express.
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
        case BytePairTokenizer():
            definition = json.loads(_without_loss(ours.state()["definition"])) | {"post_processor": None}
            same = Tokenizer.from_str(json.dumps(definition))
        case _:
            raise ValueError(f"transformers has no tokenizer like {type(ours).__name__}: export without --format")
    special = [token.content for token in same.get_added_tokens_decoder().values() if token.special]
    end = END if END in special or not special else special[0]
    try:
        is_text = not special and bool(ours.encode(END))
    except ValueError:  # a character that the text did not have
        is_text = False
    return PreTrainedTokenizerFast(
        tokenizer_object=same,
        eos_token=end,
        pad_token=end,
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
