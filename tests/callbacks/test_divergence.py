"""No optimizer step with NaN; the batch is kept; the run stops."""

import math

import pytest
import torch
import yaml

from revdeq_lightning.checkpoints.files import read_checkpoint, write_checkpoint
from revdeq_lightning.cli.main import main
from revdeq_lightning.cli.replay import replay
from revdeq_lightning.runs.divergence import DivergedError, DivergenceGuard
from tests.helpers.data import tiny_image_config
from tests.helpers.modules import Poison, table
from tests.helpers.processes import run_apart, run_group
from tests.helpers.runs import error_of, run, tiny_data, tiny_task, tiny_trainer

IMPLICIT = [f"--model.solver.{name}" for name in ("adjoint=implicit", "mismatch=warn", "unconverged=ignore")]


def poisoned_config(folder, *poisons, **trainer):
    path = tiny_image_config(folder, **{"max_steps": 6, "val_check_interval": 2} | trainer)
    config = yaml.safe_load(path.read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": "tests.helpers.modules.Poison", "init_args": poison} for poison in poisons
    ]
    config["run"] |= {"version": "v", "test": False}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("pixel", "the state is not finite (nan) "),
        ("label weight", "the loss is not finite (nan"),
        ("gradient", "the gradient is not finite (loss "),
        ("cotangent", "the linear system of ImplicitAdjoint's backward pass diverged"),
    ],
)
def test_a_step_with_nan_is_not_made_and_its_batch_can_be_run_again(tmp_path, capsys, what, reason):
    accumulate = 2 if what == "label weight" else 1
    config = poisoned_config(tmp_path, {"what": what, "step": 4}, accumulate_grad_batches=accumulate)
    with pytest.raises(SystemExit) as stop:
        run("image", "fit", "--config", config, *(IMPLICIT if what == "cotangent" else ()))
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert "process 0: weights unchanged" in out
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "training diverged in step 4: " in error
    assert reason in error
    file = tmp_path / "runs/tiny/v/diverged/step-4/process-0.ckpt"
    assert error.endswith(f"python -m revdeq_lightning replay --file {file}")
    kept = read_checkpoint(file)
    assert len(kept["batches"]) == accumulate
    run("replay", "--file", file)
    replayed = capsys.readouterr().out.splitlines()
    assert reason in replayed[0]
    if what == "pixel":
        assert "DivergenceError: the state is not finite" in replayed[1]
    elif what == "label weight":
        assert "loss nan; of " in replayed[2]
        assert " 0 not finite" not in replayed[2]
    elif what == "gradient":
        # The poison came after the backward pass: the batch itself is innocent, and gives its loss to the last bit.
        assert replayed[1].endswith(" 0 not finite")
        loss = float(kept["reason"].split("(loss ")[1].rstrip(")"))
        assert float(replayed[1].split("loss ")[1].split(";")[0]) == pytest.approx(loss, rel=1e-3)
    last = tmp_path / "runs/tiny/v/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == {1: 2, 2: 3}[accumulate]


def test_the_step_of_a_reasoner_can_be_run_again(tmp_path, capsys):
    config = {
        "seed_everything": 0,
        "model": {
            "network": {"channels": 8},
            "solver": {"max_steps": 3},
            "optimizer": {"lr": 3e-3},
            "random_start": 0.5,
        },
        "data": {
            "puzzle": "prefix_sums", "size": 8, "batch_size": 4, "num_validation": 4, "num_test": 4,
            "cache_dir": str(tmp_path / "cache"),
        },
        "trainer": {
            "max_steps": 3, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
            "callbacks": [{"class_path": "tests.helpers.modules.Poison", "init_args": {"what": "gradient", "step": 2}}],
        },
        "run": {"folder": str(tmp_path), "version": "v", "test": False},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    error = error_of(capsys, "reasoning", "fit", "--config", path, code=1)
    file = error.split("replay --file ")[1]
    run("replay", "--file", file)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Batch 1 of 1: ")]
    assert told.endswith(" 0 not finite")
    loss = float(error.split("(loss ")[1].split(")")[0])
    assert float(told.split("loss ")[1].split(";")[0]) == pytest.approx(loss, rel=1e-3)
    older = read_checkpoint(file)
    older["hyper_parameters"]["network"]["initial_state"] = "zero"
    write_checkpoint(older, file)
    error = error_of(capsys, "replay", "--file", file)
    assert "process-0.ckpt has settings that this version does not have" in error
    assert "'initial_state'" in error


def test_weights_that_overflowed_are_not_saved(tmp_path, capsys):
    class Overflow(Poison):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 5:
                with torch.no_grad():
                    next(pl_module.parameters()).view(-1)[0] = math.inf
                trainer.save_checkpoint(tmp_path / "bad.ckpt")

    data = tiny_data(tmp_path)
    trainer = tiny_trainer(tmp_path, [DivergenceGuard(tmp_path), Overflow("", 0)])
    with pytest.raises(DivergedError, match="step 6: the weights are not finite"):
        trainer.fit(tiny_task(data), data)
    assert not (tmp_path / "bad.ckpt").exists()


@pytest.mark.parametrize("what", ["weight", "validation pixel"])
def test_a_divergence_in_the_validation_ends_the_run_too(tmp_path, capsys, what):
    config = poisoned_config(tmp_path, {"what": what, "step": 4})
    error = error_of(capsys, "image", "fit", "--config", config, code=1)
    assert error.startswith("error: training diverged in step 5")
    assert ("the weights are not finite" if what == "weight" else "in the validation the state is not") in error
    last = tmp_path / "runs/tiny/v/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 2  # what was saved before


def test_a_batch_that_cannot_be_kept_is_told(tmp_path, capsys):
    config = poisoned_config(tmp_path, {"what": "gradient", "step": 4})
    (tmp_path / "runs/tiny/v").mkdir(parents=True)
    (tmp_path / "runs/tiny/v/diverged").write_text("in the way")
    error = error_of(capsys, "image", "fit", "--config", config, code=1)
    assert "No optimizer step followed; its batch could not be saved in " in error
    assert "replay" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "strategy", "reason"),
    [
        ("pixel", "fsdp2", "the state is not finite"),
        ("cotangent", "ddp", "the linear system of ImplicitAdjoint's backward pass diverged"),
    ],
)
def test_all_processes_end_where_one_diverges(tmp_path, what, strategy, reason):
    """The second process diverges in its forward or in the midst of its backward pass; the first waits for it."""
    poison = {"what": what, "step": 4, "rank": 1}
    config = poisoned_config(tmp_path, poison, devices=2, strategy=strategy, accumulate_grad_batches=2)
    command = ["image", "fit", "--config", str(config), *(IMPLICIT if what == "cotangent" else ())]
    out, err = run_apart(run_group, 2, main, command, seconds=120, code=1)
    assert all(f"process {rank}: weights unchanged" in out for rank in (0, 1))  # both may print at once
    folder = tmp_path / "runs/tiny/v"
    file = folder / "diverged/step-4/process-1.ckpt"
    assert err.count(f"error: training diverged in step 4: {reason}") == 1
    assert "on process 1. No optimizer step followed" in err
    assert f"python -m revdeq_lightning replay --file {file}" in err
    assert sorted(path.name for path in file.parent.iterdir()) == ["process-1.ckpt", "weights.ckpt"]
    assert [row["step"] for row in table(folder / "metrics.csv") if "train/loss" in row] == ["0", "1", "2"]
    if what == "pixel":
        assert "DivergenceError: the state is not finite" in replay(str(file))
