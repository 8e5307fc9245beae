"""The comparison of gradients on mazes: its competitors, its table, and the memory of a step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.quality import __main__ as quality, extrapolation, mazes, puzzles, reasoning, reasoning_memory
from benchmarks.quality.budget import settings_of, step_flops
from benchmarks.quality.mazes import EXACT, LAST, ONE_STEP, PAPER, STACK, STORED, THIN_STACK
from benchmarks.quality.training import read
from revdeq_lightning.models import ReasonerConfig
from revdeq_lightning.models.build import SolverConfig, build_reasoner


def test_competitors_differ_in_the_gradient_alone():
    exact, stored, last_1, last_10, one_step = (
        torch.cat([g.flatten() for g in reasoning_memory.training_step(name, 8, mazes.TINY)[0]()])
        for name in (EXACT, STORED, LAST[1], LAST[10], ONE_STEP)
    )
    torch.testing.assert_close(exact, stored)
    torch.testing.assert_close(last_10, stored)  # all 8 evaluations are among the last 10
    assert float((last_1 - stored).norm() / stored.norm()) > 0.01
    assert float((one_step - stored).norm() / stored.norm()) > 0.01


def test_every_competitor_is_of_the_size_it_says(tmp_path):
    sizes = {}
    for name, variant in mazes.variants(32).items():
        task, _ = mazes.make(settings_of(variant.configs, variant.changes), None, 0, tmp_path)
        sizes[name] = sum(p.numel() for p in task.parameters())
    explicit = {name: sizes.pop(name) for name in (STACK, THIN_STACK)}
    assert len(set(sizes.values())) == 1
    assert explicit[THIN_STACK] == pytest.approx(sizes[EXACT], rel=0.05)
    assert explicit[STACK] > 15 * sizes[EXACT]


def test_runs_fill_the_table_and_are_not_made_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    command = ["--quick", "--output", str(tmp_path), "--only", EXACT, ONE_STEP]
    assert reasoning.main(command) == 0
    rows = read(tmp_path / "reasoning.csv")
    assert [row["gradient"] for row in rows] == [EXACT, ONE_STEP]
    for row in rows:
        assert int(row["steps_steps"]) == 2
        assert float(row["peak_mib"]) > 0
        assert all(0 <= float(row[f"solved_{size}_{budget}"]) <= 100 for size in (3, 4) for budget in ("steps", "cpu"))
    assert (tmp_path / "reasoning.png").stat().st_size > 10_000
    monkeypatch.setattr(quality, "train", None)  # nothing is left to train
    monkeypatch.setattr(reasoning, "train", None)
    assert reasoning.main(command) == 0
    assert rows == read(tmp_path / "reasoning.csv")
    assert "nan" not in capsys.readouterr().out


def test_the_page_names_the_seeds_of_each_row():
    def row(gradient, seed, solved):
        facts = {"gradient": gradient, "evaluations": "32", "seed": seed, "rate": "1.0", "parameters": "63890"}
        facts |= {"peak_mib": "20", "cpu": "CPU", "torch": "2", "commit": "abc"}
        for budget in ("steps", "cpu"):
            facts |= {f"steps_{budget}": "600", f"cpu_minutes_{budget}": "3.00", f"solved_5_{budget}": solved}
        return facts

    page = reasoning.page([row(ONE_STEP, "0", "nan"), row(EXACT, "2", "90"), row(EXACT, "0", "100")])
    lines = [line for line in page.splitlines() if line.startswith(f"| {EXACT} ")]
    assert len(lines) == 2
    assert lines[0] == f"| {EXACT} | 32 | 0, 2 | 1 | 63,890 | 600 | 3.00 | 20.0 | 95.0 (90 - 100) |"
    assert f"| {ONE_STEP} | 32 | 0 | 1 | 63,890 | 600 | 3.00 | 20.0 | not reached |" in page


def test_only_some_gradients_are_trained_with_other_numbers_of_evaluations():
    found = reasoning.jobs([EXACT, PAPER], [16, 32], [0, 1])
    assert found == [(EXACT, 32, 0), (PAPER, 32, 0), (EXACT, 32, 1), (PAPER, 32, 1), (EXACT, 16, 0), (EXACT, 16, 1)]


def test_memory_of_the_exact_gradient_grows_by_its_digits_and_that_of_bptt_by_all():
    rows = reasoning_memory.measure(quick=True)
    sizes = {(row["gradient"], row["evaluations"]): row["bytes"] for row in rows}
    assert sizes[EXACT, 8] <= 1.02 * sizes[EXACT, 4]
    assert sizes[STORED, 8] > 1.4 * sizes[STORED, 4]
    assert all(requirement.is_met for requirement in reasoning_memory.judge(rows))
    growing = [row | {"bytes": row["bytes"] * row["evaluations"]} for row in rows]
    assert not any(requirement.is_met for requirement in reasoning_memory.judge(growing))


class Adder(torch.nn.Linear):
    """A model of prefix sums that needs one evaluation a bit, and is right up to some length."""

    longest = 4096

    def steps_for(self, shape):
        return shape[0]

    def forward(self, inputs, max_steps):
        assert max_steps == inputs.shape[1]
        right = inputs.cumsum(1) % 2 if inputs.shape[1] <= self.longest else inputs
        evaluations = torch.full((len(inputs),), max_steps)
        return SimpleNamespace(logits=F.one_hot(right, 2).movedim(-1, 1), evaluations=evaluations)


@pytest.mark.parametrize(("longest", "code"), [(4096, 0), (128, 1)])
def test_strings_are_judged_by_their_lengths(tmp_path, monkeypatch, longest, code):
    monkeypatch.setattr(Adder, "longest", longest)
    monkeypatch.setattr(
        extrapolation, "load_reasoner", lambda path: (Adder(1, 1), {"puzzle": "prefix_sums", "size": 32})
    )
    assert puzzles.main(["--checkpoint", "a", "b", "--output", str(tmp_path)]) == code
    solved = {(row["seed"], row["size"]): float(row["solved"]) for row in read(tmp_path / "puzzles.csv")}
    assert solved == {
        (seed, size): float(int(size) <= longest) for seed in "01" for size in ("32", "128", "512", "4096")
    }


def test_cost_of_a_step_is_the_one_that_the_configuration_for_a_gpu_names():
    path = "configs/reasoning/sudoku_extreme.yaml"
    settings = settings_of([path])
    model = ReasonerConfig(num_symbols=10, num_answers=9, shape=(9, 9), **settings["model"]["network"])
    flops = []
    for evaluations in (1, 2):  # it is linear in them
        solver = SolverConfig(**settings["model"]["solver"] | {"max_steps": evaluations})
        reasoner = build_reasoner(model, solver)
        flops.append(step_flops(lambda of=reasoner: of(torch.zeros(1, 9, 9, dtype=torch.long)).logits.sum().backward()))
    evaluations = settings["model"]["solver"]["max_steps"]
    step = settings["data"]["batch_size"] * (flops[0] + (evaluations - 1) * (flops[1] - flops[0]))
    text = Path(path).read_text()
    assert f"A step is {step / 1e12:.1f} TFLOP" in text
    assert f"the run {step * settings['trainer']['max_steps']:.2g}".replace("+", "") in text
