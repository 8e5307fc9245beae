import math

import pytest
import torch

from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


def test_evaluation_is_the_sum_over_the_split_whatever_the_batch_size(tmp_path):
    data = tiny_data(tmp_path)
    task = tiny_task(data)
    results = tiny_trainer(tmp_path).validate(task, data, verbose=False)[0]
    nats = tokens = 0.0
    for batch in tiny_data(tmp_path, batch_size=1).val_dataloader():
        logits = task.model(batch.tokens).logits_BTV[0].double()
        valid = batch.targets[0] >= 0
        nats += torch.nn.functional.cross_entropy(logits[valid], batch.targets[0][valid], reduction="sum").item()
        tokens += valid.sum().item()
    counts = data.split_statistics("validation")
    assert counts.num_tokens == tokens
    assert results["val/loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert results["val/token_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert results["val/word_perplexity"] == pytest.approx(math.exp(nats / counts.num_words), rel=1e-5)
    assert results["val/bits_per_byte"] == pytest.approx(nats / counts.num_bytes / math.log(2), rel=1e-6)


def test_prediction_gives_the_nats_of_the_test_text_in_order(tmp_path):
    data = tiny_data(tmp_path)
    task = tiny_task(data)
    trainer = tiny_trainer(tmp_path)
    nats = torch.cat(trainer.predict(task, data))
    assert nats.shape == (data.split_statistics("test").num_tokens,)
    assert nats.mean().item() == pytest.approx(trainer.test(task, data, verbose=False)[0]["test/loss"], rel=1e-6)


def test_training_lowers_the_loss_and_logs_the_keys(tmp_path):
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(tmp_path, max_steps=60, val_check_interval=30)
    before = tiny_trainer(tmp_path).validate(tiny_task(data), data, verbose=False)[0]["val/loss"]
    trainer.fit(tiny_task(data), data)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert metrics["val/loss"] < before - 0.05
    assert metrics["equilibrium/forward_nfe"] == metrics["equilibrium/backward_nfe"] == 3
    assert metrics["equilibrium/reconstruction_mismatch"] == 0
    assert 0 < metrics["equilibrium/relative_residual"] < 1
    assert metrics["system/tokens_per_second"] > 0
    assert set(metrics) >= {
        *("train/loss", "system/tokens_per_second"),
        *(f"val/{name}" for name in ("loss", "token_perplexity", "word_perplexity", "bits_per_byte")),
        *(f"equilibrium/{name}" for name in ("forward_nfe", "backward_nfe")),
        *(f"equilibrium/{name}" for name in ("relative_residual", "reconstruction_mismatch")),
    }


def test_a_checkpoint_loads_without_code_and_without_the_command_line(tmp_path):
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(tmp_path, max_steps=3)
    task = tiny_task(data, optimizer={"lr": 0.01})
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["solver"]["max_steps"] == 3
    assert checkpoint["tokenizer"] == data.tokenizer_state()
    loaded = LanguageModelingTask.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), task.parameters(), strict=True))
    assert loaded.model.equilibrium.solver == task.model.equilibrium.solver


def test_the_explicit_baseline_trains_without_equilibrium_metrics(tmp_path):
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(tmp_path, max_steps=4, val_check_interval=2)
    trainer.fit(
        tiny_task(data, solver={"solver": "none"}, optimizer={"schedule": "plateau", "plateau_window": 2}), data
    )
    assert not [key for key in trainer.callback_metrics if key.startswith("equilibrium")]
