"""All callbacks together, on the language model and on a classifier with BatchNorm: what must hold for each of them."""

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback

from revdeq_lightning.loggers.step_rows import read_rows
from tests.helpers.modules import classifier, fit_whole_set as fit, language, state, table, whole_set
from tests.helpers.runs import assert_equal


@pytest.mark.parametrize(("make", "accumulate"), [(language, 2), (classifier, 1)], ids=["language", "classifier"])
def test_a_run_is_bit_for_bit_the_same_with_and_without(tmp_path, make, accumulate):
    settings = {"max_steps": 4, "val_check_interval": 2 * accumulate, "accumulate_grad_batches": accumulate}
    results = []
    for name, callbacks in (("with", whole_set), ("without", lambda task: [])):
        folder = tmp_path / name
        folder.mkdir()
        notes, run = fit(folder, make, callbacks, **settings)
        results.append((notes, state(run), run.callback_metrics["val/loss"]))
    (ours, end, loss), (reference, expected_end, expected_loss) = results
    assert ours.losses == reference.losses
    assert ours.draws == reference.draws
    assert_equal(ours.gradients, reference.gradients, "gradients")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(end[key], expected_end[key], key)
    assert loss == expected_loss
    # And all of them did something: at steps, not batches.
    folder = tmp_path / "with" / "run"
    logged = [row for row in table(folder / "metrics.csv") if "gradient_error/bptt/relative_l2" in row]
    assert [row["step"] for row in logged] == ["1", "3"]
    assert {row["step"] for row in table(folder / "residual_curve.csv")} == {"1", "3"}
    validated = {row["step"] for row in table(folder / "metrics.csv") if "val/loss" in row}
    assert validated
    assert {row["step"] for row in table(folder / "depth_sweep_validation.csv")} == validated
    pictures = {str(int(path.stem)) for path in folder.glob("samples/*.png")}
    texts = {str(row["step"]) for row in read_rows(folder / "samples.jsonl")}
    assert (pictures or texts) == validated


def test_a_module_in_training_can_be_pickled(tmp_path):
    """Its hooks hold no callback, some of which cannot be."""
    pickled = []
    save = LambdaCallback(on_train_batch_end=lambda trainer, module, *_: pickled.append(pickle.dumps(module)))
    fit(tmp_path, language, lambda task: [*whole_set(task), save], max_steps=1, limit_val_batches=0)
    assert pickled


class SaveAt(Checkpoint):
    """Saves a checkpoint after the validation of one step; as a `Checkpoint` it comes after all others. Ends the
    run by an exception three steps later."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step + 3:
            raise InterruptedError("as asked")


def files(folder):
    """What a run wrote, times apart."""
    texts = {p.name: p.read_text() for p in folder.glob("samples.*")}
    return texts | {p.name: table(p) for p in folder.glob("*.csv")} | {"sheets": sorted(folder.glob("samples/*.png"))}


def every_second(task):
    """Of the validations: only who goes on counting finds the same ones."""
    return whole_set(task, validations=2)


@pytest.mark.parametrize("make", [language, classifier], ids=["language", "classifier"])
def test_a_resumed_run_leaves_the_files_of_the_whole_one(tmp_path, make):
    """It was interrupted after its checkpoint: what it wrote since then comes once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    fit(whole, make, every_second, max_steps=6, val_check_interval=2)
    middle = tmp_path / "middle.ckpt"
    settings = {"max_steps": 6, "val_check_interval": 2, "enable_checkpointing": True}
    with pytest.raises(InterruptedError):
        fit(parts, make, lambda task: [*every_second(task), SaveAt(2, middle)], **settings)
    assert torch.load(middle, weights_only=True)["global_step"] == 2
    fit(parts, make, every_second, ckpt_path=middle, max_steps=6, val_check_interval=2)
    ours, expected = files(parts / "run"), files(whole / "run")
    assert [p.name for p in ours.pop("sheets")] == [p.name for p in expected.pop("sheets")]
    assert ours.keys() == expected.keys()
    for name, content in expected.items():
        assert ours[name] == content, name
    assert len(expected["metrics.csv"]) > 6
