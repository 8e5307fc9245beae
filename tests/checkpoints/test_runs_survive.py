"""Faults around a run of the command line: what is told, what is left, and that it goes on."""

import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import yaml
from lightning import Callback

from revdeq_lightning import checkpoints
from revdeq_lightning.checkpoints.callbacks import LastCheckpoint
from revdeq_lightning.checkpoints.files import read_checkpoint
from revdeq_lightning.cli.tasks import ImageCommandLine, LanguageCommandLine
from revdeq_lightning.errors import CheckpointError
from tests.helpers.data import tiny_image_config
from tests.helpers.runs import (
    assert_equal,
    damage,
    error_of,
    kept_steps,
    limited_file_sizes,
    names,
    put_back,
    run,
    run_metrics as metrics,
    text_file,
    tiny_config,
    tiny_data,
    tiny_task,
    tiny_trainer,
    trained,
)

pytestmark = pytest.mark.xdist_group("runs_survive")

QUIET = ("--run.version=v", "--run.test=false", "--run.sample_tokens=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 6 steps with checkpoints after steps 3 and 6: its folder kept aside, and where it belongs."""
    folder = tmp_path_factory.mktemp("whole")
    run("fit", "--config", tiny_config(folder), *QUIET)
    return (folder / "runs/tiny/v").rename(folder / "kept"), folder / "runs/tiny/v", folder / "tiny.yaml"


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_taken(whole, capsys):
    kept, folder, config = whole
    put_back(kept, folder, "last.ckpt", "step-3.ckpt")
    damage(folder / "checkpoints/last.ckpt")
    (folder / "checkpoints/.last.ckpt.17.part").write_bytes(b"half")
    run("fit", "--config", config, *QUIET[1:], "--run.name=tiny", "--ckpt_path=last")
    out, err = capsys.readouterr()
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "last.ckpt is damaged (it does not end where its archive does)" in warning
    assert warning.endswith(f"continuing from {folder}/checkpoints/step-3.ckpt")
    assert "resumed at step 3" in out
    assert metrics(folder) == metrics(kept)
    assert_equal(trained(folder / "checkpoints/last.ckpt"), trained(kept / "checkpoints/last.ckpt"))
    assert names(folder) == names(kept)


def test_a_damaged_checkpoint_given_by_name_is_refused_and_another_named(whole, capsys):
    kept, folder, _ = whole
    put_back(kept, folder, "last.ckpt", "step-3.ckpt")
    last = folder / "checkpoints/last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    for command in ("fit", "test"):
        error = error_of(capsys, command, "--ckpt_path", last)
        assert "last.ckpt is damaged (its checksum does not match): continue from" in error
        assert error.endswith("step-3.ckpt")
    (folder / "checkpoints/step-3.ckpt").unlink()
    error = error_of(capsys, "fit", "--config", whole[2], "--run.name=tiny", "--ckpt_path=last")
    assert "can be used: last.ckpt is damaged" in error


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.network.d_model=32", r"\(17, 16\) in the checkpoint and \(17, 32\) in .*network.d_model 16 -> 32"),
        ("--model.optimizer.optimizer=adamw", "state of optimizer=muon, this run has optimizer=adamw"),
        ("--data.tokenizer=bytes", "network.vocab_size 17 -> 256"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_in_one_line(whole, capsys, option, words):
    kept, folder, config = whole
    put_back(kept, folder, "last.ckpt")
    error = error_of(capsys, "fit", "--config", config, "--ckpt_path", folder / "checkpoints/last.ckpt", option)
    assert len(error) < 420
    assert re.search(words, error)


def test_settings_that_the_optimizer_takes_from_the_checkpoint_are_told(whole):
    kept, folder, _ = whole
    put_back(kept, folder, "step-3.ckpt")
    options = ("--model.optimizer.lr=0.5", "--model.optimizer.muon_momentum=0.9")
    with pytest.warns(UserWarning, match=r"without effect: lr 0.01 -> 0.5, muon_momentum 0.95 -> 0.9"):
        run("fit", "--ckpt_path", folder / "checkpoints/step-3.ckpt", *options)
    assert metrics(folder) == metrics(kept)  # and so it is


@pytest.mark.parametrize("name", ["divergence.policy", "run.keep_every_hours", "model.network.initial_state"])
def test_a_run_with_a_setting_that_is_gone_is_refused(whole, capsys, name):
    kept, folder, _ = whole
    put_back(kept, folder, "step-3.ckpt")
    config = folder / "config.yaml"
    older = settings = yaml.safe_load(config.read_text())
    *groups, own = name.split(".")
    for group in groups:
        settings = settings.setdefault(group, {})
    settings[own] = None
    config.write_text(yaml.safe_dump(older))
    error = error_of(capsys, "fit", "--ckpt_path", folder / "checkpoints/step-3.ckpt")
    assert re.search(f"config.yaml has an unknown setting: {name}(: remove it| \\(.*\\))$", error.strip()), error


class Disturb(Callback):
    """Does something after a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.what()


@pytest.fixture
def full_disk():
    """Call it, and no file can grow beyond 20 kB: the checkpoints here have more, metrics.csv less."""
    with limited_file_sizes() as limit:
        yield lambda size=20_000: limit(size)


@pytest.fixture
def disturbed(monkeypatch):
    """Put a callback into every run."""

    def disturb(callback):
        for command_line in (LanguageCommandLine, ImageCommandLine):
            own = command_line.task_callbacks
            monkeypatch.setattr(command_line, "task_callbacks", lambda self, own=own: [*own(self), callback])

    return disturb


@pytest.mark.filterwarnings("ignore:no page of the run")
def test_a_full_disk_is_a_warning_on_the_way_and_an_error_at_the_end(whole, tmp_path, capsys, disturbed, full_disk):
    kept, _, config = whole
    disturbed(Disturb(4, full_disk))
    with pytest.warns(UserWarning, match=r"no checkpoint was written .*too large; .* intact"):
        error = error_of(capsys, "fit", "--config", config, *QUIET, f"--run.folder={tmp_path}")
    assert "the final state could not be saved" in error
    assert "earlier checkpoints are intact" in error
    folder = tmp_path / "tiny/v/checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt", "step-3.ckpt"}
    assert_equal(trained(folder / "last.ckpt"), trained(kept / "checkpoints/step-3.ckpt"))


def test_when_there_is_room_again_the_next_save_succeeds(whole, tmp_path, disturbed, full_disk):
    kept, _, config = whole
    disturbed(Disturb(2, full_disk))
    disturbed(Disturb(4, lambda: full_disk(None)))
    with pytest.warns(UserWarning, match="there is no file of this name"):
        run("fit", "--config", config, *QUIET, f"--run.folder={tmp_path}")
    assert_equal(trained(tmp_path / "tiny/v/checkpoints/last.ckpt"), trained(kept / "checkpoints/last.ckpt"))
    assert not (tmp_path / "tiny/v/checkpoints/step-3.ckpt").exists()


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    error = error_of(capsys, "fit", "--config", tiny_config(tmp_path), *QUIET, f"--run.folder={tmp_path}/file/runs")
    assert f"cannot write to {tmp_path}/file/runs/tiny/v: Not a directory; choose another run.folder" in error


def images_that_are_read_in_training(folder, **trainer):
    path = tiny_image_config(folder, data={"in_memory": False, "num_workers": 1}, **trainer)
    return path, ("--run.version=v", "--run.test=false")


def test_an_image_removed_in_mid_run_is_named_and_the_checkpoint_stays(tmp_path, capsys, disturbed):
    config, options = images_that_are_read_in_training(tmp_path)

    def remove():
        for path in (tmp_path / "images/train/red").iterdir():
            path.unlink()

    disturbed(Disturb(5, remove))
    error = error_of(capsys, "image", "fit", "--config", config, *options, code=1)
    assert "training cannot continue: FileNotFoundError: " in error
    assert str(tmp_path / "images/train/red") in error
    assert read_checkpoint(tmp_path / "runs/tiny/v/checkpoints/last.ckpt")["global_step"] == 4


class WithoutImages(Callback):
    """The test's images are elsewhere once it begins."""

    def __init__(self, folder):
        self.images, self.elsewhere = folder / "images/test", folder / "elsewhere"

    def on_test_start(self, trainer, pl_module):
        self.images.rename(self.elsewhere)


def test_images_removed_before_a_test_are_named_and_the_trained_model_stays(tmp_path, capsys, disturbed):
    config, options = images_that_are_read_in_training(tmp_path, max_steps=2)
    gone = WithoutImages(tmp_path)
    disturbed(gone)
    last = tmp_path / "runs/tiny/v/checkpoints/last.ckpt"
    for arguments in (("fit", "--config", config, *options[:1]), ("test", "--ckpt_path", last)):
        error = error_of(capsys, "image", *arguments, code=1)
        assert "the test cannot continue: FileNotFoundError: " in error
        assert str(gone.images) in error
        gone.elsewhere.rename(gone.images)
    assert read_checkpoint(last)["global_step"] == 2


def test_a_text_removed_in_mid_run_disturbs_nothing(whole, tmp_path, disturbed):
    kept, *_ = whole
    config = tiny_config(tmp_path)
    disturbed(Disturb(2, lambda: (text_file(tmp_path).unlink(), shutil.rmtree(tmp_path / "cache"))))
    run("fit", "--config", config, *QUIET)
    assert metrics(tmp_path / "runs/tiny/v") == metrics(kept)


def test_a_killed_worker_ends_the_run_in_one_line(tmp_path, capsys, disturbed):
    import multiprocessing

    config, options = images_that_are_read_in_training(tmp_path)
    disturbed(Disturb(5, lambda: [os.kill(p.pid, signal.SIGKILL) for p in multiprocessing.active_children()]))
    error = error_of(capsys, "image", "fit", "--config", config, *options, code=1)
    assert "a data-loading process ended" in error
    assert read_checkpoint(tmp_path / "runs/tiny/v/checkpoints/last.ckpt")["global_step"] == 4


SAVING = {"max_steps": 9, "val_check_interval": 4, "enable_checkpointing": True}


def fit(folder, last, **settings):
    data = tiny_data(folder, batch_size=16)
    trainer = tiny_trainer(folder, [last], **SAVING | settings)
    trainer.fit(tiny_task(data), data)


@pytest.mark.parametrize(
    ("settings", "trainer", "kept"),
    [
        ({"keep_last": 3, "every_n_steps": 1}, {}, {"step-7": 7, "step-8": 8, "last": 9}),
        ({"keep_last": 1, "every_n_steps": 2}, {}, {"last": 9}),
        # Validation after batches 4 and 8 of 9, in the midst of accumulation: the steps are after 3, 6 and 9.
        ({"keep_last": 99}, {"accumulate_grad_batches": 3, "max_steps": 3}, {"step-2": 2, "last": 3}),
    ],
)
def test_so_many_are_kept_and_only_of_whole_steps(tmp_path, settings, trainer, kept):
    fit(tmp_path, LastCheckpoint(**settings), **trainer)
    assert kept_steps(tmp_path) == kept


def test_what_a_kill_at_the_end_left_too_many_goes_when_it_goes_on(whole):
    kept, folder, _ = whole
    put_back(kept, folder, "last.ckpt", "step-3.ckpt", "best.ckpt")
    (folder / "checkpoints/step-2.ckpt").write_bytes((folder / "checkpoints/step-3.ckpt").read_bytes())
    run("fit", "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert names(folder) == names(kept)


def test_they_are_written_by_the_clock(tmp_path, monkeypatch):
    """A clock of which each look takes a minute: one look a step, and one after each save."""
    seconds = iter(range(0, 10_000, 60))
    monkeypatch.setattr(checkpoints.callbacks, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    fit(tmp_path, LastCheckpoint(keep_last=99, every_minutes=3), val_check_interval=9)
    assert kept_steps(tmp_path) == {"step-3": 3, "step-6": 6, "last": 9}


@pytest.mark.filterwarnings("ignore:no page of the run")
def test_asked_to_end_on_a_full_disk_is_an_error(whole, tmp_path, capsys, disturbed, full_disk):
    """Who puts the job back because of exit code 75 would do so for ever."""
    _, _, config = whole
    disturbed(Disturb(4, lambda: (full_disk(), os.kill(os.getpid(), signal.SIGTERM))))
    with pytest.warns(UserWarning, match=r"no checkpoint was written"):
        error = error_of(capsys, "fit", "--config", config, *QUIET, f"--run.folder={tmp_path}", code=1)
    assert "the final state could not be saved" in error


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be written to .*File exists"):
        fit(tmp_path, LastCheckpoint())
