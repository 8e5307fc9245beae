"""Windows of a text in training and evaluation, and runs that resume between any two of them."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.data.text.module import window_starts
from tests.helpers.data import (
    ALL_FOR_TRAINING,
    PROSE,
    SaveAt,
    data_module,
    fit,
    fit_two_ranks,
    recorded,
    refused,
    split_ids,
    statistics_of,
    text_module,
)
from tests.helpers.processes import run_apart


@pytest.fixture
def module(tmp_path):
    return partial(text_module, tmp_path)


@pytest.mark.parametrize("order", ["shuffled", "random"])
@pytest.mark.parametrize(("num_tokens", "context_length"), [(9, 8), (16, 8), (17, 8), (24, 8), (200, 7), (1000, 64)])
def test_training_windows_lie_within_the_text(order, num_tokens, context_length):
    sizes = {"num_tokens": num_tokens, "context_length": context_length, "order": order}
    epochs = [window_starts(epoch, seed=1, **sizes) for epoch in range(1000)]
    assert len({len(starts) for starts in epochs}) == 1
    assert min(starts.min() for starts in epochs) == 0
    assert max(starts.max() for starts in epochs) == num_tokens - context_length - 1  # the last token is predicted too
    if order == "shuffled":
        for starts in epochs:
            assert set(np.diff(np.sort(starts))) <= {context_length}
        assert len(epochs[0]) >= (num_tokens - 1) // context_length - 1


@pytest.mark.parametrize("order", ["shuffled", "random"])
def test_training_batches_are_windows_of_the_text_in_an_order_of_seed_and_epoch(module, order):
    def epochs(seed):
        loader = module(window_order=order, seed=seed).train_dataloader()
        return [list(loader) for _ in range(2)]

    first, second = epochs(0)
    text = bytes(split_ids(module(), "train"))
    for batch in first:
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.shape == batch.targets.shape == (4, 8)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            assert tokens[1:] == targets[:-1]
            assert bytes([tokens[0], *targets]) in text
    assert len(first) == len(module().train_dataloader())
    orders = [[batch.tokens.tolist() for batch in batches] for batches in (first, second, *epochs(1), *epochs(0))]
    assert orders[:2] == orders[4:]
    assert len(set(map(str, orders))) == 4


@pytest.mark.parametrize("context_length", [1, 7, 8, 500])
def test_evaluation_predicts_every_token_but_the_first_exactly_once(module, context_length):
    data = module(context_length=context_length)
    for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        targets = torch.cat([batch.targets.flatten() for batch in batches])
        tokens = torch.cat([batch.tokens.flatten() for batch in batches])
        ids = split_ids(data, split)
        assert targets[targets != IGNORE_INDEX].tolist() == ids[1:]
        assert tokens[targets != IGNORE_INDEX].tolist() == ids[:-1]
        assert int((targets == IGNORE_INDEX).sum()) == -(len(ids) - 1) % context_length
        assert data.split_statistics(split).num_tokens == len(ids) - 1


def test_statistics_count_bytes_and_words_of_the_predicted_text(module):
    text = "\u00e9a b\n\n c d\u00a0e\tf\n" * 10
    for tokenizer, first_bytes in (("bytes", 1), ("characters", 2), ("bpe", None)):
        data = module(text, tokenizer=tokenizer, bpe_vocab_size=258, **ALL_FOR_TRAINING)
        statistics = data.split_statistics("train")
        assert statistics == statistics_of(data, "train")
        assert statistics.num_words == 90
        assert first_bytes is None or statistics.num_bytes == len(text.encode()) - first_bytes


def test_vocabulary_is_known_at_once_and_can_be_padded(module):
    assert module(tokenizer="characters").vocab_size == len(set(PROSE[: int(0.8 * len(PROSE))]))
    assert module(tokenizer="bpe", bpe_vocab_size=270, pad_vocab_size_to_multiple=64).vocab_size == 320
    assert module(pad_vocab_size_to_multiple=64).vocab_size == 256


# Resuming with Lightning

STOPS = {
    "middle of an epoch": ("on_train_batch_end", 40, {}),
    "last batch of an epoch": ("on_train_batch_end", 29, {}),
    "validation in mid-epoch": ("on_validation_end", 4, {"val_check_interval": 10}),
    "validation at the end of an epoch": ("on_validation_end", 2, {}),
    "end of an epoch": ("on_train_epoch_end", 1, {}),
    "end of an epoch, limited by steps": ("on_train_epoch_end", 1, {"max_steps": 70, "max_epochs": -1}),
    "failed step": ("on_exception", 1, {"fail_at": 40}),
    "between accumulated gradients": ("on_train_batch_end", 34, {"accumulate_grad_batches": 4}),
    "part of the batches": ("on_train_batch_end", 13, {"limit_train_batches": 10}),
    "workers, random windows": ("on_train_batch_end", 40, {"num_workers": 2, "window_order": "random"}),
    "new loaders every epoch": ("on_train_batch_end", 40, {"reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_resumed_run_sees_the_batches_of_the_uninterrupted_run(tmp_path, stop):
    hook, nth, options = STOPS[stop]
    options = dict(options)
    fail_at = options.pop("fail_at", None)
    settings = {name: options.pop(name) for name in ("num_workers", "window_order") if name in options}
    fit(tmp_path, "whole", data=data_module(tmp_path, **settings | {"num_workers": 0}), **options)
    save, data = SaveAt(hook, nth, tmp_path / "run.ckpt"), data_module(tmp_path, **settings)
    with pytest.raises(InterruptedError):
        fit(tmp_path, "begin", callbacks=[save], fail_at=fail_at, data=data, **options)
    before = recorded(tmp_path, "begin")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["TextDataModule"]
    per_epoch = options.get("limit_train_batches", 29)
    assert state["position"] == {"epoch": len(before) // per_epoch, "batch": len(before) % per_epoch}
    fit(tmp_path, "rest", ckpt_path=tmp_path / "run.ckpt", data=data_module(tmp_path, **settings), **options)
    assert before + recorded(tmp_path, "rest") == recorded(tmp_path, "whole")


def test_two_ranks_share_each_batch_and_resume_exactly(tmp_path):
    run_apart(fit_two_ranks, tmp_path)
    whole = [recorded(tmp_path, "whole", rank) for rank in (0, 1)]
    fit(tmp_path, "joined", data=data_module(tmp_path, batch_size=6))
    joined = [[a + b for a, b in zip(*batches, strict=True)] for batches in zip(*whole, strict=True)]
    assert joined == recorded(tmp_path, "joined")
    for rank in (0, 1):  # rank 1 may have recorded one batch more when rank 0 stopped
        begin = recorded(tmp_path, "begin", rank)[:20]
        assert len(begin) == 20
        assert begin + recorded(tmp_path, "rest", rank) == whole[rank]


def test_overfit_batches_gives_the_same_batches_every_epoch(tmp_path):
    fit(tmp_path, "run", data=data_module(tmp_path), overfit_batches=2)
    batches = recorded(tmp_path, "run")
    assert batches == batches[:2] * 3
    assert batches[0] != batches[1]


def test_every_fit_starts_at_the_first_epoch_and_ends_its_workers(tmp_path, running):
    data = data_module(tmp_path, num_workers=1)
    for name in ("first", "second"):
        fit(tmp_path, name, data=data, max_epochs=1)
        assert not running()
    assert recorded(tmp_path, "first") == recorded(tmp_path, "second")


def test_resuming_with_other_data_warns_and_in_another_vocabulary_fails(module):
    state = json.loads(json.dumps(module().state_dict())) | {"position": {"epoch": 0, "batch": 1}}

    def resume(*text, **settings):
        data = module(*text, **settings)
        data.load_state_dict(state)
        data.train_dataloader()

    resume()  # a warning is an error here
    with pytest.warns(UserWarning, match=r"seed 0 -> 7, global_batch_size 4 -> 2"):
        resume(seed=7, batch_size=2)
    same_length = PROSE.replace("Line", "line")
    with pytest.warns(UserWarning, match=r"training data or its order changed .*\(token_checksum \w{8} -> \w{8}\)"):
        resume(same_length)
    with refused(r"different vocabulary .*tokenizer=\"characters\""):
        resume(tokenizer="characters")
    del state["order"]["token_checksum"]  # before there were checksums
    resume(same_length)


def test_a_missing_split_is_told_and_training_without_validation_works(tmp_path):
    data = data_module(tmp_path, validation_fraction=0.0)
    fit(tmp_path, "run", data=data, max_epochs=1, limit_val_batches=0)
    with refused(r"no validation split: set validation_fraction above 0 .*limit_val_batches=0"):
        fit(tmp_path, "run", data=data)
    with refused("no test split: set test_fraction above 0"):
        data.test_dataloader()
    with refused("split must be one of 'train', 'validation', 'test', got 'val'"):
        data.split_statistics("val")
