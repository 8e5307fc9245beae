"""Runs with W&B offline and TensorBoard beside it, read back by these tools' own readers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.callbacks.wandb_records import read_back, wandb_metrics as metrics
from tests.helpers.data import tiny_image_config
from tests.helpers.runs import run, tiny_config, without_key

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of W&B's own code
    pytest.mark.xdist_group("wandb_runs"),
]

ON = (
    *("--run.version=v", "--run.wandb=auto", "--run.wandb_group=sweep", "--run.wandb_checkpoints=true"),
    *("--run.tensorboard=true", "--diagnostics.residual_curve_every_n_steps=2"),
    *("--diagnostics.gradient_error_every_n_steps=2", "--diagnostics.contraction_every_n_steps=3"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        without_key(patch, folder)
        yield folder


@pytest.fixture(scope="module")
def language(home):
    """A run of 6 steps that went on to 8."""
    path = home / "runs/tiny/v"
    run("fit", "--config", tiny_config(home), *ON)
    run("fit", "--ckpt_path", path / "checkpoints/last.ckpt", "--trainer.max_steps=8", "--run.test=false")
    return path


@pytest.fixture(scope="module")
def image(home):
    config = tiny_image_config(home, max_steps=4, val_check_interval=2)
    run("image", "fit", "--config", config, "--run.name=image", *ON)
    return home / "runs/image/v"


@pytest.fixture(scope="module")
def records(language):
    return read_back(language)


@pytest.fixture(scope="module")
def image_records(image):
    return read_back(image)


def test_every_number_of_the_csv_file_is_there_over_the_optimizer_steps(language, image, records, image_records):
    for folder, found in ((language, records), (image, image_records)):
        expected = metrics(folder)
        del expected["epoch"]  # also of the test, which the file's resumed run dropped
        assert len(expected) > 40
        for key, values in expected.items():
            np.testing.assert_allclose(found.values(key), values, err_msg=key)
        assert {"train/loss", "val/loss", "equilibrium/forward_nfe", "system/peak_memory_bytes"} <= expected.keys()


def test_tables_charts_and_pictures_are_there(language, records, image_records):
    assert len(records.media("samples/text")) == 2
    assert records.media("samples/text")[-1]["ncols"] == 3
    for found, charts in (
        (records, ("equilibrium/residual_curve", "depth_sweep/val_loss", "depth_sweep/test_loss")),
        (image_records, ("equilibrium/residual_curve", "depth_sweep/val_accuracy", "depth_sweep/test_loss")),
    ):
        for key in charts:
            assert found.config[f"_wandb.visualize.{key}"]["panel_config"]["panelDefId"] == "wandb/lineseries/v0"
            assert found.media(f"{key}_table")
        assert found.media("depth_sweep/val")[-1]["_type"] == "table-file"
        for medium in found.files - {"requirements.txt"}:
            assert medium.startswith("media/")
    assert len(records.media("equilibrium/residual_curve_table")) == 4
    (part, _) = sorted((language / "wandb").glob("offline-run-*"))
    table = min((part / "files/media/table/samples").glob("*.json"), key=lambda path: int(path.name.split("_")[1]))
    (row,) = json.loads(table.read_text())["data"]
    first = json.loads((language / "samples.jsonl").read_text().splitlines()[0])
    assert row == [first["step"], first["prompt"], first["text"]]
    (sheet, _) = image_records.media("samples/images")
    assert sheet["_type"] == "image-file"
    assert "after step 2" in sheet["caption"]


def test_config_environment_group_and_artifacts_are_there(language, records):
    assert records.config["model"]["solver"]["max_steps"] == 3
    assert records.config["run"]["wandb_group"] == "sweep"
    environment = json.loads((language / "environment.json").read_text())
    (earlier,) = environment.pop("earlier_starts")
    assert records.config["environment"] == environment
    assert earlier["started"] < environment["started"]  # in seconds; between them is all of the first part
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert environment["git_commit"] == (commit or None)
    assert environment["packages"].keys() >= {"torch", "lightning", "wandb", "revdeq-lightning"}
    assert environment["hardware"]["num_cpus"] >= 1
    models = [artifact for artifact in records.of["artifact"] if artifact["type"] == "model"]
    assert [artifact["name"] for artifact in models] == ["model-tiny-v"] * 2  # of each part
    assert [item["path"] for item in models[0]["manifest"]["contents"]] == ["best.ckpt", "last.ckpt"]


def test_the_resumed_run_is_the_same_one(records):
    first, second = records.of["run"]
    for key in ("run_id", "display_name", "project", "run_group"):
        assert first[key] == second[key], key
    assert (first["run_id"], first["run_group"], first["project"]) == ("tiny-v", "sweep", "revdeq")
    assert [step for step, _ in records.values("train/loss")] == list(range(8))


def test_metrics_are_grouped_and_summaries_keep_the_best(records):
    defined = {record.get("glob_name") or record.get("name"): record for record in records.of["metric"]}
    for prefix in {key.split("/")[0] for key in records.keys if "/" in key} - {"trainer"}:
        assert defined[f"{prefix}/*"]["step_metric"] == "trainer/global_step"
    assert defined["val/loss"]["summary"] == {"min": True}
    assert defined["val/accuracy"]["summary"] == {"max": True}


def test_tensorboard_has_the_numbers(language, image):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in (language, image):
        board = EventAccumulator(str(folder / "tensorboard")).Reload()
        expected = metrics(folder)
        for key in ("train/loss", "val/loss", "equilibrium/relative_residual", "gradient_error/bptt/relative_l2"):
            found = [(event.step, event.value) for event in board.Scalars(key)]
            np.testing.assert_allclose(found, expected[key], rtol=1e-6, err_msg=key)  # float32


@pytest.fixture(scope="module")
def dashboard():
    """The script of the dashboard, and its template."""
    path = Path("examples/wandb/dashboard.py")
    specification = importlib.util.spec_from_file_location("dashboard", path)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script, yaml.safe_load(script.TEMPLATE.read_text())


def test_every_key_of_the_dashboard_is_logged_by_a_run(dashboard, records, image_records):
    script, template = dashboard
    shown = script.keys(template)
    logged = records.keys | image_records.keys
    only_with_more_classes = {"val/top5_accuracy"}  # than five: the images here have three
    assert set(shown["lines"]) - only_with_more_classes <= logged
    assert {f"{key}_table" for key in shown["chart"]} <= logged
    assert {*shown["table"], *shown["pictures"]} <= logged
    # And what no panel shows is known.
    hidden = {key for key in logged - set(shown["lines"]) if key.split("/")[0] in ("train", "val", "equilibrium")}
    known = ("perplexity", "_table", "1/", "2/", "backward_relative")
    assert not {key for key in hidden if not any(word in key for word in known)}


def test_w_and_bs_library_serialises_the_dashboard(dashboard, records):
    pytest.importorskip("wandb_workspaces", reason="needs the extra `dashboard`")
    script, template = dashboard
    made = script.workspace(template, "somebody", "revdeq")._spec["spec"]["section"]["panelBankConfig"]
    assert [section["name"] for section in made["sections"]] == [section["name"] for section in template["sections"]]
    panels = [panel for section in made["sections"] for panel in section["panels"]]
    drawn = [key for panel in panels if "Line Plot" in panel["viewType"] for key in panel["config"]["metrics"]]
    assert drawn == script.keys(template)["lines"]
    assert {panel["config"]["xAxis"] for panel in panels if "Line Plot" in panel["viewType"]} == {script.X_AXIS}
    chart = next(panel["config"] for panel in panels if panel["viewType"] == "Vega2")
    logged = records.config["_wandb.visualize.equilibrium/residual_curve"]["panel_config"]
    for setting in ("panelDefId", "fieldSettings", "transform"):
        assert chart[setting] == logged[setting], setting
    with pytest.raises(ValueError, match="a panel must have lines, chart, table or pictures, got"):
        script.panel({"title": "x", "line": ["a"]})


def test_the_picture_of_the_dashboard_is_drawn_from_run_folders(language, image, tmp_path):
    command = [sys.executable, "examples/wandb/dashboard.py", "--picture", tmp_path / "out.png", language, image]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 1000
        assert drawn.height > 1000
