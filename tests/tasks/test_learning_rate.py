"""The learning rate of each step is logged."""

import pytest

from tests.helpers.runs import run, run_metrics, tiny_config


def test_the_logged_rates_are_those_of_the_schedule(tmp_path):
    optimizer = {"optimizer": "muon", "lr": 0.3, "muon_lr": 0.5, "embedding_lr": 0.7, "schedule": "linear"}
    options = [f"--model.optimizer.{name}={value}" for name, value in optimizer.items()]
    config = tiny_config(tmp_path, max_steps=4)
    run("fit", "--config", config, "--run.version=v", "--model.optimizer.warmup_steps=1", *options, "--run.test=false")
    rows = [row for row in run_metrics(tmp_path / "runs/tiny/v") if "train/loss" in row]
    # Half of it in the step of the warm-up, then a quarter of the peak less in each.
    factors = [0.5, 0.75, 0.5, 0.25]
    assert [float(row["train/lr"]) for row in rows] == pytest.approx([0.3 * f for f in factors])
    assert [float(row["train/muon_lr"]) for row in rows] == pytest.approx([0.5 * f for f in factors])
