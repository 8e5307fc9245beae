"""Text for language models: windows of tokens in a reproducible, resumable order."""

import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from revdeq_lightning.data.loading.array_cache import ArrayCache, ArrayWriter, StoredArray, load_or_build
from revdeq_lightning.data.loading.base import AbstractDataModule, check_fractions, digest
from revdeq_lightning.data.loading.draws import Draws
from revdeq_lightning.data.loading.files import SPLITS
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX, PADDING, ResumableLoader
from revdeq_lightning.data.text import tokenizers
from revdeq_lightning.data.text.sources import SOURCES, Passage, read_files, read_huggingface, read_python, source_key
from revdeq_lightning.data.text.tokenizers import AbstractTokenizer
from revdeq_lightning.equilibrium.validation import require_choice, require_count
from revdeq_lightning.errors import CheckpointError

WINDOW_ORDERS = ("shuffled", "random")
_CACHE_FORMAT = 2
_MOST_BYTES_PER_TOKEN = 8
_LEARNED_BYTES = 100_000_000
_PREFIXES = ("", "validation_", "test_")
_FRACTIONS = ("validation_fraction", "test_fraction")
_LIMITS = ("max_train_bytes", "max_train_tokens", "max_eval_bytes")
_CONTENT_ARGUMENTS = ("text_column", *_FRACTIONS, *_LIMITS)


class TextBatch(NamedTuple):
    """Tokens and, for each, the token that follows (or `IGNORE_INDEX`): both int64, shape `(batch, context_length)`."""

    tokens: Tensor
    targets: Tensor


class TokenWindows(Dataset[TextBatch]):
    """Map a list of start positions to a batch of windows; positions outside the text are not predicted."""

    def __init__(self, tokens: StoredArray, context_length: int) -> None:
        self.tokens, self.context_length = tokens, context_length

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1)

    def __getitem__(self, starts: list[int]) -> TextBatch:
        first = np.asarray(starts, dtype=np.int64)[:, None]
        positions = first + np.arange(self.context_length + 1)
        exists = (first != PADDING) & (positions < len(self.tokens))
        window = self.tokens.array[np.where(exists, positions, 0)].astype(np.int64)
        tokens = np.where(exists, window, 0)[:, :-1]
        targets = np.where(exists, window, IGNORE_INDEX)[:, 1:]
        return TextBatch(torch.from_numpy(tokens), torch.from_numpy(np.ascontiguousarray(targets)))


class SplitStatistics(NamedTuple):
    """Size of what the evaluation of a complete split predicts, which is all but its first token.

    Attributes:
        num_tokens: Predicted tokens.
        num_bytes: UTF-8 bytes of the predicted text.
        num_words: Words as counted by WikiText: separated by white space, plus one end-of-line token per newline.
    """

    num_tokens: int
    num_bytes: int
    num_words: int


