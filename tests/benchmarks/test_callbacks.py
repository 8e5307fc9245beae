"""The benchmark of the callbacks, without its minutes: how it sums up, and what it finds wanting."""

import json

import pytest

from benchmarks.cluster import callbacks


def result(**overheads):
    numbers = dict.fromkeys(("GradientError", "DepthSweep"), 0.001) | overheads
    return {"task": "language model", "overheads": numbers, "all": sum(numbers.values())}


def test_limits_are_judged():
    assert callbacks.judge([result()]) == []
    (fault,) = callbacks.judge([result(DepthSweep=0.05)])
    assert fault == "all callbacks, language model: 5.10% of a step, required < 3%"
    assert len(callbacks.judge([result(GradientError=0.04)])) == 2


def test_a_round_is_measured_and_written(tmp_path, monkeypatch, capsys):
    class Fake(callbacks.Clock):
        """A step takes 1 s, and 0.02 s more for each callback; a validation 5 s, and 7 s more for each."""

        def __init__(self, number):
            self.seconds, self.validation = 1 + 0.02 * number, 5.0 + 7 * number

        seconds_per_step = property(lambda self: self.seconds)

    def fit(make, folder, added, num_steps, *, validate=False):
        return Fake(len(added))

    monkeypatch.setattr(callbacks, "fit", fit)
    monkeypatch.setattr("sys.argv", ["callbacks", "--rounds", "2", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        callbacks.main()
    assert stop.value.code == 1
    first, second = json.loads((tmp_path / "callbacks.json").read_text())["results"]
    assert first["overheads"][callbacks.ALWAYS] == pytest.approx(3 * 0.02)
    assert first["overheads"]["GradientError"] == pytest.approx(0.02 / 500)
    assert first["overheads"]["ResidualCurve"] == pytest.approx(0.02 / 100)
    assert first["overheads"]["DepthSweep"] == pytest.approx(7 / 175)
    assert second["overheads"]["Samples"] == pytest.approx(7 / 702)
    page = (tmp_path / "callbacks.md").read_text()
    assert "| DepthSweep | 175 / 702 steps | 4.00% | 1.00% |" in page
    assert "all callbacks, language model: 14" in page
