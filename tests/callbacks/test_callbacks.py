import csv
import io
import random

import numpy as np
import pytest
import torch
from lightning import Callback
from rich.console import Console

from revdeq_lightning.callbacks import (
    Contraction,
    Cost,
    DepthJitter,
    DepthSweep,
    FunctionEvaluations,
    GradientError,
    ImageSamples,
    ReconstructionCertificate,
    ResidualCurve,
    TextSamples,
)
from revdeq_lightning.checkpoints.callbacks import LastCheckpoint
from revdeq_lightning.equilibrium import ReversibleSolver
from revdeq_lightning.errors import RecordWarning
from revdeq_lightning.loggers.csv_logger import ContinuedCSVLogger
from revdeq_lightning.loggers.progress import RunProgress
from revdeq_lightning.runs.random_state import random_state, set_random_state
from revdeq_lightning.tasks.averaged_weights import AveragedWeights
from tests.helpers.equilibrium import Spy
from tests.helpers.modules import Stranger, loader, trainer as stranger_trainer
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


def test_random_states_load_without_code_and_repeat_the_draws(tmp_path):
    random.gauss(0, 1)  # leaves a second number in store
    torch.save(random_state(), tmp_path / "state")
    first = random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3).tolist()  # noqa: NPY002
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert first == (random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(3).tolist())  # noqa: NPY002


