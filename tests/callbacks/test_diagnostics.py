"""The settings `--diagnostics.*` of a training run."""

import pytest
import yaml

from tests.helpers.modules import table
from tests.helpers.runs import error_of, run, tiny_config

ALWAYS = (
    *("equilibrium/forward_nfe", "equilibrium/total_backward_nfe", "equilibrium/num_certified_gradients"),
    *("system/tokens_per_second", "system/data_seconds", "system/peak_memory_bytes"),
)
ON_REQUEST = ("gradient_error/bptt/relative_l2", "gradient_error/converged/cosine", "equilibrium/spectral_radius")
QUICK = ("--run.test=false", "--run.sample_tokens=0", "--run.version=v")


def keys(folder):
    return {key for row in table(folder / "runs/tiny/v/metrics.csv", without="val/") for key in row}


def test_what_is_always_measured(tmp_path, capsys):
    run("fit", "--config", tiny_config(tmp_path), *QUICK)
    found = keys(tmp_path)
    assert found.issuperset(ALWAYS)
    assert not found.intersection(ON_REQUEST)
    assert not any("utilization" in key for key in found)
    assert "6 of 6 gradients certified exact" in capsys.readouterr().out


def test_what_is_measured_on_request(tmp_path):
    settings = {"gradient_error_every_n_steps": 3, "gradient_error_float64": "true", "contraction_every_n_steps": 2}
    settings |= {"certificate": "stop", "peak_flops": 1e12}
    options = [f"--diagnostics.{key}={value}" for key, value in settings.items()]
    run("fit", "--config", tiny_config(tmp_path), *QUICK, *options)
    assert keys(tmp_path).issuperset([*ALWAYS, *ON_REQUEST, "system/model_flop_utilization"])
    saved = yaml.safe_load((tmp_path / "runs/tiny/v/config.yaml").read_text())["diagnostics"]
    assert saved["gradient_error_every_n_steps"] == 3
    assert saved["certificate"] == "stop"
    # The file of the run is enough for the other commands.
    run("validate", "--ckpt_path", tmp_path / "runs/tiny/v/checkpoints/last.ckpt")


def test_a_model_without_equilibrium_is_measured_too(tmp_path, capsys):
    config = yaml.safe_load(tiny_config(tmp_path).read_text())
    config["model"]["solver"] = {"solver": "none"}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    run("fit", "--config", path, *QUICK)
    assert not any(key.startswith("equilibrium/") for key in keys(tmp_path))
    assert "system/tokens_per_second" in keys(tmp_path)
    assert "certified" not in capsys.readouterr().out
    error = error_of(capsys, "fit", "--config", path, "--diagnostics.contraction_every_n_steps=2")
    assert "contraction_every_n_steps needs a model with an equilibrium, got 2" in error


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("gradient_error_every_n_steps=-1", "gradient_error_every_n_steps must be at least 0, got -1"),
        ("certificate=ignore", "certificate"),
        ("peak_flops=0", "peak_flops must be in (0, inf), got 0"),
        ("contraction_every_steps=1", "did you mean diagnostics.contraction_every_n_steps?"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, capsys, option, words):
    assert words in error_of(capsys, "fit", "--config", tiny_config(tmp_path), f"--diagnostics.{option}", code=2)
