"""Names of options, read from source code, against those of the real parsers; how fast mistakes are reported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from revdeq_lightning.cli.option_names import FROM_DATA, _is_known, check_options, option_groups
from tests.helpers.runs import run, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", ["predict", "image test", "reasoning fit"])
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
    assert ours - real <= groups | {f"model.network.{name}" for name in FROM_DATA[task]}


def test_every_configuration_passes():
    paths = [path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "wandb"]
    for path in paths:
        task = {"lm": "lm", "reasoning": "reasoning", "trainer": "lm"}.get(path.parent.name, "image")
        check_options(task, "fit", ["--config", str(path)])
    assert len(paths) > 30


EARLY = {
    "fit --model.optimizer.lrr=3": "--model.optimizer.lrr=3 (did you mean model.optimizer.lr?)",
    "fit --trainer.max_step 3": "--trainer.max_step (did you mean trainer.max_steps?)",
    "fit --modle.network.d_model=3": "(did you mean model.network.d_model?)",
    "fit --data.image_size=32": "is of the task image: use PYTHON -m revdeq_lightning image fit",
    "image fit --config configs/lm/default.yaml": "is of the task lm: use PYTHON -m revdeq_lightning lm fit",
    "fit --config configs/lm/defalt.yaml": "configs/lm/defalt.yaml (did you mean configs/lm/default.yaml?)",
    "fit --config {misspelt}": "model.solver.max_stpes (did you mean model.solver.max_steps?)",
    "fit --config {fixed}": "sets model.network.vocab_size, which follows from the data: remove it",
    "fti": "unknown command 'fti' (did you mean fit?)",
    "generate --promt=x": "unrecognized arguments: --promt=x (did you mean prompt?)",
    "image predict --imagse x": "unrecognized arguments: --imagse (did you mean images?)",
    "report --outputt x RUN": "unrecognized arguments: --outputt",
}


def test_help_and_misspelt_names_come_without_slow_imports(tmp_path):
    program = """
import sys
from revdeq_lightning.cli.main import main
for words in sys.argv[1:]:
    try:
        main(words.split())
    except SystemExit as stop:
        print(stop.code, file=sys.stderr, flush=True)
assert not {"torch", "lightning", "numpy", "matplotlib", "jsonargparse"} & sys.modules.keys()
"""
    path = tiny_config(tmp_path)
    fixed = tmp_path / "fixed.yaml"
    fixed.write_text("model: {network: {vocab_size: 9}}")
    path.write_text(path.read_text().replace("max_steps: 3", "max_stpes: 3"))
    lines = [line.format(misspelt=path, fixed=fixed) for line in EARLY]
    command = [sys.executable, "-c", program, *lines, "--help", "fit --help"]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    told = re.sub(r"use \S+ -m", "use PYTHON -m", result.stderr).splitlines()
    assert (told[1::2], told[-1]) == (["2"] * len(EARLY), "0")
    for line, error in zip(told[::2], EARLY.values(), strict=False):
        assert line.startswith("error: ")
        assert error in line
    assert "python -m revdeq_lightning generate --ckpt_path" in result.stdout
    help_of_fit = result.stdout.partition("Usage: ")[2]
    assert max(map(len, help_of_fit.splitlines())) <= 100
    for name in ("--config", "--ckpt_path", "--help=all", "--model.solver.*", "--data.*", "lr ", "val_check_interval"):
        assert name in help_of_fit


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
