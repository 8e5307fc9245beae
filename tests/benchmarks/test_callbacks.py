"""The benchmark of the callbacks, without its minutes: how it sums up, and what it finds wanting."""

import csv
import json

import pytest

from benchmarks.cluster import callbacks


def test_a_round_is_measured_judged_and_written(tmp_path, monkeypatch, capsys):
    class Fake(callbacks.Clock):
        """A step takes 1 s, and 0.02 s more for each callback; a validation 5 s, and 7 s more for each."""

        def __init__(self, number):
            self.seconds, self.validation = 1 + 0.02 * number, 5.0 + 7 * number

        seconds_per_step = property(lambda self: self.seconds)

    def fit(make, folder, added, num_steps, *, validate=False):
        return Fake(len(added))

    monkeypatch.setattr(callbacks, "fit", fit)
    assert callbacks.main(["--rounds", "2", "--output", str(tmp_path)]) == 1
    with (tmp_path / "callbacks.csv").open() as file:
        shares = {(row["task"], row["callback"]): float(row["share of a step"]) for row in csv.DictReader(file)}
    text, images = callbacks.TASKS
    assert shares[text, callbacks.ALWAYS] == pytest.approx(3 * 0.02)
    assert shares[text, "GradientError"] == pytest.approx(0.02 / 500)
    assert shares[text, "ResidualCurve"] == pytest.approx(0.02 / 100)
    assert shares[text, "DepthSweep"] == pytest.approx(7 / 175)
    assert shares[images, "Samples"] == pytest.approx(7 / 702)
    page = (tmp_path / "callbacks.md").read_text()
    assert "| DepthSweep | 175 / 702 steps | 4.00% | 1.00% |" in page
    verdict = {r["name"]: r["is_met"] for r in json.loads((tmp_path / "callbacks.json").read_text())["verdict"]}
    assert verdict == {
        "language model: all callbacks, share of a step's time": False,
        "language model: GradientError, share of a step's time": True,
        "classifier: all callbacks, share of a step's time": False,
        "classifier: GradientError, share of a step's time": True,
    }
