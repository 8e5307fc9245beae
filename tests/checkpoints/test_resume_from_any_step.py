"""A run resumed from any step ends bit for bit as the whole run: language model and classifier, by the command line."""

import pytest

from tests.helpers.data import tiny_image_config
from tests.helpers.processes import run_apart, run_group
from tests.helpers.runs import assert_equal, put_back, run, run_metrics as metrics, tiny_config, trained

pytestmark = pytest.mark.xdist_group("resume_from_any_step")

EVERY_STEP = ("--run.checkpoint_every_n_steps=1", "--run.keep_last=99", "--run.version=v", "--run.test=false")
STEPS = 8
LANGUAGE = ("fit",), tiny_config, ("--run.sample_tokens=0", "--data.batch_size=32")
IMAGES = ("image", "fit"), tiny_image_config, ()

RUNS = {
    # 4 batches an epoch, validations in the midst of accumulation (after the third batch), and with an epoch's end.
    "language": (*LANGUAGE, ("--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4")),
    "language, workers": (*LANGUAGE, ("--data.num_workers=2", "--trainer.val_check_interval=3")),
    "language, plateau": (
        *LANGUAGE,
        (
            "--model.optimizer.schedule=plateau",
            "--model.optimizer.plateau_window=2",
            "--model.optimizer.plateau_patience=1",
        ),
        ("--trainer.val_check_interval=3",),
    ),
    "images": (*IMAGES, ("--trainer.val_check_interval=3",)),
    "images, workers": (*IMAGES, ("--data.num_workers=2", "--data.augmentation.mixup_alpha=0.5")),
}


@pytest.fixture(scope="module", params=list(RUNS))
def whole(request, tmp_path_factory):
    command, config, *options = RUNS[request.param]
    folder = tmp_path_factory.mktemp("whole")
    arguments = [option for group in options for option in group]
    run(*command, "--config", config(folder, max_steps=STEPS), *EVERY_STEP, *arguments)
    # The fourth step is an epoch's last. All steps of one run of each task; workers and the plateau at two of them.
    others = (1, 4, 6, 7) if request.param in ("language", "images") else (4,)
    return command, (folder / "runs/tiny/v").rename(folder / "kept"), folder / "runs/tiny/v", others


@pytest.mark.parametrize("from_others", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["3", "others"])
def test_the_rest_is_the_same_bit_for_bit(whole, from_others):
    command, kept, folder, others = whole
    for step in others if from_others else (3,):
        put_back(kept, folder, f"step-{step}.ckpt", "best.ckpt")
        run(*command, "--ckpt_path", folder / f"checkpoints/step-{step}.ckpt")
        assert_same(folder, kept, step)


def assert_same(folder, kept, step):
    assert metrics(folder) == metrics(kept), f"from step {step}"
    for name in ("last.ckpt", "best.ckpt"):
        states = [trained(path / "checkpoints" / name) for path in (folder, kept)]
        assert_equal(*states, f"from step {step}: {name}")


RANKS, RANK_STEPS = 2, 6
RANK_OPTIONS = (
    *("--data.batch_size=6", "--data.augmentation.mixup_alpha=0.5", "--data.num_workers=1", "--trainer.strategy=ddp"),
    *(f"--trainer.devices={RANKS}", "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=2"),
)


def whole_and_rests(folder, steps):
    """Leave the whole run in FOLDER/whole and the run resumed at step N, in other processes, in FOLDER/N."""
    command, config, _ = IMAGES
    path, kept = folder / "runs/tiny/v", folder / "whole"
    arguments = ("--config", config(folder, max_steps=RANK_STEPS), *EVERY_STEP, *RANK_OPTIONS)
    run_group(RANKS, run, *command, *arguments)
    path.rename(kept)
    for step in steps:
        put_back(kept, path, f"step-{step}.ckpt", "best.ckpt")
        run_group(RANKS, run, *command, "--ckpt_path", path / f"checkpoints/step-{step}.ckpt")
        path.rename(folder / str(step))


@pytest.mark.slow
def test_so_it_is_with_two_processes_and_workers(tmp_path):
    steps = 2, 3, 5  # an epoch's end after three batches of each process; in the midst of two epochs
    run_apart(whole_and_rests, tmp_path, steps)
    kept = tmp_path / "whole"
    states = trained(kept / "checkpoints/last.ckpt")
    assert len(states["random_states"]) == RANKS
    assert len(metrics(kept)) >= RANK_STEPS
    for step in steps:
        assert_same(tmp_path / str(step), kept, step)
