"""Texts in settings are read back from a run's `config.yaml` as they were."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings, strategies as st
from jsonargparse import ArgumentParser

from revdeq_lightning.cli.paths import with_expanded_paths
from revdeq_lightning.cli.yaml_text import dump_yaml, prepare_jsonargparse, without_interpolation
from revdeq_lightning.runs.folder import LanguageRunConfig

prepare_jsonargparse()
TEXTS = (
    *("1e-3", "null ", "yes", "01", "a: b", "#x", "{}", "[]", "~", "1:30", "0x1f", "1_000", ".inf", "- a", "a:", "<<"),
    *(
        "${HOME}",
        r"\${x}",
        r"\\${x",
        "$HOME",
        "a\nb",
        " a ",
        "'",
        '"',
        "\\",
        "é\u2028",
        "\x85",
        "\x00",
        "&a",
        "!x",
        "-",
    ),
)


def parsed(*arguments: str) -> Any:
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--run", type=LanguageRunConfig, default=LanguageRunConfig())
    return parser.parse_args(list(arguments))


def every_text(test: Any) -> Any:
    for text in TEXTS:
        test = example(text)(test)
    return test


@settings(max_examples=100, deadline=None)
@every_text
@given(st.text())
def test_any_text_survives_the_run_s_file(text):
    file = Path(os.environ["PYTEST_FOLDER"], "config.yaml")
    values = {"name": text or "a", "sample_prompt": text, "wandb_project": text}
    written = dump_yaml(without_interpolation({"run": values}))
    file.write_text(written, encoding="utf-8")
    read = parsed("--config", str(file))
    nothing = text.strip() == "null"  # of settings that may be null, also on the command line
    assert {key: read.run[key] for key in values} == values | ({"name": None} if nothing else {})
    if "$" not in text:
        assert yaml.safe_load(written)["run"] == values  # for readers without our parser


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_FOLDER", str(tmp_path))


@pytest.mark.parametrize("text", ["1e-3", "yes", "01", "#x", "~", "2026-01-01", "{}", "a: b"])
def test_the_command_line_takes_texts_as_they_are(text):
    assert parsed(f"--run.name={text}", f"--run.sample_prompt={text}").run.name == text


def test_home_and_variables_expand_in_paths_on_the_command_line_and_in_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "there")
    options = ["--run.folder=~/$WHERE", "--config", "${HOME}/x", "--prompt", "~ $WHERE", "--data.cache_dir=~", "--a=~"]
    expected = ["--run.folder=/home/me/there", "--config", "/home/me/x", "--prompt", "~ $WHERE"]
    assert with_expanded_paths(options) == [*expected, "--data.cache_dir=/home/me", "--a=~"]
    file = tmp_path / "a.yaml"
    file.write_text("run: {folder: ~/$WHERE, name: '${WHERE}-1', sample_prompt: ~ $WHERE}\n")
    run = parsed("--config", str(file)).run
    assert (run.folder, run.name, run.sample_prompt) == ("/home/me/there", "there-1", "~ $WHERE")
