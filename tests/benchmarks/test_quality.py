"""What the comparison at equal cost counts, and when its runs end."""

import csv
import math
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.core import pairs
from benchmarks.quality import __main__ as quality, architecture, budget
from benchmarks.quality.budget import Budget
from revdeq_lightning.equilibrium import EquilibriumLayer, MomentumSolver
from tests.helpers.data import image_folder
from tests.helpers.equilibrium import AttentionBlock
from tests.helpers.runs import text_file


def test_flops_of_linear_maps_are_those_of_the_formula():
    model, x = torch.nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    assert budget.step_flops(lambda: model(x).sum().backward()) == 3 * 2 * 3 * 5 * 7  # forward, and twice backward


def test_flops_are_those_of_pytorchs_own_counter():
    block, x = AttentionBlock(16, 2), torch.randn(2, 5, 16, requires_grad=True)

    def step():
        block(x, x).sum().backward()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    assert budget.step_flops(step) == counter.get_total_flops() > 0


def test_flops_of_a_reversible_step_count_the_evaluations_of_its_backward_pass():
    torch.manual_seed(0)
    layer, x = EquilibriumLayer(AttentionBlock(16, 2), solver=MomentumSolver(max_steps=5)), torch.randn(2, 5, 16)
    forward = budget.step_flops(lambda: layer.f(x, x))
    assert budget.step_flops(lambda: layer(x).value.sum().backward()) == pytest.approx(4 * 5 * forward, rel=0.02)


def small(part, budget):
    variants = {"RevDEQ, momentum": part.variants["RevDEQ, momentum"]}
    changes = {"model.network.d_model": 16, "model.network.d_mlp": 24} if part is quality.TEXT else {}
    changes |= {"model.network.channels": [16, 16]} if part is quality.IMAGES else {}
    variants = {name: v._replace(changes={**v.changes, **changes}) for name, v in variants.items()}
    return part._replace(variants=variants, budget=budget, search_seconds=0.05, rates=(0.5, 1.0))


def run(monkeypatch, tmp_path, parts, **paths):
    monkeypatch.setattr(quality, "PARTS", parts)
    words = [f"--{name}={path}" for name, path in paths.items()]
    words += [f"--output={tmp_path / 'results'}", f"--cache={tmp_path / 'cache'}", "--seeds", "3"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["quality", *words])
    quality.main()
    torch.set_num_threads(threads)
    files = (tmp_path / "results").glob("*.csv")
    return {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in files}


def test_a_run_ends_when_both_budgets_are_spent_and_is_not_made_twice(tmp_path, monkeypatch, capsys):
    part = small(quality.TEXT, Budget(cpu_seconds=0.2, flops=3e8, longest=60, num_points=2))
    found = run(monkeypatch, tmp_path, [part], text=text_file(tmp_path))
    (row,) = found["quality_text_runs"]
    assert float(row["cpu_minutes_cpu"]) >= 0.2 / 60 - 0.005  # two decimals
    assert float(row["tflop_flops"]) == pytest.approx(3e-4, rel=0.3)
    assert 0 < float(row["figure_cpu"]) < 10
    assert 0 < float(row["figure_flops"]) < 10
    assert float(row["evaluations"]) == 4
    assert {r["rate"] for r in found["quality_text_search"]} == {"0.5", "1.0"}
    best = min(found["quality_text_search"], key=lambda r: float(r["figure"]))
    assert row["rate"] == best["rate"]
    assert [r["evaluations"] for r in found["quality_text_depths"]] == ["1", "2", "4", "8", "16"]
    seconds = [float(r["cpu_seconds"]) for r in found["quality_text_curves"]]
    assert len(seconds) == 2
    assert seconds[0] >= 0.1
    assert seconds[1] >= 0.2
    page = (tmp_path / "results" / "quality.md").read_text()
    assert "| RevDEQ, momentum |" in page
    assert (tmp_path / "results" / "quality.png").stat().st_size > 10_000
    capsys.readouterr()
    monkeypatch.setattr(quality, "train", None)  # nothing is left to train
    assert run(monkeypatch, tmp_path, [part], text=text_file(tmp_path)) == found