def test_average_of_the_weights_is_the_recurrence_and_validation_sees_it(tmp_path):
    class Watch(Callback):
        weights, validated, after = [], [], []

        def on_train_start(self, trainer, pl_module):
            self.weights.append(pl_module.model.norm.weight.detach().clone())

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights.append(pl_module.model.norm.weight.detach().clone())

        def on_validation_epoch_start(self, trainer, pl_module):
            self.validated.append(pl_module.model.norm.weight.detach().clone())

        def on_validation_end(self, trainer, pl_module):
            self.after.append(pl_module.model.norm.weight.detach().clone())

    data, watch = tiny_data(tmp_path), Watch()
    average = AveragedWeights(0.8)
    trainer = tiny_trainer(tmp_path, [average, watch], max_steps=6, val_check_interval=6)
    trainer.fit(tiny_task(data, optimizer={"lr": 0.05}), data)
    expected = watch.weights[0].double()
    for step, weight in enumerate(watch.weights[1:], 1):
        decay = min(0.8, step / (step + 9))
        expected = decay * expected + (1 - decay) * weight.double()
    torch.testing.assert_close(watch.validated[0].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(watch.after[0], watch.weights[-1])


def rows(path):
    with path.open(newline="") as file:
        return [(int(row["step"]), row["a"], row.get("b") or "") for row in csv.DictReader(file)]


def test_csv_file_is_continued_and_rewound_to_the_checkpoint(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    first = ContinuedCSVLogger(tmp_path / "run")
    for step in range(4):
        first.log_metrics({"a": float(step)}, step)
    assert [row[0] for row in rows(path)] == [0, 1, 2, 3]
    second = ContinuedCSVLogger(tmp_path / "run")
    second.rewind(2)
    second.log_metrics({"a": 20.0, "b": 1.0}, 2)
    assert rows(path) == [(0, "0.0", ""), (1, "1.0", ""), (2, "20.0", "1.0")]


GOOD = b"a,step\r\n0.0,0\r\n1.0,1\r\n2.0,2\r\n"


@pytest.mark.parametrize(
    "content",
    [
        GOOD + b"\0" * 200_000 + b"\n",  # what a crash of the machine leaves
        GOOD + b"3.0\r\n",
        GOOD + b"3.0,3,3.0\r\n",
        GOOD.replace(b"1.0", b"\xff.0"),
        b"something else\nmore\n",
        b"x" * 200_000 + b"\ny\n",  # longer than the csv module's fields
    ],
)
def test_a_csv_file_that_is_damaged_or_another_is_moved_aside(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    (tmp_path / "metrics.damaged-1.csv").write_text("kept before")
    logger = ContinuedCSVLogger(tmp_path)
    with pytest.warns(RecordWarning, match=r"metrics.csv is damaged.* moved to metrics.damaged-2.csv, and a new file"):
        logger.rewind(3)
    logger.log_metrics({"a": 30.0}, 3)
    assert rows(path) == [(3, "30.0", "")]
    assert (tmp_path / "metrics.damaged-2.csv").read_bytes() == content
    ContinuedCSVLogger(tmp_path).rewind(4)  # now it is whole


@pytest.mark.parametrize("content", [b"", b"\r\n", GOOD[:3], GOOD + b"3.", GOOD])
def test_a_csv_file_that_was_only_begun_or_cut_by_a_kill_is_not_called_damaged(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    logger = ContinuedCSVLogger(tmp_path)
    logger.rewind(2)
    logger.log_metrics({"a": 20.0}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    whole = [(0, "0.0", ""), (1, "1.0", "")] if content.startswith(GOOD) else []
    assert rows(path) == [*whole, (2, "20.0", "")]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_the_figures(tmp_path, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, highlight=False)
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(
        tmp_path, [RunProgress(0.0, console)], max_steps=4, val_check_interval=2, enable_progress_bar=True
    )
    trainer.fit(tiny_task(data), data)
    text = out.getvalue()
    for word in ("loss", "tokens/s", "3 evaluations", "residual", "4/4", "bits/byte"):
        assert word in text
    if not terminal:
        lines = text.splitlines()
        assert len(lines) == 4  # two logging steps, two validations
        assert all(line.startswith("step ") for line in lines)


def test_the_progress_of_a_test_is_over_all_loaders(tmp_path):
    class Tested(Stranger):
        def test_step(self, batch, batch_idx, dataloader_idx):
            counts.append(progress._bar.tasks[0].completed)

    counts, out = [], io.StringIO()
    progress = RunProgress(console=Console(file=out, force_terminal=True, width=80))
    loaders = [loader(num_samples=8 * n) for n in (3, 2)]
    stranger_trainer(tmp_path, [progress], enable_progress_bar=True).test(Tested(), loaders, verbose=False)
    assert counts == [0, 1, 2, 3, 4]
    assert "5/5" in out.getvalue()


def test_without_logging_steps_nothing_is_logged_or_piles_up(tmp_path, capsys):
    """Lightning's `log_every_n_steps=0`; the count of certified gradients is printed all the same."""

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            assert not any(key.startswith(("equilibrium/", "system/")) for key in trainer.callback_metrics)
            assert cost._clock is None

    console, cost = Console(file=io.StringIO()), Cost()
    callbacks = [ReconstructionCertificate(), cost, RunProgress(0.0, console), Watch()]
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(tmp_path, callbacks, max_steps=4, log_every_n_steps=0, enable_progress_bar=True)
    trainer.fit(tiny_task(data), data)
    assert trainer.global_step == 4
    assert "4 of 4 gradients certified exact" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [FunctionEvaluations, ResidualCurve])
def test_the_host_does_not_wait_between_logging_steps(tmp_path, kind):
    counts = {}

    class Watched(kind):
        def on_train_batch_end(self, trainer, *arguments):
            with Spy() as spy:
                super().on_train_batch_end(trainer, *arguments)
            counts[trainer.global_step] = spy.count

    callback = Watched(*([3] if kind is ResidualCurve else []))
    module = Stranger(ReversibleSolver(max_steps=5, rtol=1e-2))
    stranger_trainer(tmp_path, [callback], log_every_n_steps=3).fit(module, loader())
    assert [counts[step] for step in (1, 2, 4, 5)] == [0] * 4


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (ResidualCurve, {"every_n_steps": 0}, "must be at least 1, got 0"),
        (GradientError, {"every_n_steps": 0}, "must be at least 1, got 0"),
        (GradientError, {"num_samples": 0}, "must be at least 1, got 0"),
        (GradientError, {"max_steps": 0}, "must be at least 1, got 0"),
        (GradientError, {"references": ("exact",)}, r"must be some of \('bptt', 'converged'\), got \('exact',\)"),
        (Contraction, {"num_iterations": 1}, "must be at least 2, got 1"),
        (Contraction, {"warn_at": 0.0}, r"must be in \(0, inf\), got 0.0"),
        (Cost, {"peak_flops": 0}, r"must be in \(0, inf\), got 0"),
        (ReconstructionCertificate, {"policy": "ignore"}, "must be one of 'warn', 'raise', 'stop', got 'ignore'"),
        (DepthSweep, {"every_n_validations": -1}, "must be at least 0, got -1"),
        (DepthSweep, {"num_batches": 0}, "must be at least 1, got 0"),
        (TextSamples, {"prompts": []}, "must hold at least one text"),
        (TextSamples, {"prompts": ["a", ""]}, "none of them empty"),
        (ImageSamples, {"every_n_validations": 0}, "must be at least 1, got 0"),
        (ImageSamples, {"num_images": 0}, "must be at least 1, got 0"),
        (DepthJitter, {"steps": []}, r"must be numbers of solver steps to draw from, got \[\]"),
        (DepthJitter, {"seed": -1, "steps": [2]}, "must be at least 0, got -1"),
        (LastCheckpoint, {"keep_last": 0}, "must be at least 1, got 0"),
        (LastCheckpoint, {"every_n_steps": 0}, "must be at least 1, got 0"),
        (LastCheckpoint, {"every_minutes": 0.0}, r"must be in \(0, inf\], got 0.0: null for never"),
    ],
)
def test_settings_out_of_range_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.* {message}"):
        make(**settings)
