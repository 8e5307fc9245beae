"""A run resumed from any step ends bit for bit as the whole run: language model and classifier, by the command line."""

import pytest

from tests.checkpoints import ranks_from_any_step
from tests.helpers.data import tiny_image_config
from tests.helpers.processes import run_python
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
    return command, (folder / "runs/tiny/v").rename(folder / "kept"), folder / "runs/tiny/v"


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 6, 7))])
def test_the_rest_is_the_same_bit_for_bit(whole, step):
    command, kept, folder = whole
    put_back(kept, folder, f"step-{step}.ckpt", "best.ckpt")
    run(*command, "--ckpt_path", folder / f"checkpoints/step-{step}.ckpt")
    assert metrics(folder) == metrics(kept)
    for name in ("last.ckpt", "best.ckpt"):
        assert_equal(trained(folder / "checkpoints" / name), trained(kept / "checkpoints" / name))


@pytest.fixture(scope="module", params=list(ranks_from_any_step.TASKS))
def two_ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run_python(ranks_from_any_step.__file__, request.param, folder)
    return folder


@pytest.mark.slow
def test_so_it_is_with_two_processes_and_workers(two_ranks):
    kept = two_ranks / "whole"
    states = trained(kept / "checkpoints/last.ckpt")
    assert len(states["random_states"]) == ranks_from_any_step.RANKS
    assert len(metrics(kept)) >= ranks_from_any_step.STEPS
    for step in range(1, ranks_from_any_step.STEPS):
        assert metrics(two_ranks / str(step)) == metrics(kept), f"from step {step}"
        for name in ("last.ckpt", "best.ckpt"):
            checkpoint = trained(two_ranks / f"{step}/checkpoints" / name)
            assert_equal(checkpoint, trained(kept / "checkpoints" / name), f"from step {step}: {name}")
