"""As a script, `ranks_from_any_step.py TASK FOLDER`: a run of two processes, and after each of its steps the rest.

Leaves the whole run in FOLDER/whole and the run resumed at step N, in other processes, in FOLDER/N.
"""

import sys
from pathlib import Path

from tests.helpers.data import tiny_image_config
from tests.helpers.processes import run_group
from tests.helpers.runs import put_back, run, tiny_config

STEPS = 6
RANKS = 2
TASKS = {
    # Epochs end after the third and the sixth batch of each process, accumulation and validation in their midst.
    "language": (("fit",), tiny_config, ("--run.sample_tokens=0", "--data.batch_size=21")),
    "images": (("image", "fit"), tiny_image_config, ("--data.batch_size=6", "--data.augmentation.mixup_alpha=0.5")),
}
OPTIONS = (
    f"--trainer.devices={RANKS}",
    "--trainer.strategy=ddp",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=2",
    "--data.num_workers=1",
    "--run.checkpoint_every_n_steps=1",
    "--run.keep_last=99",
    "--run.version=v",
    "--run.test=false",
)


def main(task: str, folder: Path) -> None:
    command, config, options = TASKS[task]
    path, kept = folder / "runs/tiny/v", folder / "whole"
    run_group(RANKS, run, *command, "--config", config(folder, max_steps=STEPS), *OPTIONS, *options)
    path.rename(kept)
    for step in range(1, STEPS):
        put_back(kept, path, f"step-{step}.ckpt", "best.ckpt")
        run_group(RANKS, run, *command, "--ckpt_path", path / f"checkpoints/step-{step}.ckpt")
        path.rename(folder / str(step))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
