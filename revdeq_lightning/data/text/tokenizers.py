"""Tokenizers described by plain containers, with `decode(encode(text)) == text` for every accepted text."""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from revdeq_lightning.data.loading.files import content_key, hub_file, read_text

TOKENIZERS = ("bytes", "characters", "bpe", "gpt2")
_PATH_FORMAT = 2  # 1 encoded with the truncation, padding, and stripped spaces of the file
_GPT2_REPOSITORY = "openai-community/gpt2"
_HUB_NAME = re.compile(r"\w[\w.-]*/(?!.*\.json$)\w[\w.-]*")
_WINDOW, _OVERLAP = 1 << 17, 1 << 11


class AbstractTokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int

    @abstractmethod
    def encode_parts(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Token ids of a text given in parts, in parts, whose sizes need not be those of the text."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | NDArray[np.int64]) -> bytes:
        """UTF-8 bytes of the tokens (a token may end within a character)."""

    @abstractmethod
    def state(self) -> dict[str, str]:
        """State for `tokenizer_from_state`, in plain containers."""

    def encode(self, text: str) -> list[int]:
        return [i for ids in self.encode_parts([text]) for i in ids.tolist()]

    def decode(self, ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text of the tokens; invalid UTF-8 (such as a split character) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _checked(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        array = np.asarray(ids, dtype=np.int64)
        beyond = array[(array < 0) | (array >= self.vocab_size)]
        if beyond.size:
            raise ValueError(
                f"token id {beyond[0]} is not one of the {self.vocab_size} tokens of the vocabulary (from 0): "
                "use the tokenizer that made the ids, and do not sample ids that only pad the vocabulary."
            )
        return array


class ByteTokenizer(AbstractTokenizer):
    """One token per UTF-8 byte."""

    vocab_size = 256

    def encode_parts(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        for text in texts:
            yield np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.int64]) -> bytes:
        return self._checked(ids).astype(np.uint8).tobytes()

    def state(self) -> dict[str, str]:
        return {"kind": "bytes"}


class CharacterTokenizer(AbstractTokenizer):
    """One token per Unicode character; `encode` rejects characters that are not in the training text."""

    def __init__(self, characters: Iterable[str]) -> None:
        found: set[str] = set()
        for block in characters:
            found |= set(block)
        self.characters = "".join(sorted(found))
        self.vocab_size = len(self.characters)
        self._code_points = _code_points(self.characters)

    def encode_parts(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        start = 0
        for text in texts:
            code_points = _code_points(text)
            ids = np.searchsorted(self._code_points, code_points).clip(max=self.vocab_size - 1)
            unknown = np.flatnonzero(self._code_points[ids] != code_points)
            if unknown.size:
                position = int(unknown[0])
                raise ValueError(
                    f"character {text[position]!r} (position {start + position}) is not among the {self.vocab_size} "
                    'characters of the training text: remove it, or use tokenizer="bytes", which knows every character.'
                )
            start += len(text)
            yield ids

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.int64]) -> bytes:
        return "".join(self.characters[i] for i in self._checked(ids)).encode("utf-8")

    def state(self) -> dict[str, str]:
        return {"kind": "characters", "characters": self.characters}


class BytePairTokenizer(AbstractTokenizer):
    """Byte-level byte-pair encoding as in GPT-2: merges of bytes, so that every text can be encoded.

    ValueError if the definition, JSON of the `tokenizers` library, is not a byte-level BPE that reproduces every text.
    """

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer, pre_tokenizers

        try:
            self._definition = Tokenizer.from_str(definition).to_str()
            self._tokenizer = Tokenizer.from_str(without_loss(self._definition))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"not the JSON of the tokenizers library ({error}): use a tokenizer.json.") from None
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        tokens = {i: self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)}
        ((characters, _),) = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(_ALL_BYTES)
        byte_of = {chr(b): b for b in range(256)} | dict(zip(characters, _ALL_BYTES.encode(), strict=True))
        try:
            self._bytes = [t.encode() if i in added else bytes(byte_of[c] for c in t) for i, t in tokens.items()]
            self._num_bytes = np.array([len(token) for token in self._bytes], dtype=np.int64)
            self._overlap = max(_OVERLAP, 4 * int(self._num_bytes.max(initial=0)))
            lossless = all(self.decode(self.encode(sample)) == sample for sample in (_ALL_KINDS, _ALL_BYTES))
        except (KeyError, ValueError):
            lossless = False
        if not lossless:
            raise ValueError(_LOSSY)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BytePairTokenizer":
        """Learn merges from large parts of a text until there are `vocab_size` tokens (or no more to learn).

        Stops reading after 3 MB of different words, each byte of which takes about 130 bytes of memory.
        """
        from tokenizers import Regex, models, pre_tokenizers, trainers

        tokenizer = _byte_level(models.BPE())
        used, cut = tokenizer.pre_tokenizer, pre_tokenizers.Split(Regex(_LONG_WORD), "merged_with_previous")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, used])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_whole_words(texts), trainer)
        tokenizer.pre_tokenizer = used
        return cls(tokenizer.to_str())

    def encode_parts(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        last = None
        for text, ids in self._encode(self._windows(texts)):
            if last is not None:
                last, ids = self._join(last, text, ids)
                yield last
            last = ids
        if last is not None:
            yield last

    def _encode(self, texts: Iterator[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Encode each text for itself, in all cores; batches bound the memory of the library's objects."""
        encode = partial(self._tokenizer.encode_batch_fast, add_special_tokens=False)
        batches = iter(lambda: list(islice(texts, 4 * (os.cpu_count() or 1))), [])
        with ThreadPoolExecutor(1) as pool:
            encoded = ((batch, pool.submit(encode, batch)) for batch in batches)
            # `pairwise` begins the next batch before the results of one are read.
            for (batch, future), _ in pairwise(chain(encoded, [([], Future[Any]())])):
                for text, encoding in zip(batch, future.result(), strict=True):
                    ids = np.array(encoding.ids, dtype=np.int64)
                    if self._num_bytes[ids].sum() != len(text.encode("utf-8")):
                        raise ValueError(_LOSSY)
                    yield text, ids

    def _windows(self, texts: Iterable[str]) -> Iterator[str]:
        """Parts of equal length, each of which begins with the last `_overlap` characters of the one before."""
        rest = ""
        for text in texts:
            rest, start = rest + text, 0
            while len(rest) - start >= _WINDOW + self._overlap:
                yield rest[start : start + _WINDOW + self._overlap]
                start += _WINDOW
            rest = rest[start:]
        if rest:
            yield rest

    def _join(self, left: NDArray[np.int64], text: str, right: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Cut two windows at a token of both, so that together they have the tokens of the undivided text.

        Only near its ends can the tokens of a window differ from those. If they differ inside the overlap, as in a run
        of one character or number, the right window begins at a token of the left one instead, where they agree.
        """
        content, overlap = text.encode("utf-8"), len(text[: self._overlap].encode("utf-8"))
        starts, others = (np.cumsum(self._num_bytes[ids]) - self._num_bytes[ids] for ids in (left, right))
        starts += overlap - self._num_bytes[left].sum()  # from the start of the right window
        first, last = np.searchsorted(starts, (overlap // 4, overlap * 3 // 4))
        other = np.searchsorted(others, starts[first])
        if starts[first] in others and np.array_equal(left[first:last], right[other : other + last - first]):
            return left[:first], right[other:]
        whole = [i for i in range(first, last) if content[starts[i]] & 0xC0 != 0x80]  # not within a character
        for cut in whole[:16]:
            ((_, right),) = self._encode(iter([content[starts[cut] :].decode("utf-8")]))
            if np.array_equal(left[cut:last], right[: last - cut]):
                break
        return left[:cut], right

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.int64]) -> bytes:
        return b"".join(self._bytes[i] for i in self._checked(ids))

    def state(self) -> dict[str, str]:
        return {"kind": "bpe", "definition": self._definition}


def tokenizer_from_state(state: dict[str, str]) -> AbstractTokenizer:
    """Create the tokenizer described by `state()`."""
    match state:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "characters", "characters": characters}:
            return CharacterTokenizer(characters)
        case {"kind": "bpe", "definition": definition}:
            return BytePairTokenizer(definition)
    raise ValueError(f"not the state of a tokenizer: keys {sorted(state)}, kind {state.get('kind')!r}.")


def build_tokenizer(name: str, *, bpe_vocab_size: int, training_text: Iterable[str]) -> AbstractTokenizer:
    """Build a tokenizer by name; "characters" and "bpe" learn from the training text, in large parts.

    A path is that of a `tokenizer.json`, or of a folder with it or with `vocab.json` and `merges.txt`.
    """
    check_tokenizer_name(name)
    match name:
        case "bytes":
            return ByteTokenizer()
        case "characters":
            return CharacterTokenizer(training_text)
        case "bpe":
            return BytePairTokenizer.train(training_text, bpe_vocab_size)
        case "gpt2":
            name = _GPT2_REPOSITORY
    if Path(name).exists():
        return _tokenizer_from_path(Path(name))
    advice = 'download tokenizer.json elsewhere and pass its path as tokenizer, or use tokenizer="bpe"'
    if (path := hub_file(name, "tokenizer.json", advice)) is None:
        raise FileNotFoundError(f"{name} has no tokenizer.json: use another tokenizer.")
    return _tokenizer_from_path(path)


def check_tokenizer_name(name: str) -> None:
    """Raise ValueError if `name` is neither a known tokenizer nor an existing path, and cannot be one of the Hub."""
    if name not in TOKENIZERS and not Path(name).exists() and not _HUB_NAME.fullmatch(name):
        known = f"one of {', '.join(TOKENIZERS)} or an existing path, or OWNER/NAME on the Hub"
        raise ValueError(f'tokenizer must be {known}, got "{name}".')


def tokenizer_key(name: str) -> str:
    """Key that distinguishes tokenizers of the same name by the content of the files, if `name` is a path."""
    path = Path(name)
    if name in TOKENIZERS or not path.exists():
        return name
    files = [path] if path.is_file() else [path / file for file in ("tokenizer.json", "vocab.json", "merges.txt")]
    names = (str(file.relative_to(path.parent)) for file in files if file.is_file())
    return f"{content_key(path.parent, names)}:{_PATH_FORMAT}"


def _tokenizer_from_path(path: Path) -> AbstractTokenizer:
    from tokenizers import models

    definition = path / "tokenizer.json" if path.is_dir() else path
    if definition.is_file():
        text = "".join(read_text(definition))
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{definition} is not JSON ({error}): use the file of a byte-level BPE.") from None
        return tokenizer_from_state(content) if "kind" in content else BytePairTokenizer(text)
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise FileNotFoundError(f"{path} holds neither tokenizer.json nor vocab.json and merges.txt.")
    return BytePairTokenizer(_byte_level(models.BPE.from_file(str(vocab), str(merges))).to_str())


def without_loss(definition: str) -> str:
    """The definition without what drops, adds or varies tokens: truncation, padding, stripped spaces, dropout."""
    content = json.loads(definition) | {"truncation": None, "padding": None}
    content["added_tokens"] = [token | {"lstrip": False, "rstrip": False} for token in content["added_tokens"]]
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
    return json.dumps(content)


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


# The pattern of GPT-2 splits there, whatever surrounds it.
_LAST_WORD_END = re.compile(r"(?s:.*)(?<=\S)(?=[ \t\n\r])")
_WORD = re.compile(r"\w+|[^\w\s]+")


def _whole_words(texts: Iterable[str], max_distinct: int = 3_000_000) -> Iterator[str]:
    rest, words, num_distinct = "", set[str](), 0
    for text in texts:
        rest += text
        end = found.end() if (found := _LAST_WORD_END.match(rest)) else len(rest)
        yield rest[:end]
        new = set(_WORD.findall(rest, 0, end)) - words
        words |= new
        num_distinct += sum(map(len, new))
        if num_distinct > max_distinct:
            return
        rest = rest[end:]
    yield rest


# Learning a BPE takes the square of the length of a word, such as DNA of megabytes: words are cut there.
_LONG_WORD = r"[^\W\d_]{1000}|\d{1000}|(?:[^\w\s]|_){1000}|\s{1000}"

# Characters with all bytes that may occur in UTF-8.
_CODE_POINTS = (*range(0x100), *range(0x100, 0x800, 0x40), 0x800, *range(0x1000, 0x10000, 0x1000))
_ALL_BYTES = "".join(map(chr, (*_CODE_POINTS, 0x10000, *range(0x40000, 0x110000, 0x40000))))
_LOSSY = (
    "this tokenizer does not reproduce a text exactly, so it has no bits per byte: use a byte-level BPE without "
    'normalizer (GPT-2\'s, or tokenizer="bpe").'
)
_ALL_KINDS = " Some  words, 12 \n\n\tÄe\u0301\u00a0\u6f22\U0001f642 \r\n"
# The library's threads do not survive a fork: a forked child must tokenize without them, or it hangs. The library
# handles this, but warns in each DataLoader worker, although workers never tokenize.
if "TOKENIZERS_PARALLELISM" not in os.environ and hasattr(os, "register_at_fork"):
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))
