"""Tasks with a DataLoader of somebody else and a plain Trainer: fit, checkpoint, resume, test."""

import math

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from revdeq_lightning.models import ClassifierConfig, ReasonerConfig, TransformerConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.report.classification import ClassificationReport
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.language_modeling import LanguageModelingTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig
from revdeq_lightning.tasks.reasoning import ReasoningTask

SETTINGS = (SolverConfig(max_steps=2), OptimizerConfig(lr=0.01))
SIZES = {"d_model": 16, "num_heads": 2, "d_mlp": 24}


def language():
    tokens = torch.randint(0, 30, (8, 9), generator=torch.Generator().manual_seed(0))
    task = LanguageModelingTask(TransformerConfig(vocab_size=30, context_length=8, **SIZES), *SETTINGS)
    return task, (tokens[:, :-1], tokens[:, 1:])


def images():
    network = ClassifierConfig(num_classes=3, num_channels=1, channels=[16])
    return ClassificationTask(network, *SETTINGS), (torch.randn(8, 1, 8, 8), torch.arange(8) % 3)


def puzzles():
    network = ReasonerConfig(num_symbols=2, num_answers=2, shape=[6], channels=8)
    inputs = torch.randint(0, 2, (8, 6))
    return ReasoningTask(network, *SETTINGS), (inputs, inputs.cumsum(1) % 2)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*exists and is not empty", "ignore:.*have no `val_dataloader`"
)
KINDS = pytest.mark.parametrize("make", [language, images, puzzles])


def trainer(folder, max_steps, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_steps=max_steps, default_root_dir=folder, devices=1, **quiet | settings)


@KINDS
def test_pairs_of_any_loader_train_resume_and_test(make, tmp_path):
    task, pair = make()
    loader = DataLoader(TensorDataset(*pair), 4)
    first = trainer(tmp_path, 2)
    first.fit(task, loader, loader)
    path = tmp_path / "own.ckpt"
    first.save_checkpoint(path)
    again, _ = make()
    second = trainer(tmp_path, 3)
    second.fit(again, loader, loader, ckpt_path=path)
    assert second.global_step == 3
    (figures,) = trainer(tmp_path, 3).test(again, loader, verbose=False)
    again.eval()
    with torch.no_grad():  # the loss by its definition
        output = again(pair[0]) if not isinstance(again, LanguageModelingTask) else again.model(pair[0])
        logits = next(getattr(output, name) for name in ("logits", "logits_BV", "logits_BTV") if hasattr(output, name))
        logits = logits.flatten(0, 1) if logits.dim() == 3 and isinstance(again, LanguageModelingTask) else logits
        targets = pair[1].flatten() if isinstance(again, LanguageModelingTask) else pair[1]
        expected = float(torch.nn.functional.cross_entropy(logits, targets))
    assert math.isclose(figures["test/loss"], expected, rel_tol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@KINDS
def test_integers_of_any_size_will_do(make, dtype):
    task, pair = make()
    batch = task.as_batch([part if part.is_floating_point() else part.to(dtype) for part in pair])
    for found, part in zip(batch, pair, strict=False):
        assert torch.equal(found, part)
        assert found.dtype == part.dtype


@KINDS
def test_other_batches_are_told_at_the_first_step(make, tmp_path):
    task, pair = make()
    rows = [{"input_ids": pair[0][i], "labels": pair[1][i]} for i in range(8)]
    with pytest.raises(TypeError, match=r"takes batches of a pair .* got dict with input_ids, labels: change the coll"):
        trainer(tmp_path, 1).fit(task, DataLoader(rows, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs, labels: (inputs.byte(), labels), r"floating-point and normalized, got torch.uint8"),
        (lambda inputs, labels: (inputs, labels.float()), r"labels must be integers, got torch.float32"),
        (lambda inputs, labels: (inputs, labels[:, None]), r"labels must be classes 0 ... 2.*got shape \(4, 1\)"),
        (lambda inputs, labels: (inputs, labels + 1), r"labels must be classes 0 ... 2.*got the class 3"),
    ],
)
def test_what_images_and_labels_must_be(tmp_path, change, message):
    task, pair = images()
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tmp_path, 1).fit(task, DataLoader(TensorDataset(*change(*pair)), 4))


def test_images_in_double_precision_and_a_report_that_needs_our_data(tmp_path):
    """Also of batches that a data module normalizes after Lightning has converted them."""
    task, (inputs, labels) = images()
    task.on_after_batch_transfer = lambda batch, _: [batch[0].float(), batch[1]]
    loader = DataLoader(TensorDataset(inputs.double(), labels), 4)
    trainer(tmp_path, 1, precision="64-true").fit(task, loader)
    assert all(p.dtype == torch.float64 for p in task.parameters())
    with pytest.raises(ValueError, match="needs a data module with num_classes, got NoneType"):
        trainer(tmp_path, 1, callbacks=[ClassificationReport(tmp_path)]).test(task, loader)


@KINDS
def test_several_loaders_count_as_one_and_pairs_are_predicted(make, tmp_path):
    task, pair = make()
    whole, parts = TensorDataset(*pair), [TensorDataset(*(t[:4] for t in pair)), TensorDataset(*(t[4:] for t in pair))]
    quiet = trainer(tmp_path, 1)
    (one,) = quiet.validate(task, DataLoader(whole, batch_size=4), verbose=False)
    several = quiet.validate(task, [DataLoader(part, batch_size=4) for part in parts], verbose=False)
    assert several[0]["val/loss"] == pytest.approx(one["val/loss"], rel=1e-6)
    assert len(quiet.predict(task, DataLoader(whole, batch_size=4))) == 2
