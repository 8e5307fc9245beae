"""The frame that the parts of `make bench` share, and what they are made of."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as bench, part
from benchmarks.core import depth, gpu
from benchmarks.core.problems import attention_problem, revdeq, reversible_step
from benchmarks.core.reference import reversible_loop
from benchmarks.isolated import MEASURED_MEMORY, Isolated, time_alternating
from benchmarks.measure import peak_tensor_bytes
from benchmarks.peers import authors, tasks, torchdeq_peer
from benchmarks.peers.released_names import our_name
from benchmarks.requirements import Requirement

MET, MISSED = (Requirement("time", "<= 1", value, value == "1") for value in ("1", "2"))
NOT_JUDGED = MISSED._replace(is_judged=False)


@pytest.mark.parametrize(("verdict", "code"), [([MET], 0), ([MET, MISSED], 1), ([NOT_JUDGED], 0)])
def test_a_part_writes_its_files_and_fails_if_a_requirement_is_missed(tmp_path, capsys, verdict, code):
    result = part.Result({"a": [{"x": 1}], "": [{"y": 0.123456}]}, verdict, ["words"], packages=["numpy"])
    main = part.command("core.some", "Title", None, lambda options: result)
    assert main(["--output", str(tmp_path)]) == code
    assert {p.name for p in tmp_path.iterdir()} == {"some.json", "some.md", "some_a.csv", "some.csv"}
    facts = json.loads((tmp_path / "some.json").read_text())
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["verdict"][-1]["measured"] == verdict[-1].measured
    assert verdict[-1].verdict in (tmp_path / "some.md").read_text()
    assert verdict[-1].verdict in capsys.readouterr().out


def test_a_part_that_cannot_run_says_why_and_writes_nothing(tmp_path, capsys):
    def measure(options):
        raise part.Skipped("no jax") if options.number else part.Misused("no number")

    main = part.command("core.some", "Title", None, measure, options={"--number": {"type": int}})
    assert main(["--quick", "--output", str(tmp_path), "--number", "1"]) == 0
    assert "skipped: no jax" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--output", str(tmp_path)])
    assert "error: no number" in capsys.readouterr().err


@pytest.mark.parametrize("module", [authors, torchdeq_peer])
def test_peers_that_are_not_installed_are_skipped(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.main(["--quick", "--output", str(tmp_path)]) == 0
    assert "pip install -e '.[peers]'" in capsys.readouterr().out


def test_the_verdict_of_all_parts_is_put_on_the_page_again_and_again(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{bench.BEGIN}\nold\n{bench.END}\n\nafter\n")
    facts = {"date": "2026-01-02T03:04", "commit": "abcdef123", "verdict": [MET._asdict(), MISSED._asdict()]}
    (tmp_path / "depth.json").write_text(json.dumps(facts))
    for _ in range(2):
        bench.write_verdict(page, tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert text.count("| [depth](results/depth.md) | time | <= 1 | 2 | MISSED | 2026-01-02, abcdef1 |") == 1


def test_all_parts_are_run_and_the_worst_decides(tmp_path, capsys, monkeypatch):
    codes = {"core": 0, "depth": 1, "pairs": 3}
    script = "import sys; print('skipped: it' if sys.argv[1] == 'core' else 'ran'); sys.exit(int(sys.argv[2]))"

    def popen(command, **settings):
        name = command[2].rsplit(".", 1)[-1]
        assert "--quick" in command
        return original([sys.executable, "-c", script, name, str(codes[name])], **settings)

    original = bench.subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", popen)
    run = ["--quick", "--output", str(tmp_path), "--only"]
    assert bench.main([*run, "core"]) == 0
    assert "skipped (it)" in capsys.readouterr().out
    assert bench.main([*run, "authors"]) == 0
    assert "skipped (no --repository)" in capsys.readouterr().out
    assert bench.main([*run, *codes]) == 1
    words = capsys.readouterr().out
    assert "MISSED" in words
    assert "FAILED (exit code 3)" in words


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a step is read from /proc")
def test_a_competitor_has_a_process_of_its_own():
    with Isolated("tests.benchmarks.competitor:build", environment={**MEASURED_MEMORY, "EXTRA": "here"}) as competitor:
        with pytest.raises(RuntimeError, match="ValueError: -1 bytes"):
            competitor.ask("build", -1)
        competitor.ask("build", 64 * 2**20)
        assert competitor.ask("results") == (64 * 2**20, 1, "1", "here")
        # Resident pages, not bytes: within 2 MiB.
        assert competitor.ask("peak_bytes") == pytest.approx(64 * 2**20, abs=2 * 2**20)
        competitor.ask("build", 1)
        assert competitor.ask("peak_bytes") < 2**20
        timing = time_alternating({"one": competitor}, 3)["one"]
        assert len(timing.process_seconds) == len(timing.wall_seconds) == 3
    assert "EXTRA" not in os.environ


@pytest.mark.parametrize(("model", "file"), [("language", "language_model"), ("classifier", "multi_scale")])
def test_every_released_array_is_one_of_our_parameters(model, file):
    with np.load(Path(__file__).parents[1] / "golden" / f"{file}.npz") as arrays:
        paths = {key.removeprefix("model"): arrays[key].shape for key in arrays.files if key.startswith("model.")}
    names = [our_name(model, path) for path in paths]
    used = [name for name in names if name is not None]
    task = tasks.language(1) if model == "language" else tasks.classifier(1)
    if model == "classifier":  # the file's has three stages
        task = task._replace(channels=(16, 32, 16), widths=(1, 3, 1))
    assert sorted(used) == sorted(name for name, _ in tasks.build_model(task).named_parameters())
    assert len(names) - len(used) == (3 if model == "language" else 0)


def test_our_side_of_a_task_has_the_gradient_of_a_plain_loop():
    task = tasks.language(2)._replace(batch=2, vocab_size=16, context=8, dim=32, num_heads=2)
    arrays = tasks.make_arrays(task, "float64")
    (loss, ours), (plain_loss, plain) = (
        tasks.build(variant, task, arrays).results() for variant in ("reversible", "stored")
    )
    assert loss == pytest.approx(plain_loss, rel=1e-9)
    assert ours.keys() == {name for name in arrays if name not in ("tokens", "targets")}
    for name, gradient in plain.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-6, atol=1e-9)  # the state's resolution is 2^-32


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_checkpointed_segments_are_the_plain_loop(num_steps):
    problem = attention_problem(1, 8, 32, 2, torch.float64)
    value = depth.segmented_value(problem, num_steps)
    plain = reversible_loop(problem.f, problem.z0, problem.x, beta=depth.BETA, num_steps=num_steps)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(problem.gradient(value), problem.gradient(plain))


def test_advice_names_only_what_is_worth_its_time():
    def row(method, time, size):
        return {"evaluations": 8, "method": method, "time over stored, median": time, "peak_bytes": size * 2**20}

    rows = [row("stored", 1.0, 50), row("slow and large", 1.4, 20), row("reversible", 1.2, 10), row("tiny", 2.0, 1)]
    assert [r["method"] for r in depth.best(rows)] == ["stored", "reversible", "tiny"]
    assert depth.advice(rows).startswith("stored (50.0 MiB, 1.00x), else reversible (10.0 MiB, 1.20x), else tiny")


def test_four_evaluations_of_an_attention_block_take_at_most_13_mib():
    """A checkpoint of every evaluation takes 12.4, and one leaf more at the peak would take 13.3."""
    step = reversible_step(attention_problem(1, 512, 192, 4), revdeq(0.8), 2, "exact")
    step()  # what the first call allocates for good
    assert peak_tensor_bytes(step) <= 13 * 2**20


def test_depth_quick_writes_page_and_figure(tmp_path):
    assert depth.main(["--quick", "--output", str(tmp_path)]) == 0
    names = {"depth.json", "depth.md", "depth.png", "depth_methods.csv", "depth_mazes.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names


@pytest.mark.skipif(torch.cuda.is_available(), reason="its page says what it says without a GPU")
def test_what_a_gpu_will_run_runs_on_a_cpu_and_says_so(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path)]) == 0
    assert "skipped: this machine has no CUDA device" in capsys.readouterr().out
    assert gpu.main(["--quick", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "No GPU has run this yet" in page
    assert "| language model: time over bare evaluations | <= 1.05 | " in page
    rows = {line.split(" | ")[1] for line in page.split("## Training steps")[1].splitlines() if " | " in line}
    cases = {"bare evaluations", "exact", "stored BPTT", "checkpointed BPTT", "explicit model"}
    assert rows >= cases


@pytest.mark.parametrize(
    ("ratio", "quick", "word"), [(0.70, False, "met"), (0.71, False, "MISSED"), (0.71, True, "not judged")]
)
def test_the_authors_time_decides(ratio, quick, word):
    label = {"model": "language", "steps": 2, "competitor": authors.OURS}
    tables = {
        "gradients": [label | {"loss error": 0.0, "gradient error": 1e-9}],
        "times": [label | {f"process over {authors.RELEASED}, median": ratio}],
        "memory": [label | {"peak_bytes": 0}, label | {"competitor": authors.BATCHED, "peak_bytes": 0}],
    }
    (requirement,) = [r for r in authors.judge(tables, quick) if "time" in r.name]
    assert requirement.verdict == word
