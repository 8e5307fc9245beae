import json
import random
import subprocess
import sys
import time
import zlib

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from revdeq_lightning.data.text import tokenizers as ours
from revdeq_lightning.data.text.tokenizers import (
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    build_tokenizer,
    tokenizer_from_state,
)
from tests.helpers.data import refused

TEXT = "def f(x):\n    return x  # caf\u00e9, \u6f22\u5b57\n\n\nprint('the the then there', 123)\n" * 20
BPE = BytePairTokenizer.train([TEXT], 280)


def build(name, **options):
    return build_tokenizer(name, **{"bpe_vocab_size": 280, "training_text": [TEXT]} | options)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


@given(st.text())
def test_bytes_are_the_utf8_encoding(text):
    tokenizer = ByteTokenizer()
    assert bytes(tokenizer.encode(text)) == text.encode() == tokenizer.decode_bytes(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(alphabet=sorted(set(TEXT))))
def test_characters_are_positions_in_the_sorted_alphabet(text):
    tokenizer = CharacterTokenizer(TEXT)
    alphabet = sorted(set(TEXT))
    assert tokenizer.encode(text) == [alphabet.index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(alphabet)


@given(st.text() | st.text(alphabet="ab \n\t\u00e9\u6f22\U0001f642'1") | st.sampled_from([TEXT]))
def test_bpe_gives_every_text_back(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert b"".join(BPE.decode_bytes([i]) for i in ids) == text.encode()
    assert BPE.vocab_size == 280 > max(ids, default=0)


def test_a_long_text_has_the_ids_of_earlier_versions():
    lines = (f"Line {i}: the {i * i}th caf\u00e9,\tand it's {i % 7} so  on . \n" for i in range(4000))
    runs = "=" * 3000 + "ACGT" * 3000 + "\u6f22\u5b57\u3002" * 3000 + "\r\n" * 50 + " " * 3000
    text = "".join(lines) + runs
    # Recorded once: other ids would make every checkpoint trained before useless.
    tokenizer = BytePairTokenizer.train([text], 600)
    assert zlib.crc32(tokenizer.state()["definition"].encode()) == 2552110913
    ids = np.array(tokenizer.encode(text), dtype=np.uint16)
    assert (len(ids), zlib.crc32(ids.tobytes())) == (96_217, 2217780988)


# Llama 3's pattern; digits in groups, and tokens of spaces, make a part of a text depend on where it begins.
GROUPS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(pattern):
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sample = TEXT + "".join(f"{i**3} it's{' ' * (i % 9)}so.\n" for i in range(5000))
    library.train_from_iterator([sample], trainer)
    library.add_tokens([AddedToken(" " * count, normalized=False) for count in (2, 4, 24)])
    library.add_special_tokens(["<|endoftext|>"])
    return BytePairTokenizer(library.to_str())


REPEATED = ("a", " ", "\n", "--", "1", " . \n", "abcabd")
MIXED = ("0123456789", "ACGT", "\u6f22\u5b57\u3002a", "ab1'st .\r\n\t\U0001f642\u00e9\u0301")
MAKERS = [
    *(lambda count, kind=kind: kind * (1 + count // len(kind)) for kind in REPEATED),
    *(lambda count, kind=kind: "".join(random.Random(count).choices(kind, k=count)) for kind in MIXED),
    lambda count: (TEXT + "<|endoftext|>")[count % 97 :][:count],
]
PARTS = st.lists(st.tuples(st.sampled_from(MAKERS), st.integers(1, 900)), min_size=1, max_size=9)


TOKENIZERS = {"gpt2": BPE, "llama3": tokenizer_of(GROUPS), "lines": tokenizer_of(".+|\n+")}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=60)
@given(parts=PARTS, sizes=st.sampled_from([(500, 128), (1000, 256), (128, 128)]))
def test_the_ids_are_those_of_the_whole_text_however_it_is_cut(tokenizer, parts, sizes):
    text = "".join(make(count) for make, count in parts)
    expected = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_WINDOW", sizes[0])
        patch.setattr(tokenizer, "_overlap", sizes[1])
        assert np.concatenate(list(tokenizer.encode_parts([text[:77], text[77:]]))).tolist() == expected


def test_learning_does_not_depend_on_how_the_text_is_cut(monkeypatch):
    parts = [TEXT[start : start + 37] for start in range(0, len(TEXT), 37)]
    assert BytePairTokenizer.train(parts, 280).state() == BPE.state()
    words = (f"{i**5 % 10**9:09d} " * 1000 for i in range(10**6))  # an endless text
    assert sum(map(len, ours._whole_words(words, max_distinct=900))) < 1.1e6


def test_bpe_training_is_deterministic_across_processes():
    code = "; ".join(  # the file alone: importing the package would cost seconds
        [
            "import sys, runpy",
            "module = runpy.run_path(sys.argv[1])",
            "print(module['BytePairTokenizer'].train([sys.argv[2]], 280).state()['definition'])",
        ]
    )
    run = subprocess.run([sys.executable, "-c", code, ours.__file__, TEXT], capture_output=True, check=True)
    assert json.loads(run.stdout) == json.loads(BPE.state()["definition"])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer(TEXT), BPE], ids=["bytes", "chars", "bpe"])
def test_state_survives_a_weights_only_checkpoint_and_knows_the_vocabulary(tokenizer, tmp_path):
    torch.save(tokenizer.state(), tmp_path / "state.pt")
    restored = tokenizer_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.encode(TEXT) == tokenizer.encode(TEXT)
    assert restored.vocab_size == tokenizer.vocab_size
    for bad in (tokenizer.vocab_size, -1):
        with refused(f"token id {bad} is not one of the {tokenizer.vocab_size} tokens"):
            restored.decode([0, bad])


def test_tokenizer_from_files_equals_the_trained_one(tmp_path):
    definition = json.loads(BPE.state()["definition"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "state.json").write_text(json.dumps(BPE.state()), encoding="utf-8-sig")  # Windows adds a mark
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in definition["model"]["merges"]]
    (tmp_path / "two" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "state.json", tmp_path / "two"):
        assert build(str(path)).encode(TEXT) == BPE.encode(TEXT)


def test_a_tokenizer_of_the_hub_is_read_from_its_cache_without_any_network(no_hub, monkeypatch, tmp_path):
    asked = []

    def cached_only(*arguments, repo_type, local_files_only):
        asked.append((*arguments, local_files_only))
        return str(tmp_path / "stored")

    (tmp_path / "stored").write_text(BPE.state()["definition"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached_only)
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M"):
        assert build(name).encode(TEXT) == BPE.encode(TEXT)
    repositories = ("openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M")
    assert asked == [(repository, "tokenizer.json", True) for repository in repositories]
    for name in ("runs/tokenizer.json", "../tokenizer", "a/b/c"):
        with refused("or an existing path, or OWNER/NAME on the Hub, got"):
            build(name)


def test_offline_mode_asks_no_hub(no_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked the hub"))
    with refused("not reachable", ConnectionError):
        build("gpt2")


def test_an_unknown_character_is_named_with_its_position():
    with refused(r"character '\u00e9' \(position 3\) .* 3 characters .*tokenizer=\"bytes\""):
        CharacterTokenizer("abc").encode("aba\u00e9")
    with refused("character 'z'"):  # beyond the last known one
        CharacterTokenizer("abc").encode("z")


def test_settings_of_a_tokenizer_neither_drop_nor_add_nor_vary_tokens(tmp_path):
    library = Tokenizer.from_str(BPE.state()["definition"])
    library.enable_truncation(5)
    library.enable_padding(length=900)
    library.model.dropout = 0.5
    (tmp_path / "saved.json").write_text(library.to_str())
    tokenizer = build(str(tmp_path / "saved.json"))
    assert tokenizer.encode(TEXT) == BPE.encode(TEXT)
    assert json.loads(tokenizer.state()["definition"]) == json.loads(library.to_str())  # that of earlier versions


def test_tokenizers_that_change_texts_are_refused():
    def changed(**parts):
        library = Tokenizer.from_str(BPE.state()["definition"])
        for name, part in parts.items():
            setattr(library, name, part)
        return library

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    unseen = Tokenizer(models.BPE())  # bytes that its training text lacks
    unseen.pre_tokenizer, unseen.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    unseen.train_from_iterator([TEXT + ours._ALL_KINDS], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    lower, prefixed = normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=True)
    for library in (words, unseen, changed(normalizer=lower), changed(pre_tokenizer=prefixed)):
        with refused("does not reproduce a text exactly"):
            BytePairTokenizer(library.to_str())
    tokenizer = BytePairTokenizer(changed(normalizer=normalizers.Replace("the", "a")).to_str())
    assert tokenizer.decode(tokenizer.encode("a text")) == "a text"  # no check of a sample finds the next
    with refused("does not reproduce a text exactly"):
        tokenizer.encode("the text")


def test_vocabularies_with_special_tokens_and_with_gaps():
    library = Tokenizer.from_str(BPE.state()["definition"])
    library.add_special_tokens(["<|endoftext|>"])
    tokenizer = BytePairTokenizer(library.to_str())
    assert tokenizer.vocab_size == 281
    assert tokenizer.encode("a<|endoftext|>") == [*BPE.encode("a"), 280]
    assert tokenizer.decode([280]) == "<|endoftext|>"
    definition = json.loads(BPE.state()["definition"])
    definition["model"]["vocab"] = {t: i + 50 * (i >= 260) for t, i in definition["model"]["vocab"].items()}
    tokenizer = BytePairTokenizer(json.dumps(definition))
    assert tokenizer.vocab_size == 330
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("alphabet", ["ACGT", "0123456789", " ", "-"])
def test_learning_and_encoding_take_linear_time_in_a_text_of_one_word(alphabet):
    def seconds(count):
        text = "".join(random.Random(0).choices(alphabet, k=count))
        start = time.process_time()
        tokenizer = BytePairTokenizer.train([text], 270)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return time.process_time() - start

    times = [min(seconds(count) for _ in range(2)) for count in (20_000, 80_000)]
    assert times[1] < 10 * times[0]  # 4 if linear, with a part that is constant; 16 if quadratic


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "not json", "is not JSON"),
        ("tokenizer.json", '{"a": 1}', "not the JSON of the tokenizers library"),
        ("tokenizer.json", '{"kind": "words"}', "kind 'words'"),
        ("other.json", "{}", "neither tokenizer.json nor vocab.json"),
    ],
)
def test_unusable_files_are_told(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with refused(message, (ValueError, FileNotFoundError)):
        build(str(tmp_path))