class TextDataModule(AbstractDataModule):
    """Next-token prediction on text: (tokens, targets) of shape `(batch, context_length)`, targets shifted by one.

    The training order is a function of seed and epoch only, split over the ranks without overlap; a run resumed from
    any checkpoint continues with the batch after the last trained one. Evaluation predicts every token of a split
    except the first exactly once; with several ranks, some windows or batches contain only `IGNORE_INDEX`.

    Args:
        source: "python" (source code of this Python's standard library, about 12 MB), "files" or "huggingface".
        path: For "files" a file, a folder, or a list of them, concatenated, with a line end between files: text in
            UTF-8 (or UTF-16 with a byte order mark), or JSON lines (`.jsonl`, `.ndjson`, and `.json` with a key
            `text_column`) or parquet with a column of texts; also compressed (`.gz`, `.bz2`, `.zst`, `.lz4`). For
            "huggingface" the dataset (`Salesforce/wikitext`), or a local folder with its parquet files or its
            `save_to_disk` copy.
        dataset_name: For "huggingface" the configuration (`wikitext-103-v1`).
        text_column: Column, or key, with the text of each row of a table.
        validation_path: For "files" the validation text. If it or `test_path` is given, the fractions are not used.
        test_path: For "files" the test text.
        tokenizer: "bytes", "characters", "bpe" (byte-level, learned here), "gpt2", the path of a tokenizer.json, or the
            name of a repository of the Hub with such a file (`HuggingFaceTB/SmolLM2-135M`).
        bpe_vocab_size: Tokens that "bpe" learns (fewer if the text has no more), including the 256 bytes.
        pad_vocab_size_to_multiple: Rounds `vocab_size` up (64: GPT-2's 50257 becomes 50304). Padding ids have no text.
        context_length: Number of tokens that a window predicts.
        batch_size: Number of windows per rank and step.
        window_order: "shuffled" (each token about once an epoch) or "random" (independent positions, as in nanoGPT).
        validation_fraction: Fraction of a text without splits, taken before the test part (0.1 with `test_fraction` 0:
            the last tenth). For "python", the approximate fraction of the files. 0: no such split.
        test_fraction: Likewise, the last part.
        max_train_bytes: Truncate the training text to this many bytes. None: all of it. With this or
            `max_train_tokens`, a dataset of the Hub is streamed, so that no more than needed is fetched, and the
            fractions are those of what was fetched.
        max_train_tokens: Likewise, in tokens.
        max_eval_bytes: Likewise for validation and test, each.
        num_workers: Data-loading processes per rank. 0 is fast enough for text.
        seed: Seed of the training order, not negative.
        cache_dir: Folder for tokenized texts.

    Raises:
        ValueError: If an argument is out of range or does not fit the text.
        FileNotFoundError, ConnectionError: If the text or the tokenizer cannot be found.
    """

    _items = "windows"

    def __init__(
        self,
        source: str = "python",
        path: str | list[str] | None = None,
        dataset_name: str | None = None,
        text_column: str = "text",
        validation_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 8192,
        pad_vocab_size_to_multiple: int = 1,
        context_length: int = 256,
        batch_size: int = 16,
        window_order: str = "shuffled",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        max_train_bytes: int | None = None,
        max_train_tokens: int | None = None,
        max_eval_bytes: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = "data/cache",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        require_choice("source", source, SOURCES)
        require_choice("window_order", window_order, WINDOW_ORDERS)
        tokenizers.check_tokenizer_name(tokenizer)
        self._require_counts("context_length", "pad_vocab_size_to_multiple", optional=_LIMITS)
        require_count("bpe_vocab_size", bpe_vocab_size, at_least=257)
        check_fractions(validation_fraction, test_fraction)
        if (path is None) != (source == "python"):
            advice = "takes no path" if source == "python" else "needs a path"
            raise ValueError(f'source "{source}" {advice}, got {path!r}.')
        if source != "files" and not (validation_path is None and test_path is None):
            raise ValueError(f'validation_path and test_path are for source "files", the source is "{source}".')
        if source != "huggingface":
            self._refuse_unused('source "huggingface"', "dataset_name")
        if source == "python":
            self._refuse_unused('source "files" or "huggingface"', "text_column")
        self._cache: ArrayCache | None = None
        self._tokenizer: AbstractTokenizer | None = None

    @property
    def tokenizer(self) -> AbstractTokenizer:
        """The tokenizer. Prepares the data if necessary."""
        if self._tokenizer is None:
            self._tokenizer = tokenizers.tokenizer_from_state(self.tokenizer_state())
        return self._tokenizer

    def tokenizer_state(self) -> dict[str, str]:
        """The tokenizer as plain containers, for `tokenizer_from_state`."""
        return dict(self._prepared().metadata["tokenizer"])

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, rounded up to `pad_vocab_size_to_multiple`. Prepares the data if necessary."""
        multiple: int = self.hparams["pad_vocab_size_to_multiple"]
        return -(-self.tokenizer.vocab_size // multiple) * multiple

    def split_statistics(self, split: str) -> SplitStatistics:
        """Tokens, bytes, and words that the evaluation of the split predicts."""
        self._tokens(split, at_least=2)
        return SplitStatistics(**self._prepared().metadata["statistics"][split])

    def setup(self, stage: str) -> None:
        # Fail here, not at the first evaluation, if a text is too short.
        self._tokens("train", at_least=self.hparams["context_length"] + 1)
        for split in self.splits:
            if self.split_statistics(split).num_words < 1 and split != "train":
                raise ValueError(f"the {split} text has no words, only spaces, so it has no perplexity: use more text.")
        self._announce()

    def found(self) -> dict[str, Any]:
        tokens = {split: len(self._by_split()[split]) for split in self.splits}
        return {"tokens": tokens, "left_out": self._prepared().metadata.get("left_out", [])}

    def train_dataloader(self) -> ResumableLoader:
        context_length = self.hparams["context_length"]
        tokens = self._tokens("train", at_least=context_length + 1)
        sizes = {"num_tokens": len(tokens), "context_length": context_length}
        order = partial(window_starts, **sizes, seed=self.hparams["seed"], order=self.hparams["window_order"])
        return self._training_loader(TokenWindows(tokens, context_length), count_windows(**sizes), order)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tokenizer": digest(self.tokenizer_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["tokenizer"] != digest(self.tokenizer_state()):
            raise CheckpointError(
                "the checkpoint was trained with a different vocabulary than this data "
                f'(tokenizer="{self.hparams["tokenizer"]}", {self.tokenizer.vocab_size} tokens): use the data settings '
                "of that run, or store its tokenizer_state() as JSON and set tokenizer to the file's path."
            )
        super().load_state_dict(state_dict)

    def _prepared(self) -> ArrayCache:
        if self._cache is None:
            hparams = self.hparams
            settings = {name: hparams[name] for name in _CONTENT_ARGUMENTS}
            if hparams["tokenizer"] == "bpe":
                settings["bpe_vocab_size"] = hparams["bpe_vocab_size"]
            content = source_key(hparams["source"], self._paths(), hparams["dataset_name"])
            key = digest([_CACHE_FORMAT, content, tokenizers.tokenizer_key(hparams["tokenizer"]), settings])
            file = f"{hparams['source']}-{Path(hparams['tokenizer']).stem}-{key}.arrays"
            path = Path(hparams["cache_dir"], file)
            self._cache = load_or_build(path, partial(self._tokenize, path))
        return self._cache

    def _paths(self) -> dict[str, Any]:
        paths = {split: self.hparams[f"{prefix}path"] for split, prefix in zip(SPLITS, _PREFIXES, strict=True)}
        return {split: path for split, path in paths.items() if path is not None}

    def _by_split(self) -> dict[str, StoredArray]:
        return self._prepared().arrays

    def _tokenize(self, path: Path, writer: ArrayWriter) -> dict[str, Any]:
        rank_zero_info(f"Tokenizing the text into {path} (once) ...")
        passages, left_out = self._passages(writer.folder)
        name, size = self.hparams["tokenizer"], self.hparams["bpe_vocab_size"]
        every = 1 + passages["train"].num_bytes // _LEARNED_BYTES if name == "bpe" else 1
        training_text = islice(passages["train"].blocks(), 0, None, every)
        tokenizer = tokenizers.build_tokenizer(name, bpe_vocab_size=size, training_text=training_text)
        statistics = {}
        for split, passage in passages.items():
            try:
                statistics[split] = self._tokenize_split(split, passage, tokenizer, writer)._asdict()
            except ValueError as error:
                raise ValueError(f"{split} text: {error}") from None
        return {"tokenizer": tokenizer.state(), "statistics": statistics, "left_out": left_out}

    def _passages(self, folder: Path) -> tuple[dict[str, Passage], list[str]]:
        """Write the text of each split into `folder`."""
        hparams, paths = self.hparams, self._paths()
        source, column, limit = hparams["source"], hparams["text_column"], hparams["max_train_bytes"]
        needed = min(filter(None, (limit, _MOST_BYTES_PER_TOKEN * (hparams["max_train_tokens"] or 0))), default=None)
        streaming = source == "huggingface" and needed is not None and not Path(paths["train"]).is_dir()
        left_out: list[str] = []
        if source == "python":
            texts = read_python(hparams["validation_fraction"], hparams["test_fraction"])
        elif source == "files":
            texts = read_files(paths, column, folder, left_out)
        else:
            texts = read_huggingface(paths["train"], hparams["dataset_name"], column, streaming, left_out)
        limits = {"train": limit, "validation": hparams["max_eval_bytes"], "test": hparams["max_eval_bytes"]}
        ends = 1 - hparams["validation_fraction"] - hparams["test_fraction"], 1 - hparams["test_fraction"]
        whole = source != "python" and list(texts) == ["train"]
        needs = limits | {"train": needed and math.ceil(needed / (ends[0] if whole else 1))} if streaming else {}
        passages = {s: Passage.write(folder / f"{s}.txt", text, needs.get(s)) for s, text in texts.items()}
        for split, passage in passages.items():
            if source == "files" and not passage.num_bytes:
                raise ValueError(f"the {split} text is empty ({paths[split]}): use a file with text.")
        if left_out and source == "huggingface":
            rank_zero_warn(f"{paths['train']}: left out: {'; '.join(left_out)}.")
        if whole:
            passages = dict(zip(SPLITS, passages["train"].divide(*ends), strict=True))
        return {s: passage.first_bytes(limits[s]) for s, passage in passages.items() if passage.num_bytes}, left_out

    def _tokenize_split(
        self, split: str, passage: Passage, tokenizer: AbstractTokenizer, writer: ArrayWriter
    ) -> SplitStatistics:
        limit = self.hparams["max_train_tokens"] if split == "train" else None
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        num_tokens, num_bytes, first = 0, passage.num_bytes if limit is None else 0, b""
        blocks = tqdm(passage.blocks(), f"Tokenizing the {split} text", passage.num_bytes >> 17, disable=None)
        for ids in tokenizer.encode_parts(blocks):
            if limit is not None:
                ids = ids[: limit - num_tokens]
                num_bytes += len(tokenizer.decode_bytes(ids))
            first = first or tokenizer.decode_bytes(ids[:1])
            writer.append(split, ids.astype(dtype))
            num_tokens += len(ids)
            if num_tokens == limit:
                break
        predicted = Passage(passage.path, passage.start + len(first), passage.start + num_bytes)
        return SplitStatistics(max(0, num_tokens - 1), predicted.num_bytes, predicted.count_words())

    def _tokens(self, split: str, at_least: int) -> StoredArray:
        advice = f"set {split}_fraction above 0 (or {split}_path)"
        if self.hparams["source"] == "huggingface" and self.hparams.get(f"{split}_fraction"):
            advice = f"save a copy with the split {split} by save_to_disk"
        tokens = self._of_split(self._by_split(), split, advice)
        if len(tokens) < at_least:
            raise ValueError(
                f"the {split} text has {len(tokens)} tokens, a window needs {at_least}: use more text, a larger "
                f"fraction or limit of it, or a smaller context_length than {self.hparams['context_length']}."
            )
        return tokens

    def _evaluation_loader(self, split: str) -> ResumableLoader:
        tokens = self._tokens(split, at_least=2)
        context_length = self.hparams["context_length"]
        num_windows = -(-(len(tokens) - 1) // context_length)
        windows, order = TokenWindows(tokens, context_length), lambda _: context_length * np.arange(num_windows)
        return self._loader(split, windows, num_windows, order)

    def _order_settings(self) -> dict[str, Any]:
        settings = {name: self.hparams[name] for name in ("seed", "context_length", "window_order")}
        prepared = self._prepared()
        return settings | {"num_tokens": len(prepared.arrays["train"]), "token_checksum": prepared.checksums["train"]}


def count_windows(num_tokens: int, context_length: int) -> int:
    """Number of training windows per epoch: as many as fit after any offset up to `context_length`, at least one."""
    return max(1, (num_tokens - context_length) // context_length)


def window_starts(epoch: int, *, num_tokens: int, context_length: int, seed: int, order: str) -> NDArray[np.int64]:
    """Start positions of the training windows of one epoch, a pure function of the arguments.

    "shuffled": windows whose targets do not overlap, from a random offset, shuffled. "random": independent uniform
    positions, as in nanoGPT.
    """
    draws, count = Draws(seed, epoch), count_windows(num_tokens, context_length)
    if order == "random":
        return draws.integers(num_tokens - context_length, count)
    windows = draws.permutation(count)
    offset = draws.integers(num_tokens - count * context_length, 1)  # all offsets that leave room for the windows
    return offset + context_length * windows