def test_what_an_evaluation_is_worth_where_the_loss_is_the_logarithm_of_the_layers():
    """Then the interpolation in log(n) is exact, and a loss of `-log(2 + 2 * 4**0.46)` is one of phi = 0.46."""
    losses = {n: -math.log(n) for n in (1, 2, 3, 4, 8)}
    name = "1 + RevDEQ, 2 x 4 + 1"
    assert architecture.SHAPES[name] == (2, 2, 4)
    loss = -math.log(2 + 2 * 4**0.46)
    assert architecture.phi(losses, (2, 2, 4), loss) == pytest.approx(0.46)
    assert architecture.phi(losses, (2, 2, 4), -math.log(9)) is None
    assert architecture.phi({**losses, 4: 0.0}, (2, 2, 4), loss) is None  # more layers, more loss
    facts = {"cpu": "C", "torch": "T", "commit": "A", "parameters": "1", "command": "python"}
    columns = ("figure", "steps", "tflop", "cpu_seconds")
    rows = [
        {
            **facts,
            "variant": variant,
            "seed": seed,
            **{f"{c}_{b}": value for c in columns for b in architecture.BUDGETS},
        }
        for seed in ("0", "1")
        for variant, value in [*((v, str(losses[n])) for n, v in architecture.STACKS.items()), (name, str(loss))]
    ]
    (line,) = (
        line for line in architecture.page(rows).split("## At equal FLOPs")[0].splitlines() if name + " |" in line
    )
    assert line.endswith("| 0.46 (0.46 - 0.46) |")


def test_images_are_compared_by_accuracy(tmp_path, monkeypatch):
    part = small(quality.IMAGES, Budget(cpu_seconds=0.1, flops=1e6, longest=60, num_points=1))

    def make(settings, *arguments):
        settings["data"] |= {"batch_size": 8, "image_size": 16, "validation_fraction": 0.25}
        return quality.make_images(settings, *arguments)

    found = run(monkeypatch, tmp_path, [part._replace(make=make)], images=image_folder(tmp_path))
    (row,) = found["quality_images_runs"]
    assert 0 <= float(row["figure_cpu"]) <= 100
    assert row["rate"] == max(found["quality_images_search"], key=lambda r: float(r["figure"]))["rate"]


def test_every_variant_is_built_from_its_configuration(tmp_path):
    for part in (quality.TEXT, quality.IMAGES):
        for variant in part.variants.values():
            settings = budget.settings_of(variant.configs, variant.changes)
            for key, value in variant.changes.items():
                place = settings
                for name in key.split("."):
                    place = place[name]
                assert place == value
    scaled = budget.scaled({"lr": 0.1, "muon_lr": 0.02, "embedding_lr": None, "eps": 1e-8, "schedule": "linear"}, 0.5)
    assert scaled == {"lr": 0.05, "muon_lr": 0.01, "embedding_lr": None, "eps": 1e-8, "schedule": "constant"}


def test_pairs_measure_what_the_adjoints_promise():
    chosen = ("Picard", "RevDEQ 0.8", "Anderson"), ("reversible", "backprop, checkpointed", "implicit", "Jacobian-free")
    rows = {(r["block"], r["solver"], r["adjoint"]): r for r in pairs.measure(8, 3, *chosen)}
    contracting = {key[1:]: row for key, row in rows.items() if key[0] == "contracting"}
    assert float(contracting["RevDEQ 0.8", "reversible"]["error_bptt"]) <= 1e-6
    assert float(contracting["Anderson", "implicit"]["error_fixed_point"]) <= 1e-4
    assert float(contracting["Picard", "Jacobian-free"]["error_fixed_point"]) > 1e-2
    assert contracting["Picard", "backprop, checkpointed"]["backward"] == 16
    lost = rows["without a fixed point", "Picard", "implicit"]
    assert lost["error_fixed_point"] == ""
    assert float(lost["error_bptt"]) > 0.5
    assert float(rows["without a fixed point", "RevDEQ 0.8", "reversible"]["error_bptt"]) <= 1e-6
    assert not any(math.isnan(float(row["residual"])) for row in rows.values())
