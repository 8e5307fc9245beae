"""Names of options, read from source code, against those of the real parsers; how fast mistakes are reported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from revdeq_lightning.cli.option_names import _is_known, check_options, option_groups, short_help
from tests.helpers.runs import run, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", ["fit", "predict", "image test", "reasoning fit"])
def test_every_option_of_the_parser_is_known_and_few_others(capsys, words):
    with pytest.raises(SystemExit):
        run(*words.split(), "--help=all")
    text = capsys.readouterr().out
    real = set(re.findall(r"^ +(?:-\w(?: \w+)?, )?--([\w.]+)", text, re.MULTILINE)) - {"data", "model", "trainer"}
    assert len(real) > 100
    task = words.split()[0] if " " in words else "lm"
    assert [name for name in real if not _is_known(task, name)] == []
    ours = {f"{group}.{name}" for group, names in option_groups(task).items() for name in names}
    groups = {"data.augmentation", "model.network", "model.solver", "model.optimizer", "model.solver.implicit_solver"}
    given_by_data = {f"model.network.{n}" for n in ("vocab_size", "context_length", "shape")}
    given_by_data |= {f"model.network.num_{n}" for n in ("classes", "channels", "symbols", "answers")}
    assert ours - real <= groups | given_by_data


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_passes(path):
    task = {"lm": "lm", "reasoning": "reasoning", "trainer": "lm"}.get(path.parent.name, "image")
    if (
        isinstance(settings := yaml.safe_load(path.read_text()), dict)
        and {"model", "data", "trainer"} & settings.keys()
    ):
        check_options(task, "fit", ["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("fit --model.optimizer.lrr=3", "--model.optimizer.lrr=3 (did you mean model.optimizer.lr?)"),
        ("fit --trainer.max_step 3", "--trainer.max_step (did you mean trainer.max_steps?)"),
        ("fit --modle.network.d_model=3", "(did you mean model.network.d_model?)"),
        ("fit --data.image_size=32", "is of the task image: use PYTHON -m revdeq_lightning image fit"),
        ("image fit --config configs/lm/default.yaml", "is of the task lm: use PYTHON -m revdeq_lightning lm fit"),
        ("generate --promt=x", "unrecognized arguments: --promt=x (did you mean prompt?)"),
        ("image predict --imagse x", "unrecognized arguments: --imagse (did you mean images?)"),
        ("report --outputt x RUN", "unrecognized arguments: --outputt"),
    ],
)
def test_a_misspelt_option_is_reported_without_slow_imports(words, error):
    program = """
import sys
from revdeq_lightning.cli.main import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "lightning", "numpy", "matplotlib", "jsonargparse"} & sys.modules.keys()
"""
    command = [sys.executable, "-c", program, *words.split()]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert error in re.sub(r"use \S+ -m", "use PYTHON -m", line)


def test_help_is_short_and_has_every_group():
    text = short_help("lm", "fit")
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 100
    for name in ("--config", "--ckpt_path", "--help=all", "--model.solver.*", "--data.*", "lr ", "val_check_interval"):
        assert name in text


def test_the_checkpoint_of_another_task_is_told(tmp_path, capsys):
    folder = tmp_path / "runs/v"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "config.yaml").write_text(tiny_config(tmp_path).read_text())
    with pytest.raises(SystemExit) as stop:
        run("image", "fit", "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(
        r"^error: .*config.yaml has an unknown setting: .* is of the task lm: use .* lm fit$", error.strip()
    )
