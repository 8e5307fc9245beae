"""kill -9 at random moments, in the midst of saving too: every run goes on, and ends as if nothing had been."""

import json
from pathlib import Path

import pytest

from tests.helpers.processes import run_python
from tests.helpers.runs import tiny_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAX_STEPS = 30


def kill(folder, num_kills, seed, processes=1):
    config = tiny_config(folder, max_steps=MAX_STEPS, val_check_interval=10)
    text = config.read_text().replace("run:\n", "run:\n  checkpoint_every_n_steps: 3\n")
    config.write_text(text.replace("sample_tokens: 5", "sample_tokens: 0"))
    report = folder / "report.json"
    options = ["--config", config, "--folder", folder, "--kills", num_kills, "--seed", seed, "--report", report]
    options += ["--processes", processes]
    run_python("-m", "benchmarks.cluster.killing", *options, seconds=900, cwd=ROOT)
    return json.loads(report.read_text())


def test_killed_runs_go_on_and_end_as_the_undisturbed_one(tmp_path):
    report = kill(tmp_path, 10, 0)
    assert len(report["kills"]) == 10
    assert report["differences"] == []
    assert report["finished"] >= 1
    # Nothing is lost but the steps since the last checkpoint, of which there is one every three steps.
    assert all(0 <= kill["steps_to_repeat"] <= 3 for kill in report["kills"])
    assert any("event" in kill for kill in report["kills"])


def test_sharded_runs_of_which_one_process_is_killed_end_as_the_undisturbed_one(tmp_path):
    report = kill(tmp_path, 4, 2, processes=2)
    assert report["differences"] == []
    assert report["finished"] >= 1
    assert all(0 <= kill["steps_to_repeat"] <= 3 for kill in report["kills"])
    assert {kill["struck"] for kill in report["kills"]} == {0, 1}
    assert any("event" in kill for kill in report["kills"])
    for struck in report["kills"]:
        if struck["newest"] == MAX_STEPS:
            continue  # it had parted from the other one, whose training is over
        (error,) = struck["errors"]
        assert error.startswith(f"error: rank {1 - struck['struck']} lost another process")
