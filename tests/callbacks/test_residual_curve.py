"""The curves that a run keeps: their steps, their ends beside what another callback logs, and what they cost."""

import pytest
from lightning import Callback
from PIL import Image

from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.callbacks.residual_curve import ResidualCurve
from revdeq_lightning.equilibrium import (
    BackpropAdjoint,
    DivergenceError,
    EquilibriumLayer,
    MomentumSolver,
    PicardSolver,
    ReversibleSolver,
)
from revdeq_lightning.loggers.plots import by_step, residual_plots, save_png
from tests.helpers.modules import Stranger, loader, table, trainer


def read(path):
    return [{key: float(value) for key, value in row.items()} for row in table(path)]


def layer_records(module):
    """Whether a solve outside the run records."""
    return EquilibriumLayer(module.layers[0].f, solver=MomentumSolver(max_steps=1))(
        next(iter(loader()))[0][:, :1].expand(-1, 6)
    ).stats.residual_curve


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_curves_of_each_solve_end_where_the_metrics_say(tmp_path, accumulate):
    solvers = ReversibleSolver(max_steps=3), MomentumSolver(max_steps=4)
    callbacks = [ResidualCurve(2), FunctionEvaluations()]
    module = Stranger(*solvers)
    trainer(tmp_path, callbacks, accumulate_grad_batches=accumulate).fit(module, loader())
    rows = read(tmp_path / "logs" / "residual_curve.csv")
    numbers = [(1, i + 1) for i in range(6)] + [(2, i + 1) for i in range(4)]
    assert [(row["step"], row["solve"], row["evaluation"]) for row in rows] == [
        (step, *number) for step in (1, 3, 5) for number in numbers
    ]
    assert {row["num_samples"] for row in rows} == {8}
    metrics = {row["step"]: row for row in read(tmp_path / "logs" / "metrics.csv") if "equilibrium/forward_nfe" in row}
    for solve, last in ((1, 6), (2, 4)):
        for row in rows:
            if (row["solve"], row["evaluation"]) == (solve, last):
                logged = metrics[row["step"]][f"equilibrium/{solve}/relative_residual"]
                assert row["relative_residual"] == pytest.approx(logged, rel=1e-6)  # the mean in float32
    assert module.calls == 20 * 6 * accumulate  # forward and backward: none for the curves
    assert layer_records(module) is None
    with Image.open(tmp_path / "logs" / "residual_curve.png") as image:
        assert image.width > 100


def test_a_sample_that_stopped_is_in_no_later_row(tmp_path):
    module = Stranger(PicardSolver(max_steps=30, rtol=0.02), adjoint=BackpropAdjoint(), scale=0.9)
    trainer(tmp_path, [ResidualCurve(1, tmp_path)], max_steps=1).fit(module, loader())
    rows = read(tmp_path / "residual_curve.csv")
    counts = [row["num_samples"] for row in rows]
    assert counts[0] == 8
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[-1] < 8
    assert len(rows) < 30


class Explode(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            pl_module.layers[0].f.offset = float("nan")


def test_after_an_error_in_a_recorded_step_nothing_records(tmp_path):
    module = Stranger()
    with pytest.raises(DivergenceError):
        trainer(tmp_path, [Explode(), ResidualCurve(2)]).fit(module, loader())
    module.layers[0].f.offset = 0.0
    assert layer_records(module) is None
    assert {row["step"] for row in read(tmp_path / "logs" / "residual_curve.csv")} == {1}


def test_a_residual_of_zero_can_be_drawn(tmp_path):
    rows = [{"step": 9, "solve": 1, "evaluation": i, "relative_residual": 0.0, "num_samples": 2} for i in (1, 2)]
    save_png(residual_plots(by_step(rows)), tmp_path / "zero.png")
    assert (tmp_path / "zero.png").is_file()
