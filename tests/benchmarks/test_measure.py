import csv
import json
import os

import pytest
import torch

from benchmarks import measure, requirements
from benchmarks.core import __main__ as core, reference


def test_peak_tensor_bytes_counts_what_lives_at_one_moment():
    def run():
        a = torch.zeros(1000)
        b = torch.zeros(500, dtype=torch.float64)
        view = b.view(5, 100)
        del a
        return torch.zeros(100), view, b.add_(1)

    assert measure.peak_tensor_bytes(run) == 1000 * 4 + 500 * 8


def test_peak_tensor_bytes_counts_what_autograd_saves():
    def run(depth):
        start = torch.ones(100, requires_grad=True)
        z = start
        for _ in range(depth):
            z = torch.exp(z)  # saves its result
        torch.autograd.grad(z.sum(), start)

    shallow, deep = (measure.peak_tensor_bytes(lambda depth=depth: run(depth)) for depth in (10, 110))
    assert deep - shallow == 100 * 400


def test_peak_tensor_bytes_sees_the_backward_pass():
    weight = torch.ones(1000, requires_grad=True)

    def run():
        torch.autograd.grad((2 * weight).sum(), weight)

    # Forward: the product and its sum; backward: ones, and their product with 2, while the sum is still held.
    assert measure.peak_tensor_bytes(run) >= 4000 + 4
    assert measure.peak_tensor_bytes(run) == measure.peak_tensor_bytes(run)


def test_peak_tensor_bytes_ignores_what_was_there_before():
    held = torch.ones(1000)

    def run():
        held.mul_(2)
        held.view(10, 100).add_(1)

    assert measure.peak_tensor_bytes(run) == 0


def touch_bytes(num_bytes):
    return lambda: torch.ones(num_bytes // 4).sum()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")
def test_process_peak_rises_by_what_is_touched():
    peaks = [measure.process_peak_bytes(touch_bytes, megabytes * 2**20) for megabytes in (64, 128)]
    # Resident pages, not bytes: within 2 MiB.
    assert peaks[1] - peaks[0] == pytest.approx(64 * 2**20, abs=2 * 2**20)


def test_paired_ratio_is_of_each_round_not_of_the_totals():
    assert measure.paired_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == (2.0, 2.0, 3.0)


def test_loops_agree_with_their_closed_form():
    """f(z) = z / 2 + 1 from z0 = 0: two evaluations by hand."""

    def f(z, x):
        return z / 2 + x

    z0, x = torch.zeros(1, 1), torch.ones(1, 1)
    # y1 = 0.8; z1 = 0.8 * (0.4 + 1)
    assert reference.reversible_loop(f, z0, x, beta=0.8, num_steps=1).item() == pytest.approx(1.12, rel=1e-6)
    # 1, then 1.5 + 0.25 * (1 - 0)
    assert reference.momentum_loop(f, z0, x, momentum=0.25, num_steps=2).item() == pytest.approx(1.75, rel=1e-6)


def test_a_number_that_is_lost_misses_its_requirement():
    assert requirements.largest([1e-7, float("nan")]) == float("inf")
    assert not requirements.at_most("", float("inf"), 1e-5, "{:.1e}").is_met


def test_core_quick_writes_tables_figure_and_origin(tmp_path, capsys):
    assert core.main(["--quick", "--output", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "core.json",
        "core.md",
        "core.png",
        *(f"core_{name}.csv" for name in ("convergence", "cost", "gradients", "memory")),
    }
    origin = json.loads((tmp_path / "core.json").read_text())
    assert {"command", "date", "hardware", "versions", "commit", "uncommitted_changes"} <= set(origin)
    with (tmp_path / "core_gradients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arithmetic"] for row in rows} == {"exact", "float64", "float32"}
    assert "reconstruction mismatch" in capsys.readouterr().out
